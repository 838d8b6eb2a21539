// One-instruction wrappers. Inline PTX and __CUDA_ARCH__ appear in this file and cluster.cuh and nowhere else; beside each instruction
// stands its meaning in plain C++, which is what the CPU emulator of the tests runs.
#pragma once
#include <cuda_fp16.h>

// Dynamic shared memory of the block, 16-byte aligned.
template <typename T>
__device__ __forceinline__ T* dynamic_shared() {
#ifdef EDGELLM_EMULATOR
  return reinterpret_cast<T*>(emu::dynamic_shared());
#else
  extern __shared__ __align__(16) unsigned char edgellm_dynamic_shared[];
  return reinterpret_cast<T*>(edgellm_dynamic_shared);
#endif
}

// 16 bytes that are read once: not kept in L1. A plain load, not one of the read-only path (ld.global.nc): ptxas moves those
// below griddepcontrol.wait, and the weights then come after the activations instead of before them.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-ld
__device__ __forceinline__ uint4 load_once(const uint4* p) {
#ifdef __CUDA_ARCH__
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
#else
  return *p;
#endif
}

// Maximum over the 32 lanes, in every lane. sm_80 and newer have one instruction for it.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#parallel-synchronization-and-communication-instructions-redux-sync
__device__ __forceinline__ unsigned warp_max(unsigned v) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  return __reduce_max_sync(0xffffffffu, v);
#else
#pragma unroll
  for (int d = 16; d; d >>= 1) v = max(v, __shfl_xor_sync(0xffffffffu, v, d));
  return v;
#endif
}

// Sum over the 32 lanes, in every lane.
__device__ __forceinline__ int warp_sum(int v) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  return __reduce_add_sync(0xffffffffu, v);
#else
#pragma unroll
  for (int d = 16; d; d >>= 1) v += __shfl_xor_sync(0xffffffffu, v, d);
  return v;
#endif
}

// Barrier `id` (1 to 15; 0 is that of __syncthreads) of `threads` threads, whole warps.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#parallel-synchronization-and-communication-instructions-bar
__device__ __forceinline__ void barrier(int id, int threads) {
#ifdef __CUDA_ARCH__
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#else
  emu::barrier_sync(id, threads);
#endif
}

// Programmatic dependent launch (sm_90 and newer; without it, or without the launch attribute, both do nothing).
// A kernel may start while its predecessor in the stream still runs. Until `wait_for_previous_kernels` it may only touch
// what neither that predecessor nor a kernel beside it writes: packed weights and their scales, or what is older. All writes of
// all earlier kernels are visible behind the wait. Every kernel that is launched so lets the next one start behind its own
// wait, never before it: so when a kernel starts, all kernels but its predecessor have ended. (One ahead is enough; more of them
// crowd the multiprocessors. Blocks without work may leave at once, as long as one of the kernel waits.)
// https://docs.nvidia.com/cuda/parallel-thread-execution/#parallel-synchronization-and-communication-instructions-griddepcontrol
__device__ __forceinline__ void wait_for_previous_kernels() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void let_next_kernel_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// a * b + c on two float16.
__device__ __forceinline__ unsigned fma_f16x2(unsigned a, unsigned b, unsigned c) {
#ifdef __CUDA_ARCH__
  unsigned d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
#else
  const __half2 d = __hfma2(reinterpret_cast<const __half2&>(a), reinterpret_cast<const __half2&>(b),
                            reinterpret_cast<const __half2&>(c));
  return reinterpret_cast<const unsigned&>(d);
#endif
}

// sums [16 x 8] += a [16 x 32] b [32 x 8] over one warp: a unsigned, b signed bytes. Lane 4 g + q has in a[0], a[1] rows g
// and g + 8, k = 4 q .. 4 q + 3, in a[2], a[3] the same at k + 16; in b[0], b[1] column g at the same two k; in sums rows
// g (first two) and g + 8, columns 2 q and 2 q + 1.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#warp-level-matrix-instructions-mma
__device__ __forceinline__ void mma_u8s8(int (&sums)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
#ifndef __CUDA_ARCH__
  emu::mma_m16n8k32_s8(sums, a, {b0, b1}, sums, emu::Mma::u8s8);
#elif __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else  // the same in quarters of 8 x 16
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    asm("mma.sync.aligned.m8n8k16.row.col.s32.u8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
        : "+r"(sums[i % 2 * 2]), "+r"(sums[i % 2 * 2 + 1])
        : "r"(a[i]), "r"(i < 2 ? b0 : b1));
  }
#endif
}

// sums [16 x 8] += a [16 x 16] b [16 x 8] over one warp, float16 with float32 sums. Lane 4 g + q has in a[0], a[1] rows g
// and g + 8, k = 2 q and 2 q + 1, in a[2], a[3] the same at k + 8; b and sums as above.
__device__ __forceinline__ void mma_f16(float (&sums)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
#ifndef __CUDA_ARCH__
  emu::mma_m16n8k16_f16(sums, a, {b0, b1}, sums);
#elif __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else  // the same in halves of 8 k
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[2 * i]), "r"(a[2 * i + 1]), "r"(i ? b1 : b0));
  }
#endif
}

// The same with bfloat16; sm_80 and newer (dispatch keeps it from others).
__device__ __forceinline__ void mma_bf16(float (&sums)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
#ifndef __CUDA_ARCH__
  emu::mma_m16n8k16_bf16(sums, a, {b0, b1}, sums);
#elif __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  __trap();
#endif
}

// Four matrices of 8 x 8 16-bit elements from shared memory: lane 8 j + r points at row r (16 bytes) of matrix j. Lane
// 4 g + q receives in matrices[j] the elements 2 q and 2 q + 1 of row g, or transposed: of column g. The lanes read what
// others wrote: volatile and a clobber keep the loads behind the barrier.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#warp-level-matrix-instructions-ldmatrix
__device__ __forceinline__ void load_matrices(unsigned (&matrices)[4], const void* row) {
#ifdef __CUDA_ARCH__
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"((unsigned)__cvta_generic_to_shared(row))
               : "memory");
#else
  emu::ldmatrix<4>(matrices, row);
#endif
}
__device__ __forceinline__ void load_matrices_transposed(unsigned (&matrices)[4], const void* row) {
#ifdef __CUDA_ARCH__
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"((unsigned)__cvta_generic_to_shared(row))
               : "memory");
#else
  emu::ldmatrix<4, true>(matrices, row);
#endif
}

// 16 bytes from global to shared memory in the background: zeros when not `valid`. commit_copies() closes a group;
// wait_for_copies<P>() returns when all but the last P groups of this thread are there.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-cp-async
__device__ __forceinline__ void copy_async16(void* shared, const void* global, bool valid) {
#ifndef __CUDA_ARCH__
  emu::cp_async<16>(shared, global, valid ? 16 : 0);
#elif __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"((unsigned)__cvta_generic_to_shared(shared)),
               "l"(global), "r"(valid ? 16 : 0)
               : "memory");
#else
  *static_cast<uint4*>(shared) = valid ? *static_cast<const uint4*>(global) : make_uint4(0u, 0u, 0u, 0u);
#endif
}
__device__ __forceinline__ void commit_copies() {
#ifndef __CUDA_ARCH__
  emu::cp_async_commit();
#elif __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
#ifndef __CUDA_ARCH__
  emu::cp_async_wait_group<kPending>();
#elif __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}
