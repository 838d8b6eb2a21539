// Thread-block clusters, of sm_90 and newer; dispatch keeps them from others.
//
// Blocks send each other floats, which land in the receiver's shared memory. A word tells by itself whether it has
// come, so no barrier and no fence stands between sender and receiver (the release of a cluster barrier is a fence for
// the whole GPU). Before: every block fills its words with kNotSent and arrives, and waits before it sends. A block
// that has received all that is sent to it may leave.
#pragma once

// Barrier of all threads of a cluster, in two halves: what they wrote before they arrived is visible behind their
// waits.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#parallel-synchronization-and-communication-instructions-barrier-cluster
__device__ __forceinline__ void cluster_arrive() {
#ifndef __CUDA_ARCH__
  emu::cluster_arrive();
#elif __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#else
  __trap();
#endif
}
__device__ __forceinline__ void cluster_wait() {
#ifndef __CUDA_ARCH__
  emu::cluster_wait();
#elif __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

constexpr int kNotSent = -1;  // the bits: a NaN that no instruction makes

__device__ __forceinline__ bool has_come(float v) {
  return __float_as_int(v) != kNotSent;
}

// To the same word in block `rank` of the cluster.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-mapa
// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-st
__device__ __forceinline__ void send_to_block(float* shared, unsigned rank, float v) {
  if (!has_come(v)) v = __int_as_float(0x7fffffff);  // a NaN that came from memory
#ifndef __CUDA_ARCH__
  emu::store(emu::map_shared_rank(shared, rank), v, emu::Scope::cluster);
#elif __CUDA_ARCH__ >= 900
  unsigned to;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(to) : "r"((unsigned)__cvta_generic_to_shared(shared)), "r"(rank));
  asm volatile("st.relaxed.cluster.shared::cluster.f32 [%0], %1;" ::"r"(to), "f"(v) : "memory");
#endif
}

// A word of this block, whether it has come or not.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-ld
__device__ __forceinline__ float peek(const float* shared) {
#ifndef __CUDA_ARCH__
  return emu::load(shared, emu::Scope::cluster);
#elif __CUDA_ARCH__ >= 900
  float v;
  asm volatile("ld.relaxed.cluster.shared::cta.f32 %0, [%1];"
               : "=f"(v)
               : "r"((unsigned)__cvta_generic_to_shared(shared))
               : "memory");
  return v;
#else
  return *shared;
#endif
}
