// int8 activations for ternary_matmul.cu, with or without RMSNorm in front, one block a token. For many tokens it is
// cheaper to normalise and quantise each token once than in every block of the product.
//
// Macros: X_T (float, __half, __nv_bfloat16), NORM, THREADS, KERNEL_NAME.
#include "token_scale.cuh"

#if !defined(X_T) || !defined(NORM) || !defined(THREADS) || !defined(KERNEL_NAME)
#error "rmsnorm_quantise.cu needs X_T, NORM, THREADS and KERNEL_NAME"
#endif

template <typename X, bool kNorm, int kThreads>
__device__ __forceinline__ void quantise(const X* x, const Gamma<X>& gamma, int* q, float* dequant, int K, int N,
                                         float eps) {
  const bool aligned = rows_aligned(x, K);
  const int width = (K + 63) / 64 * 64;
  for (int n = blockIdx.x; n < N; n += gridDim.x) {
    TokenScale scale;
    Held<X, 0> held;
    token_scales<kNorm, true, 1, kThreads>(&scale, held, x, gamma, n, N, K, eps, aligned);
    const X* row = x + (long long)n * K;
    for (int k = 4 * threadIdx.x; k < width; k += 4 * kThreads) {
      float4 v = load4_or_zero(row, k, K, aligned) * scale.pre;
      if (kNorm) v = v * gamma.at(k, K);
      q[((long long)n * width + k) / 4] = quantise4(v, scale.factor);
    }
    if (threadIdx.x == 0) dequant[n] = scale.dequant;
    __syncthreads();  // the reduction's shared memory is free again
  }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    KERNEL_NAME(const X_T* __restrict__ x,       // [N, K]
                const void* __restrict__ gamma,  // [K], float32 or x's dtype; null without NORM
                int gamma_is_float32,            //
                int* __restrict__ q,             // int8 [N, ceil(K / 64) * 64], zero beyond K
                float* __restrict__ dequant,     // [N]: the value is about q * dequant; NaN for a token not finite
                int K, int N, float eps) {
  quantise<X_T, NORM, THREADS>(x, Gamma<X_T>(gamma, gamma_is_float32, K), q, dequant, K, N, eps);
}
