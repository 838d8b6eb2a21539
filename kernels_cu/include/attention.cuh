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

// Turns the queries into q [kHeads][kRow] times `scale`, and with `last` the new key and value into `fresh` [2][kRow] and the
// cache. All threads of the block; they may read both afterwards.
template <typename X, typename KV, int kDim, int kHeads, int kRow, int kThreads>
__device__ __forceinline__ void rotate(float* q, float* fresh, const X* token, const ContextShare<kHeads>& share, int heads,
                                       int kv_heads, const float2* turn, float scale, bool last, KV* key, KV* value,
                                       float* key_scale, float* value_scale) {
  constexpr int kHalf = kDim / 2;
  // Pairs (d, d + kDim / 2): of the queries, of the key, of the value.
  const int pairs = (kHeads + (last ? 2 : 0)) * kHalf;
  for (int i = threadIdx.x; i < pairs; i += kThreads) {
    const int row = i / kHalf, d = i % kHalf;
    const bool is_query = row < kHeads;
    const int head = is_query ? share.first_head + row : heads + (row - kHeads) * kv_heads + share.kv;
    float first = 0.f, second = 0.f;
    if (!is_query || head < share.end_head) {
      first = to_float(token[head * kDim + d]);
      second = to_float(token[head * kDim + d + kHalf]);
    }
    if (row <= kHeads) {  // not the value
      const float2 t = turn[d];
      const float turned = first * t.x - second * t.y;
      second = second * t.x + first * t.y;
      first = turned;
    }
    float* to = is_query ? q + row * kRow : fresh + (row - kHeads) * kRow;
    // Queries are rounded as other intermediate results are, which go through memory.
    to[d] = is_query ? rounded<X>(first) * scale : first;
    to[d + kHalf] = is_query ? rounded<X>(second) * scale : second;
  }
  // Beyond kDim.
  constexpr int kRest = kRow - kDim;
  for (int i = threadIdx.x; i < (kHeads + 2) * kRest; i += kThreads) {
    const int row = i / (kRest > 0 ? kRest : 1), d = kDim + i % (kRest > 0 ? kRest : 1);
    (row < kHeads ? q + row * kRow : fresh + (row - kHeads) * kRow)[d] = 0.f;
  }
  __syncthreads();
  if (!last) return;
  for (int row = threadIdx.x / 32; row < 2; row += kThreads / 32) {
    append_row<kDim>(fresh + row * kRow, row ? value : key, row ? value_scale : key_scale, share.part == 0);
  }
  __syncthreads();
}

// The block's result from those of its warps: outputs [kWarps][kHeads][kRow], and maximum and sum in tops.
template <int kDim, int kHeads, int kRow, int kWarps>
__device__ __forceinline__ void store_share(const float (&outputs)[kWarps][kHeads][kRow],
                                            const float2 (&tops)[kWarps][kHeads], const ContextShare<kHeads>& share,
                                            int heads, float* partial, float2* stats) {
  for (int i = threadIdx.x; i < kHeads * kDim; i += 32 * kWarps) {
    const int g = i / kDim, d = i % kDim, head = share.first_head + g;
    if (head >= share.end_head) break;
    float top = tops[0][g].x;
#pragma unroll
    for (int w = 1; w < kWarps; ++w) top = fmaxf(top, tops[w][g].x);
    float total = 0.f, sum = 0.f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float weight = exp2f(tops[w][g].x - top);
      total = fmaf(weight, outputs[w][g][d], total);
      sum = fmaf(weight, tops[w][g].y, sum);
    }
    const long long at = ((long long)share.n * heads + head) * gridDim.x + share.split;
    partial[at * kDim + d] = total;
    if (d == 0) stats[at] = make_float2(top, sum);
  }
}
