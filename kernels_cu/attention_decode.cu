// attention.cu for new tokens on the tensor cores: float16 and bfloat16 arithmetic over a cache of that type or int8.
// One token a block, its queries rotated here, key and value appended by the last share.
//
// Shares of the context are merged in one of two ways:
//   CLUSTER 0   as in attention.cu: as many shares as its grid has, to memory, for attention_combine.cu
//   CLUSTER 8   (sm_90 and newer) eight, some of them empty when the context is short, by the eight blocks of a
//               cluster. Each block finishes an eighth of the outputs: the others send what they have of those into
//               its shared memory. It reads nowhere else, so that no block has to stay for the others' sake.
//
// Partition of work
//   grid    x: share of the context, y: key/value head and HEADS of its queries, z: sequence
//   block   WARPS warps take turns along the keys, 16 keys each; every warp has an online softmax of its own
//   warp    scores = q k^T, outputs += weights v: mma with the queries as eight of its sixteen rows
//
// Both operands go from memory to the tensor cores as they were loaded, 16 bytes to a lane (of int8 8). The k of q k^T
// are features in any order that q shares: lane 4 g + q takes features 8 q .. 8 q + 7 of every 32 of key g. The columns
// of weights v are features in any order too: lane 4 g + q takes features 8 g .. of the keys that it needs, 2 q, 2 q +
// 1, 2 q + 8 and 2 q + 9, pairs them with byte permutations, and has the outputs of features 16 q .. 16 q + 15 of every
// 64.
//
// Order. As in attention.cu: the first keys and values are loaded before the wait for the predecessor, and a register
// is loaded again once it has been used.
//
// Bound: reading keys and values; at short contexts latency (the trip of q, two barriers, the merge). The last warp
// attends to the new key, because it is the first to have no others. With CUDA cores (attention.cu) conversions,
// shuffles and products for each query were the bound: D = 128, four queries to a key, 16k context: 28 us a layer on an
// H200 where the bytes take 9.
//
// Macros: X_T (__half, __nv_bfloat16), KV_T (X_T or signed char), HEAD_DIM (even), HEADS (at most 8), WARPS, CLUSTER,
// KERNEL_NAME.
#include "attention.cuh"
#include "cluster.cuh"
#include "eight_rows.cuh"

#if !defined(X_T) || !defined(KV_T) || !defined(HEAD_DIM) || !defined(HEADS) || !defined(WARPS) || \
    !defined(CLUSTER) || !defined(KERNEL_NAME)
#error "attention_decode.cu needs X_T, KV_T, HEAD_DIM, HEADS, WARPS, CLUSTER and KERNEL_NAME"
#endif

template <typename X_, typename KV_, int kDim_, int kHeads_, int kWarps_, int kCluster_>
struct DecodeShape {
  using X = X_;
  using KV = KV_;
  using Cached = KvVector<KV>;
  static constexpr int kDim = kDim_, kHeads = kHeads_, kWarps = kWarps_, kThreads = 32 * kWarps;
  static constexpr int kCluster = kCluster_;
  static constexpr int kVectors = (kDim + 7) / 8;
  static constexpr int kChunks = (kVectors + 3) / 4;  // of 32 features
  static constexpr int kSets = (kVectors + 7) / 8;    // of 64 features
  static constexpr int kRow = 64 * kSets, kTile = 16 * kWarps;
  static_assert(kHeads <= 8, "the queries are eight rows");
  static_assert(Cached::kE == 8, "a vector is eight features");
};

// Eight features as four operand registers.
template <typename X, typename KV>
__device__ __forceinline__ uint4 operand(const KvVector<KV>& v) {
  return v.bits;
}
template <typename X>
__device__ __forceinline__ uint4 operand(const KvVector<signed char>& v) {
  const float4 low = bytes_to_floats(v.bits.x), high = bytes_to_floats(v.bits.y);
  return make_uint4(pack2<X>(low.x, low.y), pack2<X>(low.z, low.w), pack2<X>(high.x, high.y), pack2<X>(high.z, high.w));
}

