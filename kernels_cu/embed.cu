// x[n, :] = values[id[n], :] (* scale[id[n]]): rows of the embedding, one block a token; and the token is noted as seen by its
// sequence, for the repetition penalty. Latency-bound.
//
// Macros: W_T (signed char, __half, __nv_bfloat16, float), THREADS, KERNEL_NAME.
#include "elements.cuh"
#include "ptx.cuh"

#if !defined(W_T) || !defined(THREADS) || !defined(KERNEL_NAME)
#error "embed.cu needs W_T, THREADS and KERNEL_NAME"
#endif

extern "C" __global__ void __launch_bounds__(THREADS)
    KERNEL_NAME(const int* ids,                   // [N], each in 0 .. V-1
                const W_T* __restrict__ values,   // [V, pitch]
                int pitch,                        // elements from row to row, at least H
                const float* __restrict__ scale,  // [V], or null
                void* x,                          // [N, H]
                int x_dtype,                      // 0 float16, 1 bfloat16, 2 float32
                int H,
                unsigned char* seen,  // [N / S, V] 1: the token is in the context
                int S, int V) {       // tokens a sequence in this call
  wait_for_previous_kernels();
  let_next_kernel_start();
  const int n = blockIdx.x, id = ids[n];
  if (threadIdx.x == 0) seen[(long long)(n / S) * V + id] = 1;
  const float factor = scale == nullptr ? 1.f : scale[id];
  for (int h = threadIdx.x; h < H; h += THREADS) {
    store_as(x, (long long)n * H + h, to_float(values[(long long)id * pitch + h]) * factor, x_dtype);
  }
}
