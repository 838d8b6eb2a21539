// Fibers: one stack and one saved register set a CUDA thread, all on one OS thread.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#if defined(__x86_64__)
#include <xmmintrin.h>
#else
#include <ucontext.h>
#endif

namespace emu {

#if defined(__x86_64__)

// A suspended context is its stack pointer; what the ABI preserves over a call lies on that stack.
struct Context {
  void* stack_pointer = nullptr;
};

extern "C" void emu_switch_stack(void** save_stack_pointer, void* stack_pointer);
asm(R"(
.text
.type emu_switch_stack, @function
emu_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emu_switch_stack, . - emu_switch_stack
)");

inline void switch_context(Context& from, const Context& to) {
  emu_switch_stack(&from.stack_pointer, to.stack_pointer);
}
inline void make_context(Context& context, char* stack, size_t size, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + size);
  *--top = nullptr;                              // entry's return address: it never returns (and the alignment)
  *--top = reinterpret_cast<void*>(entry);       // where `ret` goes
  for (int i = 0; i < 6; ++i) *--top = nullptr;  // the six registers
  context.stack_pointer = top;
}

#else

struct Context {
  ucontext_t registers;
};
inline void switch_context(Context& from, const Context& to) { swapcontext(&from.registers, &to.registers); }
inline void make_context(Context& context, char* stack, size_t size, void (*entry)()) {
  getcontext(&context.registers);
  context.registers.uc_stack.ss_sp = stack;
  context.registers.uc_stack.ss_size = size;
  context.registers.uc_link = nullptr;
  makecontext(&context.registers, entry, 0);
}

#endif

// Flush subnormal results and operands to zero, as -ftz=true does; restores the mode when it goes.
class FlushToZero {
 public:
#if defined(__x86_64__)
  FlushToZero() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }  // FTZ | DAZ
  ~FlushToZero() { _mm_setcsr(unsigned(saved_)); }
#elif defined(__aarch64__)
  FlushToZero() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" ::"r"(saved_ | (1ul << 24)));
  }
  ~FlushToZero() { asm volatile("msr fpcr, %0" ::"r"(saved_)); }
#endif
 private:
  unsigned long saved_ = 0;
};

// Stacks are kept from launch to launch. A page below each stack faults, while there are few enough for the kernel.
class Stacks {
 public:
  static constexpr size_t kSize = 128 * 1024;
  static constexpr size_t kGuarded = 4096;  // stacks that get a guard page

  void reserve(size_t count) {
    if (count <= count_) return;
    if (base_) munmap(base_, count_ * kSize);
    count_ = count;
    base_ = static_cast<char*>(
        mmap(nullptr, count * kSize, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (base_ == MAP_FAILED) abort();
    const size_t page = size_t(sysconf(_SC_PAGESIZE));
    for (size_t i = 0; i < count && i < kGuarded; ++i) mprotect(base_ + i * kSize, page, PROT_NONE);
  }
  // Tops are staggered, so that the same variable of many threads does not fall into one cache set.
  char* bottom(size_t i) const { return base_ + i * kSize; }
  size_t usable(size_t i) const { return kSize - (i % 16) * 256; }
  bool contains(uintptr_t address) const { return address - uintptr_t(base_) < count_ * kSize; }

 private:
  char* base_ = nullptr;
  size_t count_ = 0;
};

}  // namespace emu