__device__ __forceinline__ unsigned word_of(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// int8 values are multiplied by their scale in the weights, which float16 holds better as 2^6 of that: no more, because
// values up to 65504 have scales up to 516.
template <typename KV>
struct ValueUnit {
  static constexpr float kUnit = 1.f;
};
template <>
struct ValueUnit<signed char> {
  static constexpr float kUnit = 64.f;
};

// One warp's keys and values of a tile: keys of rows g and g + 8; values of rows 2 q, 2 q + 1, 2 q + 8, 2 q + 9.
template <typename S>
struct Tile {
  typename S::Cached keys[2][S::kChunks], values[4][S::kSets];
  float key_scales[2][2], value_scales[2][2];  // of the scores of this lane: columns 2 q and 2 q + 1, and 8 more
};

template <typename S>
struct Cache {
  const typename S::KV *keys, *values;  // of this sequence and head
  const float *key_scales, *value_scales;
  int pitch, end;

  static __device__ __forceinline__ int value_row(int r) { return threadIdx.x % 4 * 2 + r % 2 + r / 2 * 8; }

  __device__ __forceinline__ void load_keys(Tile<S>& tile, int start) const {
    const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int at = start + g + 8 * r;
#pragma unroll
      for (int c = 0; c < S::kChunks; ++c) {
        tile.keys[r][c].load(keys + (long long)at * pitch + (4 * c + q) * 8, at < end && 4 * c + q < S::kVectors);
      }
    }
    load_scales(tile.key_scales, key_scales, start);
  }
  __device__ __forceinline__ void load_values(Tile<S>& tile, int start) const {
    const int g = threadIdx.x % 32 / 4;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int at = start + value_row(r);
#pragma unroll
      for (int s = 0; s < S::kSets; ++s) {
        tile.values[r][s].load(values + (long long)at * pitch + (8 * s + g) * 8, at < end && 8 * s + g < S::kVectors);
      }
    }
    load_scales(tile.value_scales, value_scales, start);
  }
  __device__ __forceinline__ void load_scales(float (&to)[2][2], const float* scales, int start) const {
    if (!S::Cached::kScaled) return;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int at = start + value_row(r);
      to[r / 2][r % 2] = at < end ? scales[at] : 0.f;
    }
  }
};

// Query g of this warp's lanes: running maximum (finite from the start, so that no difference of infinities occurs),
// the lane's share of the sum, and outputs of features 64 s + 16 q + j (first) and 8 more (second).
template <typename S>
struct Query {
  float top = -1e30f, sum = 0.f, outputs[S::kSets][8][2] = {};

  __device__ __forceinline__ void raise(float new_top) {
    const float factor = exp2f(top - new_top);
    top = new_top;
    sum *= factor;
#pragma unroll
    for (int s = 0; s < S::kSets; ++s)
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        outputs[s][j][0] *= factor;
        outputs[s][j][1] *= factor;
      }
  }
};

// What the blocks of a cluster send to this one: of each its part of this block's slice of the outputs, and behind
// those maximum and sum of the queries that the slice belongs to.
template <typename S>
struct Inbox {
  static constexpr int kOutputs = S::kHeads * S::kDim, kSlice = (kOutputs + S::kCluster - 1) / S::kCluster;
  float words[S::kCluster][kSlice + 2 * S::kHeads];

  static __device__ __forceinline__ Inbox& of_block() {
    __shared__ Inbox inbox;
    return inbox;
  }
  // Others may send once all blocks have opened theirs.
  __device__ __forceinline__ void open() {
#pragma unroll 1
    for (int i = threadIdx.x; i < int(sizeof(words) / sizeof(float)); i += S::kThreads) {
      (&words[0][0])[i] = __int_as_float(kNotSent);
    }
    cluster_arrive();
  }
  __device__ __forceinline__ void send(const float (&outputs)[S::kWarps][S::kHeads][S::kRow],
                                       const float2 (&tops)[S::kWarps][S::kHeads],
                                       const ContextShare<S::kHeads>& share) {
    float* const own = words[share.split];
    cluster_wait();
    merge_warps<S::kDim>(
        outputs, tops, share,
        [&](int g, float2 stat) {
          const int first = g * S::kDim / kSlice, end = ((g + 1) * S::kDim - 1) / kSlice + 1;
          const int rank = first + threadIdx.x % 32;
          if (rank >= end) return;
          send_to_block(own + kSlice + 2 * g, rank, stat.x);
          send_to_block(own + kSlice + 2 * g + 1, rank, stat.y);
        },
        [&](int g, int d, float v) {
          const int i = g * S::kDim + d;
          send_to_block(own + i % kSlice, i / kSlice, v);
        });
  }
  // Stores the slice.
  __device__ __forceinline__ void merge(const ContextShare<S::kHeads>& share, int heads, typename S::X* out) const {
    for (int i = threadIdx.x; i < kSlice; i += S::kThreads) {
      const int output = share.split * kSlice + i, g = output / S::kDim;
      if (output >= kOutputs || share.first_head + g >= share.end_head) break;
      float parts[S::kCluster];
      float2 tops[S::kCluster][1];
      bool complete;
      do {
        complete = true;
#pragma unroll
        for (int c = 0; c < S::kCluster; ++c) {
          parts[c] = peek(words[c] + i);
          tops[c][0] = make_float2(peek(words[c] + kSlice + 2 * g), peek(words[c] + kSlice + 2 * g + 1));
        }
#pragma unroll
        for (int c = 0; c < S::kCluster; ++c) {
          complete = complete && has_come(parts[c]) && has_come(tops[c][0].x) && has_come(tops[c][0].y);
        }
      } while (!complete);
      const PartWeights<S::kCluster> merged(tops, 0);
      float total = 0.f;
#pragma unroll
      for (int c = 0; c < S::kCluster; ++c) total = fmaf(merged.weights[c], parts[c], total);
      from_float(total / merged.sum, out + ((long long)share.n * heads + share.first_head) * S::kDim + output);
    }
  }
};

