// Every load and store of a kernel comes through here: is the byte there, was it written, and could another
// thread's access to it come before or after this one?
//
// The race check keeps a clock a warp (vector clocks, as FastTrack and compute-sanitizer's racecheck do): a barrier
// makes its warps know each other's clocks, and advances them. An access is ordered after a past one by another
// warp if this warp knows the other's clock of that time; by another lane of this warp, if the warp's own clock
// advanced since, which __syncwarp() and barriers do, but shuffles do not (CUDA promises no memory order there).
// Races between clusters are not looked for: there the changed schedules show them.
#pragma once
#include <cinttypes>

#include "scheduler.hpp"

namespace emu {

inline bool ordered(const PastAccess& past, const Warp& warp, unsigned lane) {
  if (past.clock == 0) return true;
  if (past.warp == warp.index) return past.lane == lane || past.clock < warp.clocks[warp.index];
  return past.clock <= warp.clocks[past.warp];
}

[[noreturn]] inline void report_race(const Fiber* me, uint64_t pc, const char* space, size_t at, const PastAccess& past,
                                     bool past_is_write, bool is_write) {
  char lane[32] = "several lanes";
  if (past.lane != kManyLanes) snprintf(lane, sizeof lane, "lane %u", past.lane);
  launch->fault->address = uint64_t(memory.arena + at);
  raise("race", me, pc, "%ss a byte of %s memory that warp %u, %s, %s, and no barrier%s orders the two",
        is_write ? "write" : "read", space, past.warp, lane, past_is_write ? "wrote" : "read",
        past.warp == me->warp->index ? " or __syncwarp()" : "");
}

inline void note_access(const Fiber* me, uint64_t pc, size_t offset, size_t size, bool is_write, bool is_atomic,
                        const char* space) {
  const Warp& warp = *me->warp;
  const uint32_t cluster = me->block->cluster->serial, now = warp.clocks[warp.index];
  const PastAccess mine{now, uint16_t(warp.index), uint8_t(me->lane), is_atomic};
  for (size_t i = offset; i < offset + size; ++i) {
    History& h = memory.history[i];
    if (h.cluster != cluster) h = History{cluster, {}, {}};
    if (!(is_atomic && h.write.atomic) && !ordered(h.write, warp, me->lane))
      report_race(me, pc, space, i, h.write, true, is_write);
    if (is_write) {
      for (const PastAccess& read : h.reads)
        if (!(is_atomic && read.atomic) && !ordered(read, warp, me->lane))
          report_race(me, pc, space, i, read, false, true);
      h.write = mine;
      h.reads[0] = h.reads[1] = PastAccess{};
    } else {
      PastAccess& last = h.reads[0];
      if (last.clock == 0) {
        last = mine;
      } else if (last.warp == mine.warp) {
        if (last.clock == now && last.lane != mine.lane)
          last.lane = kManyLanes, last.atomic &= mine.atomic;
        else
          last = mine;
      } else {
        h.reads[1] = last;
        last = mine;
      }
    }
  }
}

[[noreturn]] inline void report_state(const Fiber* me, uint64_t pc, const char* address, size_t size, Access access,
                                      size_t bad, uint8_t state) {
  launch->fault->address = uint64_t(address + bad);
  const bool shared = state & kShared;
  if (!(state & kAccessible))
    raise("out-of-bounds", me, pc, "%ss %zu bytes, of which byte %zu lies outside every buffer",
          access == Access::read ? "read" : "write", size, bad);
  if (access != Access::read && !(state & kWritable))
    raise("read-only", me, pc, "writes %zu bytes of memory that the kernel gets as const", size);
  raise(shared ? "uninitialised-shared" : "uninitialised-global", me, pc,
        "reads %zu bytes, of which nothing has written byte %zu", size, bad);
}

// One access by `me`, who may not be the current thread (collectives resolve for all their lanes).
inline void check_memory(const Fiber* me, uint64_t pc, const void* pointer, size_t size, Access access,
                         bool is_atomic = false) {
  const uintptr_t address = uintptr_t(pointer);
  if (stacks.contains(address)) return;  // local variables
  if (--launch->fuel == 0) check_time(pc);
  const Configuration& c = launch->configuration;

  size_t offset = address - uintptr_t(memory.arena);
  if (offset >= kArenaBytes) {
    const size_t in_static = address - c.static_begin;
    if (in_static < c.static_bytes) {
      offset = memory.offset(me->block->window) + in_static;
    } else {
      if (access == Access::read && address - c.image_begin < c.image_end - c.image_begin) return;  // constant tables
      launch->fault->address = address;
      raise("out-of-bounds", me, pc, "%ss %zu bytes at %#" PRIxPTR ", which is no memory of this kernel",
            access == Access::read ? "read" : "write", size, address);
    }
  }

  const bool is_write = access != Access::read;
  const uint8_t need = access == Access::read    ? kAccessible | kInitialised
                       : access == Access::write ? kAccessible | kWritable
                                                 : kAccessible | kInitialised | kWritable;
  uint8_t* shadow = memory.shadow + offset;
  for (size_t i = 0; i < size; ++i)
    if ((shadow[i] & need) != need) report_state(me, pc, static_cast<const char*>(pointer), size, access, i, shadow[i]);
  const bool shared = shadow[0] & kShared;
  if (shared) {
    const Cluster& cluster = *me->block->cluster;
    if (offset < cluster.windows_begin || offset >= cluster.windows_end) {
      launch->fault->address = address;
      raise("out-of-bounds", me, pc, "touches the shared memory of a block outside its cluster");
    }
  }
  if (is_write)
    for (size_t i = 0; i < size; ++i) shadow[i] |= kInitialised;
  if (c.check_races && shadow[0] & kWritable)
    note_access(me, pc, offset, size, is_write, is_atomic, shared ? "shared" : "global");
}

// A volatile access may be a spin on a flag: it does not race, but it gives no order either.
inline void volatile_access(uint64_t pc, const void* pointer, size_t size, Access access) {
  if (stacks.contains(uintptr_t(pointer))) return;
  Fiber* me = launch->current;
  me->pc = pc;
  if (access == Access::write)
    launch->idle_yields = 0;
  else if (++me->spins > 32)
    give_way(me);
  check_memory(me, pc, pointer, size, access, true);
}

// ---- what the compiler calls (-fsanitize=thread) ----

#define EMU_HOOK extern "C" __attribute__((visibility("default"))) void
#define EMU_ACCESS_HOOKS(N)                                                                                           \
  EMU_HOOK __tsan_read##N(const void* p) { check_memory(launch->current, EMU_CALLER, p, N, Access::read); }           \
  EMU_HOOK __tsan_write##N(const void* p) { check_memory(launch->current, EMU_CALLER, p, N, Access::write); }         \
  EMU_HOOK __tsan_unaligned_read##N(const void* p) { check_memory(launch->current, EMU_CALLER, p, N, Access::read); } \
  EMU_HOOK __tsan_unaligned_write##N(const void* p) {                                                                 \
    check_memory(launch->current, EMU_CALLER, p, N, Access::write);                                                   \
  }                                                                                                                   \
  EMU_HOOK __tsan_volatile_read##N(const void* p) { volatile_access(EMU_CALLER, p, N, Access::read); }                \
  EMU_HOOK __tsan_volatile_write##N(const void* p) { volatile_access(EMU_CALLER, p, N, Access::write); }

