// y[m] = scale * sum_k t[m, k] x[k], a warp a row, codes of two bits: the shape of the library's matrix-vector kernels.
#include <cuda_fp16.h>
#include <cuda_bf16.h>

template <class T>
__device__ __forceinline__ float to_float(T v) {
  return float(v);
}

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int offset = 16; offset; offset >>= 1) v += __shfl_xor_sync(0xffffffffu, v, offset);
  return v;
}

template <int WARPS>
__device__ float block_sum(float v) {
  __shared__ float partial[WARPS];
  v = warp_sum(v);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = v;
  __syncthreads();
  float total = 0.0f;
  for (int i = 0; i < WARPS; ++i) total += partial[i];
  return total;
}

extern "C" __global__ void __launch_bounds__(THREADS)
    KERNEL_NAME(const unsigned* __restrict__ codes,  // [M, K / 16]: 16 codes a word, code + 1
                const X_T* __restrict__ x,           // [K]
                X_T* __restrict__ y,                 // [M]
                float scale, int M, int K) {
  constexpr int WARPS = THREADS / 32;
  signed char* q = static_cast<signed char*>(emu::dynamic_shared());  // [K]
  float largest = 0.0f, squares = 0.0f;
  for (int k = threadIdx.x; k < K; k += THREADS) {
    const float v = to_float(x[k]);
    largest = fmaxf(largest, fabsf(v));
    squares = fmaf(v, v, squares);
  }
  squares = block_sum<WARPS>(squares);
  __shared__ float maxima[WARPS];
  for (int offset = 16; offset; offset >>= 1) largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, offset));
  if (threadIdx.x % 32 == 0) maxima[threadIdx.x / 32] = largest;
  __syncthreads();
  largest = maxima[0];
  for (int i = 1; i < WARPS; ++i) largest = fmaxf(largest, maxima[i]);
  const float step = largest > 0.0f ? largest / 127.0f : 1.0f;
  for (int k = threadIdx.x; k < K; k += THREADS) q[k] = (signed char)__float2int_rn(to_float(x[k]) / step);
  __syncthreads();

  const int row = blockIdx.x * WARPS + threadIdx.x / 32;
  if (row >= M) return;
  int sum = 0;
  for (int word = threadIdx.x % 32; word < K / 16; word += 32) {
    const unsigned packed = codes[row * (K / 16) + word];
    for (int i = 0; i < 4; ++i) {
      const int four = reinterpret_cast<const int*>(q)[word * 4 + i];
      unsigned t = 0;
      for (int j = 0; j < 4; ++j) t |= (((packed >> (8 * i + 2 * j) & 3u) - 1u) & 255u) << (8 * j);
      sum = __dp4a(int(t), four, sum);
    }
  }
  sum = __reduce_add_sync(0xffffffffu, sum);
  if (threadIdx.x % 32 == 0) y[row] = X_T(float(sum) * step * scale);
}
