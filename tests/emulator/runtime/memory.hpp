// Device memory and what is known about each of its bytes.
//
// All device memory is one arena: first the global buffers (placed by Python, ../memory.py), then one window of
// shared memory a resident block. Beside it lie, at the same offset,
//   - the shadow: a state for every byte (may it be touched, was it written, ...), and
//   - the history: who last read and wrote the byte, for the race check.
#pragma once
#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>

namespace emu {

constexpr size_t kGlobalBytes = size_t(384) << 20;
constexpr size_t kWindowBytes = size_t(128) << 20;
constexpr size_t kArenaBytes = kGlobalBytes + kWindowBytes;

// States of a byte, as bits; ../memory.py knows the same numbers. A byte never set up is 0: not accessible.
enum : uint8_t {
  kAccessible = 1,
  kInitialised = 2,
  kWritable = 4,
  kShared = 8,
};

// One past access to a byte. `clock` is the clock of the warp that made it, at that time: see races.hpp.
struct PastAccess {
  uint32_t clock;  // 0: none
  uint16_t warp;   // within the cluster
  uint8_t lane;    // kManyLanes when several lanes of the warp did the same
  uint8_t atomic;
};
constexpr uint8_t kManyLanes = 255;
struct History {
  uint32_t cluster;  // serial number of the cluster whose accesses these are; others' are stale
  PastAccess write;
  PastAccess reads[2];  // the last one, and the last one by another warp
};

inline void* map_lazily(size_t bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) abort();
  return p;
}

struct Memory {
  char* const arena = static_cast<char*>(map_lazily(kArenaBytes));
  uint8_t* const shadow = static_cast<uint8_t*>(map_lazily(kArenaBytes));
  History* const history = static_cast<History*>(map_lazily(kArenaBytes * sizeof(History)));

  size_t offset(const void* address) const { return uintptr_t(address) - uintptr_t(arena); }
};

}  // namespace emu