EMU_ACCESS_HOOKS(1)
EMU_ACCESS_HOOKS(2)
EMU_ACCESS_HOOKS(4)
EMU_ACCESS_HOOKS(8)
EMU_ACCESS_HOOKS(16)
EMU_HOOK __tsan_read_range(const void* p, size_t size) {
  check_memory(launch->current, EMU_CALLER, p, size, Access::read);
}
EMU_HOOK __tsan_write_range(const void* p, size_t size) {
  check_memory(launch->current, EMU_CALLER, p, size, Access::write);
}
EMU_HOOK __tsan_init() {}
EMU_HOOK __tsan_func_entry(void*) {}
EMU_HOOK __tsan_func_exit() {}

// ---- what the compiler calls (-fsanitize=alignment,bounds,shift-exponent) ----

struct SourceLocation {
  const char* file;
  uint32_t line, column;
};
struct TypeDescriptor {
  uint16_t kind, info;
  char name[1];
};

inline void locate(const SourceLocation& location) {
  if (location.file)
    snprintf(launch->fault->location, sizeof launch->fault->location, "%s:%u", location.file, location.line);
}

struct TypeMismatch {
  SourceLocation location;
  const TypeDescriptor* type;
  unsigned char log_alignment, check;
};
EMU_HOOK __ubsan_handle_type_mismatch_v1(TypeMismatch* data, uintptr_t address) {
  locate(data->location);
  launch->fault->address = address;
  raise("misaligned", launch->current, EMU_CALLER,
        "accesses %s, which needs %d-byte alignment, at an address %d past that", data->type->name,
        1 << data->log_alignment, int(address & ((1u << data->log_alignment) - 1)));
}
struct OutOfBounds {
  SourceLocation location;
  const TypeDescriptor *array, *index;
};
EMU_HOOK __ubsan_handle_out_of_bounds(OutOfBounds* data, uintptr_t index) {
  locate(data->location);
  raise("index", launch->current, EMU_CALLER, "index %lld into an array of type %s", (long long)index,
        data->array->name);
}
struct ShiftOutOfBounds {
  SourceLocation location;
  const TypeDescriptor *left, *right;
};
EMU_HOOK __ubsan_handle_shift_out_of_bounds(ShiftOutOfBounds* data, uintptr_t, uintptr_t amount) {
  locate(data->location);
  raise("shift", launch->current, EMU_CALLER, "shifts %s by %lld", data->left->name, (long long)amount);
}

