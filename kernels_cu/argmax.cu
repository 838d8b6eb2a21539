// best[n] = the largest logit of token n and its index, as one 64-bit key that atomicMax can order: the float's bits made
// monotone in the upper half, the inverted index in the lower, so that among equals the lowest index wins.
// -0 + 0 is 0: the two are equals. next_token.cu reads the key and clears it. Bound: reading the logits from L2.
//
// Macros: THREADS, KERNEL_NAME.
#include "ptx.cuh"

#if !defined(THREADS) || !defined(KERNEL_NAME)
#error "argmax.cu needs THREADS and KERNEL_NAME"
#endif

__device__ __forceinline__ unsigned long long logit_key(float logit, unsigned index) {
  const unsigned bits = unsigned(__float_as_int(logit));
  const unsigned ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return (unsigned long long)ordered << 32 | ~index;
}

extern "C" __global__ void __launch_bounds__(THREADS)
    KERNEL_NAME(const float* logits,       // [N, V]
                unsigned long long* best,  // [N], zero before the launch
                int V) {                   // grid: (blocks over V, N)
  let_next_kernel_start();
  wait_for_previous_kernels();
  __shared__ unsigned long long warp_best[THREADS / 32];
  unsigned long long key = 0ull;
  for (int v = blockIdx.x * THREADS + threadIdx.x; v < V; v += gridDim.x * THREADS) {
    key = max(key, logit_key(logits[(long long)blockIdx.y * V + v] + 0.f, v));
  }
#pragma unroll
  for (int d = 16; d; d >>= 1) key = max(key, __shfl_xor_sync(0xffffffffu, key, d));
  if (threadIdx.x % 32 == 0) warp_best[threadIdx.x / 32] = key;
  __syncthreads();
  if (threadIdx.x == 0) {
#pragma unroll
    for (int w = 1; w < THREADS / 32; ++w) key = max(key, warp_best[w]);
    atomicMax(best + blockIdx.y, key);
  }
}
