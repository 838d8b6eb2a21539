// The emulator's runtime: runs one launch at a time, deterministically, on the calling thread.
//
//   fiber.hpp        stacks and switching
//   memory.hpp       the arena, its shadow and its history
//   state.hpp        threads, warps, blocks, clusters
//   scheduler.hpp    who runs next; how a fault ends a launch
//   access.hpp       every load and store; atomics
//   barriers.hpp     blocks and clusters
//   collectives.hpp  warps: shuffles, votes, tensor cores; asynchronous copies
//   runtime.cpp      setting a launch up and taking it down
#include <csignal>
#include <algorithm>

#include "collectives.hpp"

namespace emu {

unsigned builtin(int which) { return launch->current->builtin[which]; }
void* dynamic_shared() { return launch->current->block->window + launch->configuration.static_bytes; }
unsigned dynamic_shared_size() { return launch->configuration.dynamic_shared; }

// ---- a thread's life ----

static void leave(Fiber* me) {
  Block& block = *me->block;
  Warp& warp = *me->warp;
  me->state = State::done;
  --block.alive;
  --launch->alive;
  launch->idle_yields = 0;
  warp.exited |= 1u << me->lane;
  for (int id = 0; id < 16; ++id)
    if (block.barriers[id].expected) check_reachable(me, block, block.barriers[id], id);
  for (unsigned rest = warp.waiting; rest; rest &= rest - 1) {
    const Fiber* other = warp.lanes[__builtin_ctz(rest)];
    if (other->mask >> me->lane & 1)
      raise("missing-lane", me, other->pc, "leaves the kernel while thread %s waits for it in %s with mask %#x",
            name_of(other).c_str(), name_of(other->collective), other->mask);
  }
  complete_cluster_phase(*block.cluster, nullptr);
  if (block.alive == 0) {  // its shared memory is gone: a late reader in the cluster is out of bounds
    const size_t begin = memory.offset(block.window);
    memset(memory.shadow + begin, 0, launch->configuration.static_bytes + launch->configuration.dynamic_shared);
  }
}

static void fiber_main() {
  launch->call(launch->arguments);
  leave(launch->current);
  run_next(launch->current);
  __builtin_unreachable();
}

// ---- deadlocks ----

[[noreturn]] static void report_deadlock() {
  const Fiber* at_barrier = nullptr;
  for (const Fiber& f : launch->fibers) {
    if (f.state == State::collective) {
      const unsigned missing = f.mask & ~f.warp->waiting;
      const Fiber* absent = f.warp->lanes[__builtin_ctz(missing)];
      raise("missing-lane", &f, f.pc,
            "waits in %s with mask %#x for lanes %#x, which never come: thread %s waits at a barrier",
            name_of(f.collective), f.mask, missing, name_of(absent).c_str());
    }
    if (f.state == State::barrier || f.state == State::cluster) at_barrier = &f;
  }
  const int id = at_barrier->barrier_id;
  if (at_barrier->state == State::cluster)
    raise("deadlock", at_barrier, at_barrier->pc, "waits at the cluster barrier for ever");
  const Barrier& barrier = at_barrier->block->barriers[id];
  raise("deadlock", at_barrier, at_barrier->pc,
        "waits at barrier %d, where %d of %d threads have arrived and no other can", id, barrier.arrived,
        barrier.expected);
}

// ---- signals: a fault that no check foresaw (a stack that overflows, a division by zero) ----

static void on_signal(int signal, siginfo_t* info, void*) {
  const Fiber* me = launch->current;
  if (signal == SIGFPE) raise("divide", me, me ? me->pc : 0, "divides an integer by zero");
  if (signal == SIGILL) raise("trap", me, me ? me->pc : 0, "runs into __builtin_unreachable() or __builtin_trap()");
  const bool stack = stacks.contains(uintptr_t(info->si_addr));
  raise("crash", me, me ? me->pc : 0, stack ? "the thread's stack overflows" : "memory access at %p", info->si_addr);
}

class Signals {
 public:
  Signals() : stack_(64 * 1024) {
    stack_t alternate{};
    alternate.ss_sp = stack_.data();
    alternate.ss_size = stack_.size();
    sigaltstack(&alternate, &old_stack_);
    struct sigaction action{};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    for (int i = 0; i < 4; ++i) sigaction(kSignals[i], &action, &old_[i]);
  }
  ~Signals() {
    for (int i = 0; i < 4; ++i) sigaction(kSignals[i], &old_[i], nullptr);
    sigaltstack(&old_stack_, nullptr);
  }

