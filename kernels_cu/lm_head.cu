// logits[n, v] = scale[v] * sum_h values[v, h] * x[n, h]: the output head, int8 rows times float32 activations.
//
// Partition of work: four lanes a row, so eight rows a warp; a lane reads every fourth 16-byte chunk of its row. Blocks run
// over the rows with the grid's stride. The token's features lie in shared memory as 16-byte pieces, piece p of chunk c at
// index p * pitch + c with an odd pitch, so that the lanes' reads (four chunks, one piece) meet no bank conflict.
// A byte becomes a float by putting (value + 128) under the exponent of 2^23.
//
// Bound: reading the rows once.
//
// Macros: THREADS, KERNEL_NAME.
#include "elements.cuh"
#include "ptx.cuh"

#if !defined(THREADS) || !defined(KERNEL_NAME)
#error "lm_head.cu needs THREADS and KERNEL_NAME"
#endif

__device__ __forceinline__ float dot4(unsigned bytes, float4 x, float sum) {
  const unsigned shifted = bytes ^ 0x80808080u;
  sum = fmaf(__int_as_float(int(__byte_perm(shifted, 0x4b000000u, 0x7640u))) - 8388736.f, x.x, sum);
  sum = fmaf(__int_as_float(int(__byte_perm(shifted, 0x4b000000u, 0x7641u))) - 8388736.f, x.y, sum);
  sum = fmaf(__int_as_float(int(__byte_perm(shifted, 0x4b000000u, 0x7642u))) - 8388736.f, x.z, sum);
  return fmaf(__int_as_float(int(__byte_perm(shifted, 0x4b000000u, 0x7643u))) - 8388736.f, x.w, sum);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    KERNEL_NAME(const float* x,                    // [N, H]; grid.y is N
                const uint4* __restrict__ values,  // int8 [V, chunks * 16], zero beyond H
                const float* __restrict__ scale,   // [V]
                float* logits,                     // [N, V]
                int V, int H) {                    // chunks = ceil(H / 16)
  let_next_kernel_start();
  wait_for_previous_kernels();
  float4* const pieces = dynamic_shared<float4>();
  const int chunks = (H + 15) / 16, pitch = chunks | 1, n = blockIdx.y, lane = threadIdx.x % 4;
  const bool aligned = rows_aligned(x, H);
  for (int i = threadIdx.x; i < chunks * 4; i += THREADS) {
    pieces[i % 4 * pitch + i / 4] = load4_or_zero(x + (long long)n * H, 4 * i, H, aligned);
  }
  __syncthreads();

  const int rows_a_step = gridDim.x * (THREADS / 4);
  for (int first = blockIdx.x * (THREADS / 4); first < V; first += rows_a_step) {
    const int v = first + threadIdx.x / 4;
    float sum = 0.f;
    if (v < V) {
      const uint4* const row = values + (long long)v * chunks;
#pragma unroll 3
      for (int c = lane; c < chunks; c += 4) {
        const uint4 bytes = load_once(row + c);
        const float low = dot4(bytes.y, pieces[pitch + c], dot4(bytes.x, pieces[c], 0.f));
        sum += dot4(bytes.w, pieces[3 * pitch + c], dot4(bytes.z, pieces[2 * pitch + c], low));
      }
    }
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    if (lane == 0 && v < V) logits[(long long)n * V + v] = sum * scale[v];
  }
}
