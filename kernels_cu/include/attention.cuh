// What both kernels of single-token attention do around their inner loops: which share of the context a block has, the
// rotation of the new token with its place in the cache, and the merging of the block's warps.
#pragma once
#include "kv_cache.cuh"
#include "ptx.cuh"
#include "splits.cuh"

constexpr float kLog2E = 1.44269504f;

// A block's place in the grid (x: share of the context, y: key/value head and a part of its queries, z: token).
template <int kHeads>
struct ContextShare {
  int n, b, split, kv, part, first_head, end_head;

  __device__ __forceinline__ ContextShare(int tokens, int heads, int kv_heads) {
    const int group = heads / kv_heads, parts = (group + kHeads - 1) / kHeads;
    n = blockIdx.z;
    b = n / tokens;
    split = blockIdx.x;
    kv = blockIdx.y / parts;
    part = blockIdx.y % parts;
    first_head = kv * group + part * kHeads;
    end_head = (kv + 1) * group;  // of the queries that share the key/value head
  }
};

// Turns the queries into q [kHeads][kRow] times `scale`, and with `last` the new key and value into `fresh` [2][kRow]
// and the cache. All threads of the block; they may read both afterwards.
template <typename X, typename KV, int kDim, int kHeads, int kRow, int kThreads>
__device__ __forceinline__ void rotate(float* q, float* fresh, const X* token, const ContextShare<kHeads>& share,
                                       int heads, int kv_heads, const float2* turn, float scale, bool last, KV* key,
                                       KV* value, float* key_scale, float* value_scale) {
  // Pairs (d, d + kDim / 2): of the queries, of the key, of the value. All loads come first: one trip to memory.
  constexpr int kHalf = kDim / 2, kPairs = (kHeads + 2) * kHalf, kTurns = (kPairs + kThreads - 1) / kThreads;
  X firsts[kTurns] = {}, seconds[kTurns] = {};
  float2 turns[kTurns] = {};
#pragma unroll
  for (int t = 0; t < kTurns; ++t) {
    const int i = threadIdx.x + t * kThreads, row = i / kHalf, d = i % kHalf;
    const bool is_query = row < kHeads;
    const int head = is_query ? share.first_head + row : heads + (row - kHeads) * kv_heads + share.kv;
    if (is_query ? head < share.end_head : last && i < kPairs) {
      firsts[t] = token[head * kDim + d];
      seconds[t] = token[head * kDim + d + kHalf];
      turns[t] = turn[d];
    }
  }
  if constexpr (kRow > kDim) {
    constexpr int kRest = kRow - kDim;
#pragma unroll 1
    for (int i = threadIdx.x; i < (kHeads + 2) * kRest; i += kThreads) {
      const int row = i / kRest, d = kDim + i % kRest;
      (row < kHeads ? q + row * kRow : fresh + (row - kHeads) * kRow)[d] = 0.f;
    }
  }
#pragma unroll
  for (int t = 0; t < kTurns; ++t) {
    const int i = threadIdx.x + t * kThreads, row = i / kHalf, d = i % kHalf;
    float first = to_float(firsts[t]), second = to_float(seconds[t]);
    if (row <= kHeads) {  // not the value
      const float turned = first * turns[t].x - second * turns[t].y;
      second = second * turns[t].x + first * turns[t].y;
      first = turned;
    }
    if (row < kHeads) {  // rounded as other intermediate results are, which go through memory
      q[row * kRow + d] = rounded<X>(first) * scale;
      q[row * kRow + d + kHalf] = rounded<X>(second) * scale;
    } else if (last && i < kPairs) {
      float* const to = fresh + (row - kHeads) * kRow;
      if constexpr (!KvVector<KV>::kScaled) {
        KV* const cached = row == kHeads ? key : value;
        if (share.part == 0) {
          from_float(first, cached + d);
          from_float(second, cached + d + kHalf);
        }
        first = rounded<KV>(first);
        second = rounded<KV>(second);
      }
      to[d] = first;
      to[d + kHalf] = second;
    }
  }
  __syncthreads();
  if constexpr (KvVector<KV>::kScaled) {  // the scale needs the whole vector
    if (!last) return;
    for (int row = threadIdx.x / 32; row < 2; row += kThreads / 32) {
      append_row<kDim>(fresh + row * kRow, row ? value : key, row ? value_scale : key_scale, share.part == 0);
    }
    __syncthreads();
  }
}

// How the results of kParts parts of the keys, maximum and sum in tops, are weighted in those of query g.
template <int kParts>
struct PartWeights {
  float top, sum, weights[kParts];

  template <int kHeads>
  __device__ __forceinline__ PartWeights(const float2 (&tops)[kParts][kHeads], int g) {
    top = tops[0][g].x;
#pragma unroll
    for (int p = 1; p < kParts; ++p) top = fmaxf(top, tops[p][g].x);
    sum = 0.f;
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
      weights[p] = exp2f(tops[p][g].x - top);
      sum = fmaf(weights[p], tops[p][g].y, sum);
    }
  }
};

// Merges what the block's warps have, outputs [kWarps][kHeads][kRow]; one warp a query, so that weights serve several
// features. store_stats(g, maximum and sum) by all its lanes, then store_output(g, feature, v).
template <int kDim, int kHeads, int kRow, int kWarps, typename StoreStats, typename StoreOutput>
__device__ __forceinline__ void merge_warps(const float (&outputs)[kWarps][kHeads][kRow],
                                            const float2 (&tops)[kWarps][kHeads], const ContextShare<kHeads>& share,
                                            StoreStats store_stats, StoreOutput store_output) {
  for (int g = threadIdx.x / 32; g < kHeads && share.first_head + g < share.end_head; g += kWarps) {
    const PartWeights<kWarps> merged(tops, g);
    store_stats(g, make_float2(merged.top, merged.sum));
#pragma unroll
    for (int d = threadIdx.x % 32; d < kDim; d += 32) {
      float total = 0.f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) total = fmaf(merged.weights[w], outputs[w][g][d], total);
      store_output(g, d, total);
    }
  }
}

// The block's share to memory, for attention_combine.cu.
template <int kDim, int kHeads, int kRow, int kWarps>
__device__ __forceinline__ void store_share(const float (&outputs)[kWarps][kHeads][kRow],
                                            const float2 (&tops)[kWarps][kHeads], const ContextShare<kHeads>& share,
                                            int heads, float* partial, float2* stats) {
  const long long first = ((long long)share.n * heads + share.first_head) * gridDim.x + share.split;
  merge_warps<kDim>(
      outputs, tops, share,
      [&](int g, float2 stat) {
        if (threadIdx.x % 32 == 0) stats[first + g * gridDim.x] = stat;
      },
      [&](int g, int d, float v) { partial[(first + g * gridDim.x) * kDim + d] = v; });
}
