// Rotary embedding of queries and keys (half against half, as Hugging Face does it), and the new keys and values into the
// cache. One block a token; a thread turns pairs. Latency-bound.
//
// Macros: X_T (float, __half, __nv_bfloat16), THREADS, KERNEL_NAME.
#include "elements.cuh"
#include "ptx.cuh"

#if !defined(X_T) || !defined(THREADS) || !defined(KERNEL_NAME)
#error "rope_append.cu needs X_T, THREADS and KERNEL_NAME"
#endif

extern "C" __global__ void __launch_bounds__(THREADS)
    KERNEL_NAME(X_T* qkv,                          // [B * S, (heads + 2 * kv_heads) * D]: q is rotated in place
                X_T* keys,                         // [B, kv_heads, max_len, D], this layer's
                X_T* values,                       // the same
                const float2* __restrict__ turns,  // [max_len, D / 2]: cosine and sine
                const int* length,                 // [1]: positions already in the cache
                int S,  // tokens a sequence in this call; token n is b = n / S, position n % S
                int heads, int kv_heads, int D, int max_len) {
  let_next_kernel_start();
  wait_for_previous_kernels();
  const int b = blockIdx.x / S, position = length[0] + blockIdx.x % S;
  const int half = D / 2, pairs = (heads + 2 * kv_heads) * half;
  X_T* token = qkv + (long long)blockIdx.x * pairs * 2;
  for (int i = threadIdx.x; i < pairs; i += THREADS) {
    const int head = i / half, d = i % half;
    X_T* const from = token + head * D + d;
    float first = to_float(from[0]), second = to_float(from[half]);
    if (head < heads + kv_heads) {
      const float2 turn = turns[(long long)position * half + d];
      const float turned = first * turn.x - second * turn.y;
      second = second * turn.x + first * turn.y;
      first = turned;
    }
    X_T* to = from;
    if (head >= heads) {
      const int kv = (head - heads) % kv_heads;
      X_T* const cache = head < heads + kv_heads ? keys : values;
      to = cache + (((long long)b * kv_heads + kv) * max_len + position) * D + d;
    }
    from_float(first, to);
    from_float(second, to + half);
  }
}