template <typename S>
__device__ __forceinline__ void attend(const typename S::X* qkv, int q_pitch, typename S::KV* keys,
                                       typename S::KV* values, float* key_scales, float* value_scales,
                                       const float2* turns, const int* length, int heads, int kv_heads, int pitch,
                                       int max_len, float softmax_scale, float* partial, float2* stats,
                                       typename S::X* out) {
  using X = typename S::X;
  constexpr float kUnit = ValueUnit<typename S::KV>::kUnit;
  __shared__ float q[S::kHeads * S::kRow], fresh[2 * S::kRow];
  __shared__ float merged[S::kWarps][S::kHeads][S::kRow];
  __shared__ float2 tops[S::kWarps][S::kHeads];
  const ContextShare<S::kHeads> share(1, heads, kv_heads);
  const int g = threadIdx.x % 32 / 4, lane_q = threadIdx.x % 4, warp = threadIdx.x / 32;

  if constexpr (S::kCluster > 0) Inbox<S>::of_block().open();
  const int position = length[share.b], splits = S::kCluster ? S::kCluster : active_splits(position + 1, gridDim.x);
  if (share.split >= splits) return;
  const int begin = (long long)position * share.split / splits;
  const bool last = share.split == splits - 1;
  const long long row0 = ((long long)share.b * kv_heads + share.kv) * max_len;
  const Cache<S> cache{keys + row0 * pitch,
                       values + row0 * pitch,
                       S::Cached::kScaled ? key_scales + row0 : nullptr,
                       S::Cached::kScaled ? value_scales + row0 : nullptr,
                       pitch,
                       int((long long)position * (share.split + 1) / splits)};
  Tile<S> tile;
  int start = begin + 16 * warp;
  cache.load_keys(tile, start);
  cache.load_values(tile, start);

  wait_for_previous_kernels();
  let_next_kernel_start();
  const long long at = row0 + position;
  rotate<X, typename S::KV, S::kDim, S::kHeads, S::kRow, S::kThreads>(
      q, fresh, qkv + (long long)share.n * q_pitch, share, heads, kv_heads, turns + (long long)position * (S::kDim / 2),
      1.f, last, keys + at * pitch, values + at * pitch, key_scales + at, value_scales + at);

  // Rows of the first operand: features 8 q .. 8 q + 7 of every 32 of query g.
  unsigned query_words[S::kChunks][4];
#pragma unroll
  for (int c = 0; c < S::kChunks; ++c)
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const float* from = q + g * S::kRow + (4 * c + lane_q) * 8 + 2 * w;
      query_words[c][w] = g < S::kHeads ? pack2<X>(from[0], from[1]) : 0u;
    }

  const float scale = softmax_scale * kLog2E;
  Query<S> query;
#pragma unroll 1
  for (; start < cache.end; start += S::kTile) {
    float scores[2][2];  // keys 2 q and 2 q + 1, and 8 more
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      scores[r][0] = scores[r][1] = 0.f;
#pragma unroll
      for (int c = 0; c < S::kChunks; ++c) {
        const uint4 key = operand<X>(tile.keys[r][c]);
        mma_eight_rows<X>(scores[r], query_words[c][0], query_words[c][1], key.x, key.y);
        mma_eight_rows<X>(scores[r], query_words[c][2], query_words[c][3], key.z, key.w);
      }
    }
    float top = query.top;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      float& score = scores[r / 2][r % 2];
      score *= S::Cached::kScaled ? scale * tile.key_scales[r / 2][r % 2] : scale;
      if (start + Cache<S>::value_row(r) >= cache.end) score = -infinity();
      top = fmaxf(top, score);
    }
    cache.load_keys(tile, start + S::kTile);
    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
    query.raise(top);
    unsigned weights[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float first = exp2f(scores[r][0] - top), second = exp2f(scores[r][1] - top);
      query.sum += first + second;
      if (S::Cached::kScaled) {
        first *= tile.value_scales[r][0] * kUnit;
        second *= tile.value_scales[r][1] * kUnit;
      }
      weights[r] = pack2<X>(first, second);
    }
