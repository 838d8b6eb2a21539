// x[n, :] = values[id[n], :] * scale[id[n]]: rows of the int8 embedding, one block a token. Latency-bound.
//
// Macros: THREADS, KERNEL_NAME.
#include "elements.cuh"
#include "ptx.cuh"

#if !defined(THREADS) || !defined(KERNEL_NAME)
#error "embed.cu needs THREADS and KERNEL_NAME"
#endif

extern "C" __global__ void __launch_bounds__(THREADS) KERNEL_NAME(const int* ids,  // [N], each in 0 .. V-1
                                                                  const signed char* __restrict__ values,  // [V, pitch]
                                                                  int pitch,  // bytes from row to row, at least H
                                                                  const float* __restrict__ scale,  // [V]
                                                                  void* x,                          // [N, H]
                                                                  int x_dtype,  // 0 float16, 1 bfloat16, 2 float32
                                                                  int H) {
  let_next_kernel_start();
  wait_for_previous_kernels();
  const int n = blockIdx.x, id = ids[n];
  for (int h = threadIdx.x; h < H; h += THREADS) {
    store_as(x, (long long)n * H + h, float(values[(long long)id * pitch + h]) * scale[id], x_dtype);
  }
}
