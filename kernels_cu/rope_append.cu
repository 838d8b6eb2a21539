// Rotary embedding of queries and keys (half against half, as Hugging Face does it), and the new keys and values into
// the cache, in its type: x's own, or int8 with a scale for each vector of a head.
//
// Partition of work
//   grid    a block a token
//   warp    a head at a time: query, key or value, as they lie side by side in qkv
//   lane    turns pairs (d, d + D / 2)
//
// Bound: latency. An int8 vector is computed twice, for its largest element and for its digits: as D is known at run
// time only, there are no registers in which the elements could wait.
//
// Macros: X_T (float, __half, __nv_bfloat16), KV_T (X_T or signed char), THREADS, KERNEL_NAME.
#include "elements.cuh"
#include "ptx.cuh"

#if !defined(X_T) || !defined(KV_T) || !defined(THREADS) || !defined(KERNEL_NAME)
#error "rope_append.cu needs X_T, KV_T, THREADS and KERNEL_NAME"
#endif

// One vector of qkv, turned by the angles of its position; a value is taken as it is (turns null).
template <typename X>
struct Vector {
  const X* elements;  // [2 * half]
  const float2* turns;
  int half;

  // Elements d and d + half.
  __device__ __forceinline__ float2 pair(int d) const {
    const float first = to_float(elements[d]), second = to_float(elements[d + half]);
    if (turns == nullptr) return make_float2(first, second);
    const float2 turn = turns[d];
    return make_float2(first * turn.x - second * turn.y, second * turn.x + first * turn.y);
  }
};

template <typename X, typename To>
__device__ __forceinline__ void store(const Vector<X>& vector, To* to, float*) {
  for (int d = threadIdx.x % 32; d < vector.half; d += 32) {
    const float2 v = vector.pair(d);
    from_float(v.x, to + d);
    from_float(v.y, to + d + vector.half);
  }
}

// Digits between -127 and 127 that count absmax / 127, half to even. Magnitudes are compared as bits, where NaN is the
// largest: it becomes the scale, and so the whole vector's value.
template <typename X>
__device__ __forceinline__ void store(const Vector<X>& vector, signed char* to, float* scale) {
  const int lane = threadIdx.x % 32;
  unsigned largest = 0;
  for (int d = lane; d < vector.half; d += 32) {
    const float2 v = vector.pair(d);
    largest = max(largest, max(__float_as_uint(fabsf(v.x)), __float_as_uint(fabsf(v.y))));
  }
  const float step = __uint_as_float(warp_max(largest)) / 127.f;
  const float factor = step > 0.f ? 1.f / step : 0.f;
  if (lane == 0) *scale = step;
  for (int d = lane; d < vector.half; d += 32) {
    const float2 v = vector.pair(d);
    to[d] = (signed char)max(min(__float2int_rn(v.x * factor), 127), -127);
    to[d + vector.half] = (signed char)max(min(__float2int_rn(v.y * factor), 127), -127);
  }
}

template <typename X, typename KV, int kThreads>
__device__ __forceinline__ void rope_append(X* token, KV* keys, KV* values, float* key_scales, float* value_scales,
                                            const float2* turns, int b, int position, int heads, int kv_heads, int D,
                                            int Dp, int max_len) {
  static_assert(kThreads % 32 == 0, "a warp has a head at a time");
  for (int head = threadIdx.x / 32; head < heads + 2 * kv_heads; head += kThreads / 32) {
    X* const from = token + head * D;
    const bool is_value = head >= heads + kv_heads;
    const Vector<X> vector = {from, is_value ? nullptr : turns + (long long)position * (D / 2), D / 2};
    if (head < heads) {
      store(vector, from, nullptr);
    } else {
      const long long row = ((long long)b * kv_heads + (head - heads) % kv_heads) * max_len + position;
      store(vector, (is_value ? values : keys) + row * Dp, (is_value ? value_scales : key_scales) + row);
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    KERNEL_NAME(X_T* qkv,             // [B * S, q_pitch]: heads queries, kv_heads keys, kv_heads values of D elements;
                                      // the queries are rotated in place
                int q_pitch,          //
                KV_T* keys,           // [B, kv_heads, max_len, Dp], this layer's; elements from D on are not written
                KV_T* values,         // the same
                float* key_scales,    // [B, kv_heads, max_len] of an int8 cache: one step of its digits; else null
                float* value_scales,  // the same
                const float2* __restrict__ turns,  // [max_len, D / 2]: cosine and sine
                const int* length,                 // [B]: positions already in the cache of each sequence
                int S,  // tokens a sequence in this call; token n is b = n / S, position length[b] + n % S
                int heads, int kv_heads, int D, int Dp, int max_len) {
  wait_for_previous_kernels();
  let_next_kernel_start();
  const int n = blockIdx.x, b = n / S;
  rope_append<X_T, KV_T, THREADS>(qkv + (long long)n * q_pitch, keys, values, key_scales, value_scales, turns, b,
                                  length[b] + n % S, heads, kv_heads, D, Dp, max_len);
}
