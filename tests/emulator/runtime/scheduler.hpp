// The launch in progress: which thread runs, which may run next, and how a fault ends it all.
#pragma once
#include <chrono>
#include <cstring>

#include "state.hpp"

namespace emu {

// Threads that can go on. The order of a launch decides who is next: that order must not matter to a kernel.
class ReadyQueue {
 public:
  void reset(size_t capacity, int order, uint64_t seed) {
    ring_.assign(capacity + 1, nullptr);
    head_ = size_ = 0;
    random_ = order == 2;
    seed_ = seed;
  }
  void push(Fiber* fiber) { ring_[(head_ + size_++) % ring_.size()] = fiber; }
  Fiber* pop() {
    if (size_ == 0) return nullptr;
    if (random_) std::swap(ring_[head_], ring_[(head_ + random() % size_) % ring_.size()]);
    Fiber* fiber = ring_[head_];
    head_ = (head_ + 1) % ring_.size();
    --size_;
    return fiber;
  }
  bool is_random() const { return random_; }
  uint64_t random() {  // splitmix64
    uint64_t z = seed_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }

 private:
  std::vector<Fiber*> ring_;
  size_t head_ = 0, size_ = 0;
  bool random_ = false;
  uint64_t seed_ = 0;
};

struct Launch {
  Configuration configuration;
  void (*call)(void**);
  void** arguments;

  std::vector<std::unique_ptr<Cluster>> clusters;  // resident now
  std::vector<Fiber> fibers;
  size_t alive = 0;
  ReadyQueue ready;
  Fiber* current = nullptr;
  Block* live = nullptr;  // whose static shared memory lies at configuration.static_begin
  unsigned idle_yields = 0;
  uint32_t fuel = 0;  // accesses until the clock is looked at
  std::chrono::steady_clock::time_point deadline;
  std::unordered_map<uintptr_t, AtomicVariable> atomics;

  Context scheduler;
  sigjmp_buf escape;
  Fault* fault;
};

inline Memory memory;
inline Stacks stacks;
inline Launch* launch = nullptr;
inline uint32_t next_cluster_serial = 1;

// Where in the kernel the runtime was called from.
#define EMU_CALLER (uint64_t(__builtin_return_address(0)))

// Ends the launch: records the fault and leaves every fiber where it stands.
[[noreturn]] __attribute__((format(printf, 4, 5))) inline void raise(const char* kind, const Fiber* fiber, uint64_t pc,
                                                                     const char* format, ...) {
  Fault& fault = *launch->fault;
  snprintf(fault.kind, sizeof fault.kind, "%s", kind);
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(fault.message, sizeof fault.message, format, arguments);
  va_end(arguments);
  fault.has_thread = fiber != nullptr;
  fault.pc = pc;
  if (fiber) {
    memcpy(fault.block, fiber->builtin + kBlockIdx, sizeof fault.block);
    memcpy(fault.thread, fiber->builtin + kThreadIdx, sizeof fault.thread);
  }
  siglongjmp(launch->escape, 1);
}

// "(3,0,0)" of a thread; of one other than the current, mostly.
inline std::string name_of(const Fiber* f) {
  char text[48];
  snprintf(text, sizeof text, "(%u,%u,%u)", f->builtin[0], f->builtin[1], f->builtin[2]);
  return text;
}

inline void check_time(uint64_t pc) {
  launch->fuel = 1u << 20;
  if (std::chrono::steady_clock::now() > launch->deadline)
    raise("timeout", launch->current, pc, "the launch ran longer than %g s", launch->configuration.timeout);
}

// Static shared memory is one copy in the compiled file. With several resident blocks each has its own in its
// window, and the copy changes hands when another block's thread runs.
inline void bring_in(Block* block) {
  if (launch->live == block) return;
  void* place = reinterpret_cast<void*>(launch->configuration.static_begin);
  const size_t bytes = launch->configuration.static_bytes;
  if (bytes) {
    if (launch->live) memcpy(launch->live->window, place, bytes);
    memcpy(place, block->window, bytes);
  }
  launch->live = block;
}

// Gives the processor to the next thread that can run, or to the scheduler when there is none.
inline void run_next(Fiber* from) {
  Fiber* to = launch->ready.pop();
  if (to == from) return;
  if (!to) {
    switch_context(from->context, launch->scheduler);
  } else {
    bring_in(to->block);
    launch->current = to;
    switch_context(from->context, to->context);
  }
}

inline void wake(Fiber* fiber) {
  fiber->state = State::ready;
  launch->ready.push(fiber);
}

// After the current thread completed a barrier or collective: on a random schedule it may fall behind the others.
inline void maybe_step_aside() {
  launch->idle_yields = 0;
  if (launch->ready.is_random() && launch->ready.random() % 2) {
    launch->ready.push(launch->current);
    run_next(launch->current);
  }
}

inline void give_way(Fiber* me) {
  me->spins = 0;
  if (++launch->idle_yields > 200000 + 500 * launch->alive)
    raise("livelock", me, me->pc, "threads only spin: what they wait for never comes%s",
          launch->configuration.cooperative ? "" : " (the launch is not cooperative: one cluster runs at a time)");
  if (launch->idle_yields % 4096 == 0) check_time(me->pc);
  launch->ready.push(me);
  run_next(me);
}

}  // namespace emu
