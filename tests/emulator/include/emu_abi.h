// What a kernel compiled for the emulator calls, and what the runtime (../runtime) provides.
// Nothing here knows a kernel; nothing here is instrumented.
#pragma once
#include <cstddef>
#include <cstdint>

#pragma GCC visibility push(default)
namespace emu {

// ---- one launchable kernel, exported by the compiled file as `emu_entry_<KERNEL_NAME>`; Python reads it ----

struct Parameter {
  char kind;         // p pointer, i signed, u unsigned, f floating, s anything else
  char element;      // of a pointer: the kind of what it points at (also h half, b bfloat16, v void)
  uint8_t is_const;  // of a pointer: to const
  uint8_t unused;
  uint32_t size;          // bytes of the parameter itself
  uint32_t element_size;  // bytes of what a pointer points at
};

struct Entry {
  void (*call)(void** arguments);
  const Parameter* parameters;
  uint32_t parameter_count;
};

// ---- where am I: constant within a thread, so calls may be merged and moved ----

enum Builtin { kThreadIdx = 0, kBlockIdx = 3, kBlockDim = 6, kGridDim = 9, kLane = 12, kClusterRank, kClusterSize };
__attribute__((const)) unsigned builtin(int which);

// ---- shared memory ----

void* dynamic_shared();  // 16-byte aligned, never more
unsigned dynamic_shared_size();
void* map_shared_rank_bytes(const void* shared, unsigned rank);  // mapa: the same variable in another block

// ---- barriers ----

enum class Predicate { none, count, all, any };
int barrier(int id, int threads, int predicate, Predicate kind);  // bar.red: threads == 0 means the whole block
void barrier_arrive(int id, int threads);                         // bar.arrive
void cluster_arrive();                                            // barrier.cluster.arrive
void cluster_wait();                                              // barrier.cluster.wait

// ---- warp collectives: every lane of `mask` calls with the same mask ----

enum class Reduction { add, min_s, max_s, min_u, max_u, and_, or_, xor_ };
void sync_warp(unsigned mask);
uint64_t shuffle(unsigned mask, uint64_t bits, unsigned source_lane);
unsigned ballot(unsigned mask, bool predicate);
unsigned reduce(unsigned mask, unsigned value, Reduction operation);
unsigned match_any(unsigned mask, uint64_t bits);
unsigned active_mask();

// ---- tensor-core instructions, whole warps ----

enum class Mma { f16, bf16, s8, u8s8, s8u8, u8 };  // what A and B hold (A first)
// a, b: 32-bit fragment registers; the shape follows from their count: K = (4 or 8 or 16 ...) * b_registers.
void mma(Mma type, void* d, const uint32_t* a, int a_registers, const uint32_t* b, int b_registers, const void* c);
void load_matrix(uint32_t* registers, int count, bool transposed, const void* row);  // ldmatrix .x1/.x2/.x4

// ---- asynchronous copies: really deferred, so that a missing wait is seen ----

void async_copy(void* shared, const void* global, int bytes, int source_bytes);
void async_commit();
void async_wait_group(int pending_groups_allowed);
void async_wait_all();

// ---- memory order ----

enum class Scope { block, cluster, gpu, system };
enum class Access { read, write, update };
uint64_t atomic_begin(const void* address, unsigned size, Access access, Scope scope);  // the bits found there
void atomic_end(void* address, unsigned size, uint64_t bits);                           // the bits to leave there
void fence(Scope scope);
void yield();  // __nanosleep: let the others run
[[noreturn]] void trap(const char* reason);

}  // namespace emu
#pragma GCC visibility pop
