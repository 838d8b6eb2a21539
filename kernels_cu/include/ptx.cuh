// One-instruction wrappers. Inline PTX and __CUDA_ARCH__ appear in this file and nowhere else; beside each instruction
// stands its meaning in plain C++, which is what the CPU emulator of the tests runs.
#pragma once

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

// 16 bytes that are read once: through the read-only path and not kept in L1.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-ld-global-nc
__device__ __forceinline__ uint4 load_once(const uint4* p) {
#ifdef __CUDA_ARCH__
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
#else
  return *p;
#endif
}

// c + sum of a.byte[b] * b.byte[b], a unsigned, b signed.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#integer-arithmetic-instructions-dp4a
__device__ __forceinline__ int dp4a_us(unsigned a, int b, int c) {
#ifdef __CUDA_ARCH__
  int d;
  asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
#else
  for (int i = 0; i < 4; ++i) c += int((a >> (8 * i)) & 255u) * int(static_cast<signed char>(unsigned(b) >> (8 * i)));
  return c;
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