#pragma unroll
    for (int s = 0; s < S::kSets; ++s) {
      uint4 v[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) v[r] = operand<X>(tile.values[r][s]);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const unsigned halves = j % 2 ? 0x7632u : 0x5410u;
        const unsigned low = __byte_perm(word_of(v[0], j / 2), word_of(v[1], j / 2), halves);
        const unsigned high = __byte_perm(word_of(v[2], j / 2), word_of(v[3], j / 2), halves);
        mma_eight_rows<X>(query.outputs[s][j], weights[0], weights[1], low, high);
      }
    }
    cache.load_values(tile, start + S::kTile);
  }

  if (last && warp == S::kWarps - 1) {  // the new key: features 8 q .. of every 32 a lane, in float32
    float score = 0.f;
    if (g < S::kHeads) {
#pragma unroll
      for (int c = 0; c < S::kChunks; ++c)
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int d = (4 * c + lane_q) * 8 + i;
          score = fmaf(q[g * S::kRow + d], fresh[d], score);
        }
    }
    score += __shfl_xor_sync(0xffffffffu, score, 1);
    score += __shfl_xor_sync(0xffffffffu, score, 2);
    score *= scale;
    query.raise(fmaxf(query.top, score));
    const float weight = exp2f(score - query.top);
    if (lane_q == 0) query.sum += weight;
#pragma unroll
    for (int s = 0; s < S::kSets; ++s)
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float* value = fresh + S::kRow + 64 * s + 16 * lane_q + j;
        query.outputs[s][j][0] = fmaf(weight * kUnit, value[0], query.outputs[s][j][0]);
        query.outputs[s][j][1] = fmaf(weight * kUnit, value[8], query.outputs[s][j][1]);
      }
  }
  query.sum += __shfl_xor_sync(0xffffffffu, query.sum, 1);
  query.sum += __shfl_xor_sync(0xffffffffu, query.sum, 2);
  if (g < S::kHeads) {
#pragma unroll
    for (int s = 0; s < S::kSets; ++s)
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        float* to = &merged[warp][g][64 * s + 16 * lane_q + j];
        to[0] = query.outputs[s][j][0] * (1.f / kUnit);
        to[8] = query.outputs[s][j][1] * (1.f / kUnit);
      }
    if (lane_q == 0) tops[warp][g] = make_float2(query.top, query.sum);
  }
  __syncthreads();
  if constexpr (S::kCluster > 0) {
    Inbox<S>& inbox = Inbox<S>::of_block();
    inbox.send(merged, tops, share);
    inbox.merge(share, heads, out);
  } else {
    store_share<S::kDim>(merged, tops, share, heads, partial, stats);
  }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS) KERNEL_NAME(
    const X_T* qkv,       // [B, q_pitch]: queries [heads, HEAD_DIM], keys and values [kv_heads, HEAD_DIM] behind them
    int q_pitch,          //
    KV_T* keys,           // [B, kv_heads, max_len, pitch], this layer's
    KV_T* values,         // the same
    float* key_scales,    // [B, kv_heads, max_len] of int8 keys, else null
    float* value_scales,  // the same
    const float2* turns,  // [max_len, HEAD_DIM / 2]: cosine and sine
    const int* length,    // [B]: positions in the cache before this token
    int heads, int kv_heads,
    int pitch,  // elements from one key to the next: HEAD_DIM up to whole 16 bytes
    int max_len, float softmax_scale,
    float* partial,  // without CLUSTER: [B, heads, gridDim.x, HEAD_DIM]
    float2* stats,   // without CLUSTER: [B, heads, gridDim.x]: maximum in units of log2, and sum
    X_T* out) {      // with CLUSTER (and then gridDim.x, blocks of a cluster): [B, heads * HEAD_DIM]
  using Shape = DecodeShape<X_T, KV_T, HEAD_DIM, HEADS, WARPS, CLUSTER>;
  attend<Shape>(qkv, q_pitch, keys, values, key_scales, value_scales, turns, length, heads, kv_heads, pitch, max_len,
                softmax_scale, partial, stats, out);
}
