// Merges the shares of attention.cu: out = sum_s 2^(m_s - m) o_s / sum_s 2^(m_s - m) l_s.
//
// Partition of work: one block a token and head; groups of kLanes lanes, four features to a lane, take turns along the
// shares and merge what they have through shared memory. All loads are independent: latency-bound, one trip to L2.
//
// Macros: X_T (float, __half, __nv_bfloat16), HEAD_DIM, THREADS, KERNEL_NAME.
#include "elements.cuh"
#include "ptx.cuh"
#include "splits.cuh"

#if !defined(X_T) || !defined(HEAD_DIM) || !defined(THREADS) || !defined(KERNEL_NAME)
#error "attention_combine.cu needs X_T, HEAD_DIM, THREADS and KERNEL_NAME"
#endif

extern "C" __global__ void __launch_bounds__(THREADS)
    KERNEL_NAME(const float* partial,  // [B * S, heads, splits, HEAD_DIM]
                const float2* stats,   // [B * S, heads, splits]: maximum in units of log2, and sum
                const int* length,     // [B]: positions in the cache before this call's tokens
                int S, int splits,     // tokens a sequence in this call; splits of attention.cu's grid
                X_T* out) {            // [B * S, heads * HEAD_DIM]; grid: (heads, B * S)
  constexpr int kPairs = HEAD_DIM / 2, kGroups = THREADS / kPairs > 1 ? THREADS / kPairs : 1;
  static_assert(kPairs <= THREADS, "a thread has two features");
  __shared__ float2 outputs[kGroups][kPairs], tops[kGroups];
  wait_for_previous_kernels();
  let_next_kernel_start();
  const int n = blockIdx.y, head = blockIdx.x, group = threadIdx.x / kPairs, pair = threadIdx.x % kPairs;
  const int used = active_splits(length[n / S] + n % S + 1, splits);
  const long long first = ((long long)n * gridDim.x + head) * splits;
  if (group < kGroups) {
    float top = -1e30f, sum = 0.f;
    float2 output = make_float2(0.f, 0.f);
#pragma unroll 4
    for (int s = group; s < used; s += kGroups) {
      const float2 share = stats[first + s];
      const float2 o = reinterpret_cast<const float2*>(partial + (first + s) * HEAD_DIM)[pair];
      const float larger = fmaxf(top, share.x), old = exp2f(top - larger), weight = exp2f(share.x - larger);
      sum = sum * old + share.y * weight;
      output = make_float2(output.x * old + o.x * weight, output.y * old + o.y * weight);
      top = larger;
    }
    outputs[group][pair] = output;
    if (pair == 0) tops[group] = make_float2(top, sum);
  }
  __syncthreads();
  if (group > 0) return;
  float top = tops[0].x;
#pragma unroll
  for (int g = 1; g < kGroups; ++g) top = fmaxf(top, tops[g].x);
  float sum = 0.f;
  float2 total = make_float2(0.f, 0.f);
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    const float weight = exp2f(tops[g].x - top);
    sum = fmaf(weight, tops[g].y, sum);
    total = make_float2(fmaf(weight, outputs[g][pair].x, total.x), fmaf(weight, outputs[g][pair].y, total.y));
  }
  X_T* const to = out + ((long long)n * gridDim.x + head) * HEAD_DIM + 2 * pair;
  from_float(total.x / sum, to);
  from_float(total.y / sum, to + 1);
}
