// y = x / sqrt(mean(x^2) + eps) * gamma, one block a token. The second pass over the token hits L1 or L2.
// Bound: latency for one token, reading x and writing y for many.
//
// Macros: X_T (float, __half, __nv_bfloat16), THREADS, KERNEL_NAME.
#include "token_scale.cuh"

#if !defined(X_T) || !defined(THREADS) || !defined(KERNEL_NAME)
#error "rmsnorm.cu needs X_T, THREADS and KERNEL_NAME"
#endif

template <typename X, int kThreads>
__device__ __forceinline__ void rmsnorm(const X* x, const Gamma<X>& gamma, void* y, int y_dtype, int K, int N,
                                        float eps) {
  const bool aligned = rows_aligned(x, K);
  for (int n = blockIdx.x; n < N; n += gridDim.x) {
    const X* row = x + (long long)n * K;
    Held<X, 0> held;
    const TokenScale scale = token_scale<true, false, 1, kThreads>(held, row, gamma, TokenLength(K), eps, aligned);
    const float r = scale.dequant * scale.factor;
    for (int k = 4 * threadIdx.x; k < K; k += 4 * kThreads) {
      const float4 v = ((load4_or_zero(row, k, K, aligned) * scale.pre) * r) * gamma.at(k, K);
      const long long at = (long long)n * K + k;
      store_as(y, at, v.x, y_dtype);
      if (k + 1 < K) store_as(y, at + 1, v.y, y_dtype);
      if (k + 2 < K) store_as(y, at + 2, v.z, y_dtype);
      if (k + 3 < K) store_as(y, at + 3, v.w, y_dtype);
    }
    __syncthreads();  // the reduction's shared memory is free again
  }
}

extern "C" __global__ void __launch_bounds__(THREADS) KERNEL_NAME(const X_T* x,          // [N, K]
                                                                  const void* gamma,     // [K], float32 or x's dtype
                                                                  int gamma_is_float32,  //
                                                                  void* y,               // [N, K]
                                                                  int y_dtype,  // 0 float16, 1 bfloat16, 2 float32
                                                                  int K, int N, float eps) {
  wait_for_previous_kernels();
  let_next_kernel_start();
  rmsnorm<X_T, THREADS>(x, Gamma<X_T>(gamma, gamma_is_float32, K), y, y_dtype, K, N, eps);
}
