// Grouped-query attention of single tokens over the KV cache, split over the context (flash-decoding, Dao et al. 2023): each
// block computes the softmax-weighted sum of its share of the keys, unnormalised, with its maximum and its sum;
// attention_combine.cu merges the shares. Lengths are read on the device, so that one CUDA graph serves every step.
//
// With ROTATE the token is new: queries and key are rotated here, and the block of the last share appends key and value to
// the cache. Without it the cache holds the token already (rope_append.cu), and its queries are rotated.
//
// Partition of work
//   grid    x: share of the context, y: key/value head and HEADS of its queries, z: token (sequence and position)
//   block   WARPS warps take turns along the keys, kKeys keys at a time each
//   warp    kLanes lanes to a key, kE of its features (16 bytes, of int8 8) to a lane; they add up a score by shuffles. Each
//           such group of lanes has an online softmax of its own (Milakov & Gimelshein 2018), so that nothing but the
//           scores crosses lanes until the end, where groups and then warps are merged.
//   lane    kAhead keys and values in flight all the time: each register is loaded again once it has been used
//
// Order. Old keys and values come from earlier graphs, so with ROTATE their first loads are issued before the kernel waits
// for its predecessor, and return while qkv is still being computed.
//
// Bound: reading keys and values once from HBM; at short contexts latency: the trip of q, two barriers, the merge.
//
// Macros: X_T (float, __half, __nv_bfloat16), KV_T (X_T or signed char), HEAD_DIM (even), HEADS (queries of a block), WARPS, ROTATE,
// KERNEL_NAME.
#include "attention.cuh"

#if !defined(X_T) || !defined(KV_T) || !defined(HEAD_DIM) || !defined(HEADS) || !defined(WARPS) || !defined(ROTATE) || \
    !defined(KERNEL_NAME)
#error "attention.cu needs X_T, KV_T, HEAD_DIM, HEADS, WARPS, ROTATE and KERNEL_NAME"
#endif

template <typename X_, typename KV_, int kDim_, int kHeads_, int kWarps_, bool kRotate_>
struct AttentionShape {
  using X = X_;
  using KV = KV_;
  using Cached = KvVector<KV>;
  static constexpr bool kRotate = kRotate_;
  static constexpr int kDim = kDim_, kHeads = kHeads_, kWarps = kWarps_, kThreads = 32 * kWarps;
  static constexpr int kE = Cached::kE, kVectors = (kDim + kE - 1) / kE;
  static constexpr int kLanes = kVectors > 16  ? 32
                                : kVectors > 8 ? 16
                                : kVectors > 4 ? 8
                                : kVectors > 2 ? 4
                                : kVectors > 1 ? 2
                                               : 1;
  static constexpr int kPerLane = (kVectors + kLanes - 1) / kLanes;  // vectors of a lane
  static constexpr int kOwn = kPerLane * kE;                         // features of a lane
  static constexpr int kKeys = 32 / kLanes, kAhead = 4, kTile = kWarps * kKeys * kAhead;
  static constexpr int kRow = kPerLane * kLanes * kE;  // features with the unused ones of the last lanes
  static_assert(kDim % 2 == 0, "rotary embedding turns pairs");
};

// Running maximum, sum and outputs of the keys that one group of lanes has seen. The maximum begins finite, so that no
// difference of infinities occurs; a score of -inf (no such key) weighs nothing.
template <typename S>
struct Softmax {
  float top[S::kHeads], sum[S::kHeads], output[S::kHeads][S::kOwn];

  __device__ __forceinline__ Softmax() {
#pragma unroll
    for (int g = 0; g < S::kHeads; ++g) {
      top[g] = -1e30f;
      sum[g] = 0.f;
#pragma unroll
      for (int i = 0; i < S::kOwn; ++i) output[g][i] = 0.f;
    }
  }
  __device__ __forceinline__ void shrink(int g, float new_top) {
    const float factor = exp2f(top[g] - new_top);
    top[g] = new_top;
    sum[g] *= factor;
#pragma unroll
    for (int i = 0; i < S::kOwn; ++i) output[g][i] *= factor;
  }
  // Merges the groups of lanes of this warp; all of them have the result.
  __device__ __forceinline__ void merge_groups() {
#pragma unroll
    for (int d = S::kLanes; d < 32; d *= 2) {
#pragma unroll
      for (int g = 0; g < S::kHeads; ++g) {
        shrink(g, fmaxf(top[g], __shfl_xor_sync(0xffffffffu, top[g], d)));
        sum[g] += __shfl_xor_sync(0xffffffffu, sum[g], d);
#pragma unroll
        for (int i = 0; i < S::kOwn; ++i) output[g][i] += __shfl_xor_sync(0xffffffffu, output[g][i], d);
      }
    }
  }
};