// ---- accesses that wrappers announce themselves ----

static void require_alignment(const void* address, unsigned alignment, const char* what, uint64_t pc) {
  if (uintptr_t(address) % alignment == 0) return;
  launch->fault->address = uint64_t(address);
  raise("misaligned", launch->current, pc, "%s needs %u-byte alignment and gets an address %u past that", what,
        alignment, unsigned(uintptr_t(address) % alignment));
}

// Atomics order as if each were acquire and release: a missing fence is not found, and nothing is reported in vain.
uint64_t atomic_begin(const void* address, unsigned size, Access access, Scope scope) {
  Fiber* me = launch->current;
  me->pc = EMU_CALLER;
  require_alignment(address, size, "an atomic operation", me->pc);
  if (++me->spins > 32 || (launch->ready.is_random() && launch->ready.random() % 8 == 0)) give_way(me);

  // Shared memory is one variable a block, also while it lies at its place in the compiled file.
  const size_t in_static = uintptr_t(address) - launch->configuration.static_begin;
  const uintptr_t key =
      in_static < launch->configuration.static_bytes ? uintptr_t(me->block->window) + in_static : uintptr_t(address);
  AtomicVariable& variable = launch->atomics[key];
  const bool first = variable.clocks.empty() && !variable.narrow && !variable.many_blocks;
  if (!first && variable.block != me->block->linear) variable.many_blocks = true;
  if (first) variable.block = me->block->linear;
  variable.narrow |= scope == Scope::block;
  if (variable.narrow && variable.many_blocks)
    raise("scope", me, me->pc, "an atomic operation of block scope on what another block also changes");

  Clocks& clocks = variable.clocks[me->block->cluster->serial];
  clocks.resize(me->block->cluster->warp_count);
  if (access != Access::write) me->warp->learn(clocks);
  check_memory(me, me->pc, address, size, access, true);
  if (access != Access::read) {
    for (size_t i = 0; i < clocks.size(); ++i)
      if (me->warp->clocks[i] > clocks[i]) clocks[i] = me->warp->clocks[i];
    me->warp->tick();
  }
  uint64_t bits = 0;
  if (access != Access::write) memcpy(&bits, address, size);
  return bits;
}

void atomic_end(void* address, unsigned size, uint64_t bits) {
  if (memcmp(address, &bits, size) == 0) return;
  memcpy(address, &bits, size);
  launch->idle_yields = 0;  // something changed: whoever spins may go on
}

void fence(Scope) {}
void yield() {
  launch->current->pc = EMU_CALLER;
  give_way(launch->current);
}
void trap(const char* reason) { raise("trap", launch->current, EMU_CALLER, "%s", reason); }

}  // namespace emu
