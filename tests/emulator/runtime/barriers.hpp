// Barriers of a block (bar.sync, bar.arrive, bar.red) and of a cluster.
#pragma once
#include "access.hpp"

namespace emu {

// Makes the warps know one another's past, and advances them: what comes now comes after.
inline void synchronise(const std::vector<Fiber*>& fibers, Clocks& together) {
  Warp* last = nullptr;
  for (const Fiber* f : fibers) {
    if (f->warp == last) continue;
    last = f->warp;
    for (size_t i = 0; i < together.size(); ++i)
      if (last->clocks[i] > together[i]) together[i] = last->clocks[i];
  }
  last = nullptr;
  for (const Fiber* f : fibers) {
    if (f->warp == last) continue;
    last = f->warp;
    last->learn(together);
    last->tick();
  }
}

// Can the barrier still be completed by threads that have not left?
inline void check_reachable(const Fiber* me, const Block& block, const Barrier& barrier, int id) {
  const int others = block.alive - int(barrier.waiting.size());  // (those that only arrived may come again)
  if (barrier.expected - barrier.arrived <= others) return;
  const Fiber* waiting = barrier.waiting.empty() ? me : barrier.waiting[0];
  raise("left-before-barrier", me, waiting->pc, "%s barrier %d, which needs %d threads; thread %s waits there",
        me->state == State::done ? "leaves the kernel without passing" : "comes, after others have left the kernel, to",
        id, barrier.expected, name_of(waiting).c_str());
}

inline void complete(Block& block, Barrier& barrier, Fiber* me) {
  int count = 0;
  for (const Fiber* f : barrier.waiting) count += f->predicate;
  barrier.clocks.resize(block.cluster->warp_count);
  synchronise(barrier.waiting, barrier.clocks);
  for (Fiber* f : barrier.waiting) {
    f->barrier_result = barrier.kind == Predicate::count ? count
                        : barrier.kind == Predicate::all ? count == int(barrier.waiting.size())
                                                         : count > 0;
    if (f != me) wake(f);
  }
  if (me) me->state = State::ready;
  barrier.waiting.clear();
  barrier.clocks.clear();
  barrier.expected = barrier.arrived = 0;
}

// A thread comes to a barrier; true when it was the last one that was missing.
inline bool arrive(Fiber* me, int id, int threads, Predicate kind) {
  Block& block = *me->block;
  if (id < 0 || id > 15) raise("barrier", me, me->pc, "there are barriers 0 to 15, not %d", id);
  if (threads && threads % 32)
    raise("barrier", me, me->pc, "bar.sync of %d threads: not a multiple of a warp", threads);
  if (threads == 0) threads = block.threads;
  if (threads > block.threads)
    raise("barrier", me, me->pc, "barrier %d for %d threads in a block of %d", id, threads, block.threads);
  Barrier& barrier = block.barriers[id];
  if (barrier.expected && (barrier.expected != threads || barrier.kind != kind))
    raise("barrier", me, me->pc, "threads come to barrier %d with different counts (%d, %d) or operations", id,
          barrier.expected, threads);
  barrier.expected = threads;
  barrier.kind = kind;
  ++barrier.arrived;
  return barrier.arrived == threads;
}

int barrier(int id, int threads, int predicate, Predicate kind) {
  Fiber* me = launch->current;
  me->pc = EMU_CALLER;
  const bool last = arrive(me, id, threads, kind);
  Block& block = *me->block;
  Barrier& barrier = block.barriers[id];
  me->state = State::barrier;
  me->barrier_id = id;
  me->predicate = predicate != 0;
  barrier.waiting.push_back(me);
  if (last) {
    complete(block, barrier, me);
    maybe_step_aside();
  } else {
    check_reachable(me, block, barrier, id);
    run_next(me);
  }
  return me->barrier_result;
}

void barrier_arrive(int id, int threads) {
  Fiber* me = launch->current;
  me->pc = EMU_CALLER;
  const bool last = arrive(me, id, threads, Predicate::none);
  Barrier& barrier = me->block->barriers[id];
  barrier.clocks.resize(me->block->cluster->warp_count);
  for (size_t i = 0; i < barrier.clocks.size(); ++i)
    if (me->warp->clocks[i] > barrier.clocks[i]) barrier.clocks[i] = me->warp->clocks[i];
  me->warp->tick();
  if (last) complete(*me->block, barrier, nullptr);
}

// ---- clusters: threads that have left count as arrived, as the PTX manual has it ----

inline void complete_cluster_phase(Cluster& cluster, Fiber* me) {
  int alive = 0;
  for (const Block& block : cluster.blocks) alive += block.alive;
  if (alive == 0 || cluster.arrived < alive) return;
  cluster.arrived = 0;
  ++cluster.phase;
  cluster.phase_clocks = cluster.arrived_clocks;
  launch->idle_yields = 0;
  for (Block& block : cluster.blocks)
    for (Warp& warp : block.warps)
      for (Fiber* f : warp.lanes)
        if (f && f != me && f->state == State::cluster) wake(f);
}

void cluster_arrive() {
  Fiber* me = launch->current;
  me->pc = EMU_CALLER;
  Cluster& cluster = *me->block->cluster;
  if (me->cluster_arrived) raise("barrier", me, me->pc, "arrives at the cluster barrier twice without a wait");
  me->cluster_arrived = true;
  me->cluster_phase = cluster.phase;
  cluster.arrived_clocks.resize(cluster.warp_count);
  for (size_t i = 0; i < cluster.warp_count; ++i)
    if (me->warp->clocks[i] > cluster.arrived_clocks[i]) cluster.arrived_clocks[i] = me->warp->clocks[i];
  me->warp->tick();
  ++cluster.arrived;
  complete_cluster_phase(cluster, me);
}

void cluster_wait() {
  Fiber* me = launch->current;
  me->pc = EMU_CALLER;
  Cluster& cluster = *me->block->cluster;
  if (!me->cluster_arrived) raise("barrier", me, me->pc, "waits at the cluster barrier without having arrived");
  if (cluster.phase == me->cluster_phase) {
    me->state = State::cluster;
    run_next(me);
  }
  me->cluster_arrived = false;
  me->warp->learn(cluster.phase_clocks);
  me->warp->tick();
}

void* map_shared_rank_bytes(const void* shared, unsigned rank) {
  Fiber* me = launch->current;
  me->pc = EMU_CALLER;
  Cluster& cluster = *me->block->cluster;
  if (rank >= cluster.blocks.size())
    raise("out-of-bounds", me, me->pc, "mapa to rank %u of a cluster of %zu blocks", rank, cluster.blocks.size());
  const Configuration& c = launch->configuration;
  const size_t in_static = uintptr_t(shared) - c.static_begin;
  const bool is_static = in_static < c.static_bytes;
  if (rank == me->block->rank && is_static) return const_cast<void*>(shared);
  const size_t offset = is_static ? in_static : size_t(static_cast<const char*>(shared) - me->block->window);
  return cluster.blocks[rank].window + offset;
}

}  // namespace emu
