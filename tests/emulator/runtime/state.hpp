// Threads, warps, blocks, clusters and the launch they belong to.
#pragma once
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "../include/emu_abi.h"
#include "fault.hpp"
#include "fiber.hpp"
#include "memory.hpp"

namespace emu {

struct Block;
struct Cluster;
struct Fiber;

using Clocks = std::vector<uint32_t>;  // one a warp of the cluster

struct Warp {
  Block* block = nullptr;
  unsigned index = 0;  // within the cluster
  Fiber* lanes[32] = {};
  unsigned exists = 0;  // lanes that the block size gives this warp
  unsigned exited = 0;
  unsigned waiting = 0;  // lanes inside a collective
  Clocks clocks;         // what this warp knows of the others; [index] is its own
  void tick() { ++clocks[index]; }
  void learn(const Clocks& other) {
    for (size_t i = 0; i < clocks.size(); ++i)
      if (other[i] > clocks[i]) clocks[i] = other[i];
  }
};

enum class Collective : uint8_t { none, sync_warp, shuffle, ballot, reduce, match, mma, ldmatrix };
enum class State : uint8_t { ready, barrier, collective, cluster, done };

struct AsyncCopy {
  char* to;
  const char* from;
  int bytes, source_bytes;
};

struct Fiber {
  Context context;
  unsigned builtin[16];
  Warp* warp = nullptr;
  Block* block = nullptr;
  unsigned lane = 0;
  State state = State::ready;
  uint64_t pc = 0;  // in the kernel: where it called the runtime last

  // in a collective
  Collective collective = Collective::none;
  unsigned mask = 0;
  uint64_t value = 0, parameter = 0;

  int barrier_id = 0;
  int barrier_result = 0;
  int predicate = 0;
  unsigned cluster_phase = 0;  // the cluster barrier it has arrived at
  bool cluster_arrived = false;
  unsigned spins = 0;  // atomic accesses since it last gave way

  std::vector<AsyncCopy> open_copies;
  std::vector<std::vector<AsyncCopy>> committed_copies;  // oldest first
};

struct Barrier {
  int expected = 0;  // threads; 0: nobody is here
  int arrived = 0;
  Predicate kind = Predicate::none;
  std::vector<Fiber*> waiting;
  Clocks clocks;  // brought by bar.arrive
};

struct Block {
  Cluster* cluster = nullptr;
  unsigned index[3] = {};
  unsigned linear = 0, rank = 0;  // in the grid, in the cluster
  int threads = 0, alive = 0;
  std::vector<Warp> warps;
  Barrier barriers[16];
  char* window = nullptr;  // its shared memory: static part (a copy while another block runs), dynamic
};

struct Cluster {
  uint32_t serial = 0;
  std::vector<Block> blocks;
  size_t warp_count = 0;
  size_t windows_begin = 0, windows_end = 0;  // arena offsets
  unsigned phase = 0;                         // cluster barriers completed
  int arrived = 0;
  Clocks arrived_clocks, phase_clocks;
};

// What is known of an address used by atomics: for happens-before, and to see scopes that are too narrow.
struct AtomicVariable {
  std::unordered_map<uint32_t, Clocks> clocks;  // by cluster serial
  unsigned block = 0;
  bool narrow = false;  // used with block scope, by `block`
  bool many_blocks = false;
};

// The launch configuration; ../emulator.py has the same structure.
struct Configuration {
  unsigned grid[3], block[3], cluster[3];
  unsigned dynamic_shared;
  int32_t cooperative;
  int32_t order;  // 0 forward, 1 reverse, 2 random
  int32_t check_races;
  uint64_t seed;
  double timeout;
  uint64_t static_begin;  // the kernel's static shared memory, as it lies in the compiled file
  uint64_t static_bytes;
  uint64_t image_begin, image_end;  // the compiled file: constants may be read there
  const uint32_t* variables;        // (offset, bytes) of each static shared variable
  uint32_t variable_count;
};

}  // namespace emu