 private:
  static constexpr int kSignals[4] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL};
  std::vector<char> stack_;
  stack_t old_stack_{};
  struct sigaction old_[4];
};

// ---- one set of resident clusters, from start to end ----

static constexpr size_t kWindowGap = 1024;  // between windows: no access strays from one into the next

// Lays out the shared memory of a block, poisoned: reading a byte that no thread wrote is a fault.
static void lay_out_window(Block& block, size_t offset) {
  const Configuration& c = launch->configuration;
  const size_t bytes = c.static_bytes + c.dynamic_shared;
  const uint8_t fresh = kAccessible | kWritable | kShared;
  block.window = memory.arena + offset;
  memset(block.window, 0xcb, bytes);
  memset(memory.shadow + offset, 0, bytes + kWindowGap);
  for (unsigned i = 0; i < c.variable_count; ++i)
    memset(memory.shadow + offset + c.variables[2 * i], fresh, c.variables[2 * i + 1]);
  memset(memory.shadow + offset + c.static_bytes, fresh, c.dynamic_shared);
}

static void start_cluster(const std::vector<unsigned>& linear_blocks, size_t& window) {
  const Configuration& c = launch->configuration;
  auto owned = std::make_unique<Cluster>();
  Cluster& cluster = *owned;
  const int threads = int(c.block[0] * c.block[1] * c.block[2]);
  const size_t warps = size_t(threads + 31) / 32;
  const size_t stride = (c.static_bytes + c.dynamic_shared + 2 * kWindowGap) / kWindowGap * kWindowGap;
  cluster.serial = next_cluster_serial++;
  cluster.warp_count = warps * linear_blocks.size();
  cluster.blocks = std::vector<Block>(linear_blocks.size());
  cluster.windows_begin = window;
  for (size_t b = 0; b < linear_blocks.size(); ++b) {
    Block& block = cluster.blocks[b];
    block.cluster = &cluster;
    block.linear = linear_blocks[b];
    block.rank = unsigned(b);
    block.index[0] = block.linear % c.grid[0];
    block.index[1] = block.linear / c.grid[0] % c.grid[1];
    block.index[2] = block.linear / c.grid[0] / c.grid[1];
    block.threads = block.alive = threads;
    block.warps = std::vector<Warp>(warps);
    for (size_t w = 0; w < warps; ++w) {
      block.warps[w].block = &block;
      block.warps[w].index = unsigned(b * warps + w);
      block.warps[w].clocks.assign(cluster.warp_count, 0);
      block.warps[w].tick();
    }
    // dynamic shared memory starts at an odd multiple of 16: no kernel may count on more
    lay_out_window(block, window + (c.static_bytes % 32 ? 0 : 16));
    window += stride;
  }
  cluster.windows_end = window;
  launch->clusters.push_back(std::move(owned));
}

static void start_threads(Block& block, size_t& next_stack) {
  const Configuration& c = launch->configuration;
  for (int i = 0; i < block.threads; ++i) {
    Fiber& f = launch->fibers[next_stack];
    const unsigned t = unsigned(i);
    f.block = &block;
    f.warp = &block.warps[t / 32];
    f.lane = t % 32;
    f.warp->lanes[f.lane] = &f;
    f.warp->exists |= 1u << f.lane;
    const unsigned values[] = {t % c.block[0],
                               t / c.block[0] % c.block[1],
                               t / c.block[0] / c.block[1],
                               block.index[0],
                               block.index[1],
                               block.index[2],
                               c.block[0],
                               c.block[1],
                               c.block[2],
                               c.grid[0],
                               c.grid[1],
                               c.grid[2],
                               f.lane,
                               block.rank,
                               unsigned(block.cluster->blocks.size())};
    memcpy(f.builtin, values, sizeof values);
    make_context(f.context, stacks.bottom(next_stack), stacks.usable(next_stack), fiber_main);
    ++next_stack;
  }
}

