// Causal grouped-query attention over the KV cache, split over the context (flash-decoding): each block computes the
// softmax-weighted sum of its share of the keys, unnormalised, with its maximum and its sum; attention_combine.cu merges
// the shares. The context's length is read on the device, so that one CUDA graph serves every step.
//
// Partition of work
//   grid    x: split, y: key/value head, z: token (batch and position)
//   block   the GROUP query heads that share the key/value head, THREADS keys at a time:
//             scores   a thread computes one key's products with all GROUP queries
//             softmax  warp g updates the running maximum and sum of query g (online softmax, Milakov & Gimelshein 2018)
//             values   a thread owns outputs (g, d) and runs over the keys, coalesced over d
//
// Bound: reading keys and values once from HBM; at short contexts, latency.
//
// Macros: X_T (float, __half, __nv_bfloat16), HEAD_DIM (a multiple of 4), GROUP, THREADS, KERNEL_NAME.
#include "elements.cuh"
#include "ptx.cuh"
#include "splits.cuh"

#if !defined(X_T) || !defined(HEAD_DIM) || !defined(GROUP) || !defined(THREADS) || !defined(KERNEL_NAME)
#error "attention.cu needs X_T, HEAD_DIM, GROUP, THREADS and KERNEL_NAME"
#endif

template <typename X, int kDim, int kGroup, int kThreads>
__device__ __forceinline__ void attend(const X* q, int q_pitch, const X* keys, const X* values, const int* length,
                                       int S, int kv_heads, int max_len, float softmax_scale, float* partial) {
  static_assert(kDim % 4 == 0, "keys are read four elements at a time");
  constexpr int kOutputs = (kGroup * kDim + kThreads - 1) / kThreads;  // outputs (g, d) of one thread
  __shared__ float query[kGroup][kDim];
  __shared__ float weight[kGroup][kThreads];
  __shared__ float top[kGroup], sum[kGroup], shrink[kGroup];

  const int n = blockIdx.z, kv = blockIdx.y, split = blockIdx.x, b = n / S;
  const int context = length[0] + n % S + 1;  // keys that this token sees
  const int splits = active_splits(context, gridDim.x);
  if (split >= splits) return;
  const int begin = (long long)context * split / splits, end = (long long)context * (split + 1) / splits;
  const long long head = ((long long)b * kv_heads + kv) * max_len;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

  for (int i = threadIdx.x; i < kGroup * kDim; i += kThreads) {
    query[i / kDim][i % kDim] = to_float(q[(long long)n * q_pitch + kv * kGroup * kDim + i]) * softmax_scale;
  }
  if (threadIdx.x < kGroup) {
    top[threadIdx.x] = -infinity();
    sum[threadIdx.x] = 0.f;
  }
  float output[kOutputs] = {};
  __syncthreads();

  for (int start = begin; start < end; start += kThreads) {
    const int count = min(kThreads, end - start);
    if (threadIdx.x < count) {
      const X* key = keys + (head + start + threadIdx.x) * kDim;
      float score[kGroup] = {};
#pragma unroll 4
      for (int d = 0; d < kDim; d += 4) {
        const float4 k = load4_or_zero(key, d, kDim, true);
#pragma unroll
        for (int g = 0; g < kGroup; ++g) {
          score[g] += query[g][d] * k.x + query[g][d + 1] * k.y + query[g][d + 2] * k.z + query[g][d + 3] * k.w;
        }
      }
#pragma unroll
      for (int g = 0; g < kGroup; ++g) weight[g][threadIdx.x] = score[g];
    }
    __syncthreads();

    for (int g = warp; g < kGroup; g += kThreads / 32) {
      float largest = top[g];
      for (int i = lane; i < count; i += 32) largest = fmaxf(largest, weight[g][i]);
#pragma unroll
      for (int d = 16; d; d >>= 1) largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, d));
      float total = 0.f;
      for (int i = lane; i < count; i += 32) {
        const float w = expf(weight[g][i] - largest);
        weight[g][i] = w;
        total += w;
      }
#pragma unroll
      for (int d = 16; d; d >>= 1) total += __shfl_xor_sync(0xffffffffu, total, d);
      __syncwarp();
      if (lane == 0) {
        shrink[g] = expf(top[g] - largest);  // 0 for the first keys
        sum[g] = sum[g] * shrink[g] + total;
        top[g] = largest;
      }
    }
    __syncthreads();

#pragma unroll
    for (int o = 0; o < kOutputs; ++o) {
      const int i = threadIdx.x + o * kThreads, g = i / kDim, d = i % kDim;
      if (g < kGroup) {
        const X* value = values + (head + start) * kDim + d;
        float total = output[o] * shrink[g];
#pragma unroll 8
        for (int k = 0; k < count; ++k) total += weight[g][k] * to_float(value[(long long)k * kDim]);
        output[o] = total;
      }
    }
    __syncthreads();  // weight may be written again
  }

  // partial [tokens, heads, splits of the grid, kDim + 2]: the outputs, then maximum and sum.
  const long long first_head = ((long long)n * kv_heads + kv) * kGroup;
#pragma unroll
  for (int o = 0; o < kOutputs; ++o) {
    const int i = threadIdx.x + o * kThreads, g = i / kDim, d = i % kDim;
    if (g < kGroup) partial[((first_head + g) * gridDim.x + split) * (kDim + 2) + d] = output[o];
  }
  if (threadIdx.x < kGroup) {
    float* const tail = partial + ((first_head + threadIdx.x) * gridDim.x + split) * (kDim + 2) + kDim;
    tail[0] = top[threadIdx.x];
    tail[1] = sum[threadIdx.x];
  }
}

// Four blocks a multiprocessor, so up to 128 registers: left alone, ptxas aims lower and spills on sm_120.
extern "C" __global__ void __launch_bounds__(THREADS, 4)
    KERNEL_NAME(const X_T* q,       // [B * S, q_pitch]: the first kv_heads * GROUP * HEAD_DIM are the queries
                int q_pitch,        //
                const X_T* keys,    // [B, kv_heads, max_len, HEAD_DIM], this layer's
                const X_T* values,  // the same
                const int* length,  // [1]: positions in the cache before this call's tokens
                int S,              // tokens a sequence in this call
                int kv_heads, int max_len, float softmax_scale,
                float* partial) {  // [B * S, kv_heads * GROUP, gridDim.x, HEAD_DIM + 2]
  let_next_kernel_start();
  wait_for_previous_kernels();
  attend<X_T, HEAD_DIM, GROUP, THREADS>(q, q_pitch, keys, values, length, S, kv_heads, max_len, softmax_scale, partial);
}
