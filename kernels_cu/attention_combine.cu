// Merges the shares of attention.cu: out = sum_s e^(m_s - m) o_s / sum_s e^(m_s - m) l_s. One block a token and head,
// a thread a feature. Latency-bound.
//
// Macros: X_T (float, __half, __nv_bfloat16), HEAD_DIM, KERNEL_NAME.
#include "elements.cuh"
#include "ptx.cuh"
#include "splits.cuh"

#if !defined(X_T) || !defined(HEAD_DIM) || !defined(KERNEL_NAME)
#error "attention_combine.cu needs X_T, HEAD_DIM and KERNEL_NAME"
#endif

extern "C" __global__ void __launch_bounds__(HEAD_DIM)
    KERNEL_NAME(const float* partial,  // [B * S, heads, splits, HEAD_DIM + 2]
                const int* length,     // [1]: positions in the cache before this call's tokens
                int S, int splits,     // tokens a sequence in this call; splits of attention.cu's grid
                X_T* out) {            // [B * S, heads * HEAD_DIM]
  let_next_kernel_start();
  wait_for_previous_kernels();
  const int n = blockIdx.y, head = blockIdx.x, heads = gridDim.x;
  const float* share = partial + ((long long)n * heads + head) * splits * (HEAD_DIM + 2);
  const int used = active_splits(length[0] + n % S + 1, splits);
  float top = -infinity();
  for (int s = 0; s < used; ++s) top = fmaxf(top, share[s * (HEAD_DIM + 2) + HEAD_DIM]);
  float total = 0.f, sum = 0.f;
  for (int s = 0; s < used; ++s) {
    const float weight = expf(share[s * (HEAD_DIM + 2) + HEAD_DIM] - top);
    total += weight * share[s * (HEAD_DIM + 2) + threadIdx.x];
    sum += weight * share[s * (HEAD_DIM + 2) + HEAD_DIM + 1];
  }
  from_float(total / sum, out + ((long long)n * heads + head) * HEAD_DIM + threadIdx.x);
}