static void run_clusters(const std::vector<std::vector<unsigned>>& clusters) {
  const Configuration& c = launch->configuration;
  const size_t threads = size_t(c.block[0]) * c.block[1] * c.block[2];
  size_t blocks = 0;
  for (const auto& cluster : clusters) blocks += cluster.size();
  launch->clusters.clear();
  launch->fibers = std::vector<Fiber>(blocks * threads);
  launch->alive = blocks * threads;
  launch->live = nullptr;
  stacks.reserve(launch->alive);

  size_t window = kGlobalBytes + kWindowGap, next_stack = 0;
  const size_t stride = c.static_bytes + c.dynamic_shared + 2 * kWindowGap;
  if (blocks * stride > kWindowBytes - 2 * kWindowGap)
    raise("resources", nullptr, 0, "%zu resident blocks need more shared memory than the emulator has", blocks);
  for (const auto& cluster : clusters) start_cluster(cluster, window);
  for (auto& cluster : launch->clusters)
    for (Block& block : cluster->blocks) start_threads(block, next_stack);
  launch->ready.reset(launch->alive, c.order, c.seed + clusters[0][0]);
  for (size_t i = 0; i < launch->alive; ++i)
    launch->ready.push(&launch->fibers[c.order == 1 ? launch->alive - 1 - i : i]);

  Fiber* first = launch->ready.pop();
  bring_in(first->block);
  launch->current = first;
  switch_context(launch->scheduler, first->context);
  if (launch->alive) report_deadlock();
}

// The blocks of a grid as clusters, in the launch's order; a cooperative launch has them all resident at once.
static void run_grid() {
  const Configuration& c = launch->configuration;
  const unsigned* k = c.cluster;
  const unsigned across[3] = {c.grid[0] / k[0], c.grid[1] / k[1], c.grid[2] / k[2]};
  std::vector<std::vector<unsigned>> clusters(size_t(across[0]) * across[1] * across[2]);
  for (unsigned i = 0; i < clusters.size(); ++i) {
    const unsigned x = i % across[0], y = i / across[0] % across[1], z = i / across[0] / across[1];
    for (unsigned r = 0; r < k[0] * k[1] * k[2]; ++r) {
      const unsigned bx = x * k[0] + r % k[0], by = y * k[1] + r / k[0] % k[1], bz = z * k[2] + r / k[0] / k[1];
      clusters[i].push_back((bz * c.grid[1] + by) * c.grid[0] + bx);
    }
  }
  if (c.order == 1) std::reverse(clusters.begin(), clusters.end());
  if (c.order == 2) {
    launch->ready.reset(1, 2, c.seed);
    for (size_t i = clusters.size(); i > 1; --i) std::swap(clusters[i - 1], clusters[launch->ready.random() % i]);
  }
  if (c.cooperative)
    run_clusters(clusters);
  else
    for (auto& cluster : clusters) run_clusters({cluster});
}

}  // namespace emu

// ---- what Python calls ----

#define EMU_EXPORT extern "C" __attribute__((visibility("default")))

EMU_EXPORT void* emu_arena() { return emu::memory.arena; }
EMU_EXPORT void* emu_shadow() { return emu::memory.shadow; }
EMU_EXPORT uint64_t emu_global_bytes() { return emu::kGlobalBytes; }

// Returns 0, or 1 with *fault filled.
EMU_EXPORT int emu_launch(const emu::Entry* entry, const emu::Configuration* configuration, void** arguments,
                          emu::Fault* fault) {
  emu::Launch launch;
  launch.configuration = *configuration;
  launch.call = entry->call;
  launch.arguments = arguments;
  launch.fault = fault;
  launch.fuel = 1u << 20;
  launch.deadline = std::chrono::steady_clock::now() + std::chrono::microseconds(int64_t(configuration->timeout * 1e6));
  emu::launch = &launch;
  const emu::FlushToZero flush;
  const emu::Signals signals;
  int failed = 0;
  if (sigsetjmp(launch.escape, 0) == 0)
    emu::run_grid();
  else
    failed = 1;
  emu::launch = nullptr;
  return failed;
}