// Scores of one key with all queries, in units of log2; the same in all lanes of the key.
template <typename S>
__device__ __forceinline__ void scores(float (&score)[S::kHeads], const float (&query)[S::kHeads][S::kOwn],
                                       const float (&key)[S::kOwn], float scale, bool exists) {
#pragma unroll
  for (int g = 0; g < S::kHeads; ++g) {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < S::kOwn; ++i) sum = fmaf(query[g][i], key[i], sum);
#pragma unroll
    for (int d = S::kLanes / 2; d; d /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, d);
    score[g] = exists ? sum * scale : -infinity();
  }
}

template <typename S>
__device__ __forceinline__ void unpack_own(float (&v)[S::kOwn], const typename S::Cached (&vectors)[S::kPerLane]) {
#pragma unroll
  for (int p = 0; p < S::kPerLane; ++p) vectors[p].read(v + p * S::kE);
}

template <typename S>
__device__ __forceinline__ void attend(const typename S::X* qkv, int q_pitch, typename S::KV* keys,
                                       typename S::KV* values, float* key_scales, float* value_scales,
                                       const float2* turns, const int* length, int tokens, int heads, int kv_heads,
                                       int pitch, int max_len, float softmax_scale, float* partial, float2* stats) {
  using Cached = typename S::Cached;
  __shared__ float q[S::kHeads * S::kRow], fresh[2 * S::kRow];
  __shared__ float merged[S::kWarps][S::kHeads][S::kRow];
  __shared__ float2 merged_stats[S::kWarps][S::kHeads];
  const ContextShare<S::kHeads> share(tokens, heads, kv_heads);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

  if (!S::kRotate) {
    wait_for_previous_kernels();
    let_next_kernel_start();
  }
  const int position = length[share.b] + share.n % tokens, context = position + 1;
  const int splits = active_splits(context, gridDim.x);
  if (share.split >= splits) return;
  const int begin = (long long)context * share.split / splits, end = (long long)context * (share.split + 1) / splits;
  const bool last = S::kRotate && share.split == splits - 1;
  const int old_end = last ? position : end;
  const long long row0 = ((long long)share.b * kv_heads + share.kv) * max_len;

  // This lane's keys: kKeys * kAhead of the warp's in a tile.
  const int own_key = warp * S::kKeys + lane / S::kLanes;
  Cached key[S::kAhead][S::kPerLane], value[S::kAhead][S::kPerLane];
  float key_scale[S::kAhead], value_scale[S::kAhead];
  auto load = [&](Cached(&to)[S::kPerLane], float& scale, const typename S::KV* from, const float* scales, int at) {
    const bool exists = at < old_end;
#pragma unroll
    for (int p = 0; p < S::kPerLane; ++p) {
      const int vector = lane % S::kLanes + p * S::kLanes;
      to[p].load(from + (row0 + at) * pitch + vector * S::kE, exists && vector < S::kVectors);
    }
    scale = Cached::kScaled && exists ? scales[row0 + at] : 1.f;
  };
#pragma unroll
  for (int u = 0; u < S::kAhead; ++u) {
    const int at = begin + own_key + u * (S::kWarps * S::kKeys);
    load(key[u], key_scale[u], keys, key_scales, at);
    load(value[u], value_scale[u], values, value_scales, at);
  }

  if (S::kRotate) {
    wait_for_previous_kernels();
    let_next_kernel_start();
  }
  const float scale = softmax_scale * kLog2E;  // scores in units of log2
  const typename S::X* token = qkv + (long long)share.n * q_pitch;
  if (S::kRotate) {
    const long long at = row0 + position;
    rotate<typename S::X, typename S::KV, S::kDim, S::kHeads, S::kRow, S::kThreads>(
        q, fresh, token, share, heads, kv_heads, turns + (long long)position * (S::kDim / 2), scale, last,
        keys + at * pitch, values + at * pitch, key_scales + at, value_scales + at);
  } else {
    for (int i = threadIdx.x; i < S::kHeads * S::kRow; i += S::kThreads) {
      const int d = i % S::kRow, head = share.first_head + i / S::kRow;
      q[i] = d < S::kDim && head < share.end_head ? to_float(token[head * S::kDim + d]) * scale : 0.f;
    }
    __syncthreads();
  }
  float query[S::kHeads][S::kOwn];
#pragma unroll
  for (int g = 0; g < S::kHeads; ++g)
#pragma unroll
    for (int i = 0; i < S::kOwn; ++i) {
      query[g][i] = q[g * S::kRow + (lane % S::kLanes + i / S::kE * S::kLanes) * S::kE + i % S::kE];
    }

  Softmax<S> softmax;
  auto add = [&](const float (&score)[S::kHeads], const float (&v)[S::kOwn], float value_scale) {
#pragma unroll
    for (int g = 0; g < S::kHeads; ++g) {
      const float weight = exp2f(score[g] - softmax.top[g]);
      softmax.sum[g] += weight;
#pragma unroll
      for (int i = 0; i < S::kOwn; ++i) softmax.output[g][i] = fmaf(weight * value_scale, v[i], softmax.output[g][i]);
    }
  };

#pragma unroll 1
  for (int start = begin; start < old_end; start += S::kTile) {
    float score[S::kAhead][S::kHeads];
#pragma unroll
    for (int u = 0; u < S::kAhead; ++u) {
      const int at = start + own_key + u * (S::kWarps * S::kKeys);
      float k[S::kOwn];
      unpack_own<S>(k, key[u]);
      scores<S>(score[u], query, k, key_scale[u], at < old_end);
      load(key[u], key_scale[u], keys, key_scales, at + S::kTile);
    }
#pragma unroll
    for (int g = 0; g < S::kHeads; ++g) {
      float top = softmax.top[g];
#pragma unroll
      for (int u = 0; u < S::kAhead; ++u) top = fmaxf(top, score[u][g]);
      softmax.shrink(g, top);
    }
#pragma unroll
    for (int u = 0; u < S::kAhead; ++u) {
      const int at = start + own_key + u * (S::kWarps * S::kKeys);
      float v[S::kOwn];
      unpack_own<S>(v, value[u]);
      add(score[u], v, value_scale[u]);
      load(value[u], value_scale[u], values, value_scales, at + S::kTile);
    }
  }
  if (last) {  // the new key, by the first group of lanes
    float score[S::kHeads], row[S::kOwn];
    auto own_of = [&](const float* from) {
#pragma unroll
      for (int i = 0; i < S::kOwn; ++i) {
        row[i] = from[(lane % S::kLanes + i / S::kE * S::kLanes) * S::kE + i % S::kE];
      }
    };
    own_of(fresh);
    scores<S>(score, query, row, 1.f, own_key == 0);
#pragma unroll
    for (int g = 0; g < S::kHeads; ++g) softmax.shrink(g, fmaxf(softmax.top[g], score[g]));
    own_of(fresh + S::kRow);
    add(score, row, 1.f);
  }

  softmax.merge_groups();
  if (lane < S::kLanes) {
#pragma unroll
    for (int g = 0; g < S::kHeads; ++g) {
#pragma unroll
      for (int i = 0; i < S::kOwn; ++i) {
        merged[warp][g][(lane + i / S::kE * S::kLanes) * S::kE + i % S::kE] = softmax.output[g][i];
      }
      if (lane == 0) merged_stats[warp][g] = make_float2(softmax.top[g], softmax.sum[g]);
    }
  }
  __syncthreads();
  store_share<S::kDim>(merged, merged_stats, share, heads, partial, stats);
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, WARPS > 4 ? 1 : 2)
    KERNEL_NAME(const X_T* qkv,  // [B * S, q_pitch]: queries [heads, HEAD_DIM]; with ROTATE keys and values behind them
                int q_pitch,     //
                KV_T* keys,      // [B, kv_heads, max_len, pitch], this layer's
                KV_T* values,    // the same
                float* key_scales,    // [B, kv_heads, max_len] of int8 keys, else null
                float* value_scales,  // the same
                const float2* turns,  // [max_len, HEAD_DIM / 2]: cosine and sine
                const int* length,    // [B]: positions in the cache before this call's tokens
                int S,                // tokens a sequence in this call
                int heads, int kv_heads,
                int pitch,  // elements from one key to the next: HEAD_DIM up to whole 16 bytes
                int max_len, float softmax_scale,
                float* partial,   // [B * S, heads, gridDim.x, HEAD_DIM]
                float2* stats) {  // [B * S, heads, gridDim.x]: maximum in units of log2, and sum
  using Shape = AttentionShape<X_T, KV_T, HEAD_DIM, HEADS, WARPS, ROTATE>;
  attend<Shape>(qkv, q_pitch, keys, values, key_scales, value_scales, turns, length, S, heads, kv_heads, pitch, max_len,
                softmax_scale, partial, stats);
}
