// What Python is told about a fault. ../emulator.py has the same structure.
#pragma once
#include <csetjmp>
#include <cstdarg>
#include <cstdint>
#include <cstdio>

namespace emu {

struct Fault {
  char kind[32];
  char message[1024];
  char location[256];  // file:line where the compiler put it into the code; else Python looks `pc` up
  unsigned block[3];
  unsigned thread[3];
  int32_t has_thread;
  uint64_t pc;       // in the kernel, 0 if unknown
  uint64_t address;  // that was accessed, 0 if none
};

}  // namespace emu
