// The body of the ternary product, with or without RMSNorm in front: y[n, m] = scale[m] * sum_k t[m, k] a[n, k], where a
// is the (normalised, for int8 quantised) activation. The packed layout is defined in edgellm_cupy/formats/packing.py.
//
// Partition of work
//   grid.y   blocks of kTokens tokens
//   grid.x   a persistent row of blocks: block b computes the row tiles b, b + gridDim.x, ...
//   block    kGroups = THREADS / LANES groups of LANES lanes; a tile is kGroups * kRows rows
//   group    kRows rows at a time (row r*kGroups + group of the tile), its lanes side by side along K:
//
//              chunk (64 weights, 16 bytes)   0    1    2  ..  LANES-1 | LANES ..
//              step 0, a = 0                 l0   l1   l2  ..  lLANES-1 |
//              step 0, a = 1 .. kAhead-1                                 |  l0 ..
//
//   lane     kRows * kAhead 16-byte loads a step, all independent. Each 16-byte piece of activations that it reads from
//            shared memory serves kRows rows, each unpacked word of weights kTokens tokens.
//
// Order. Packed weights do not depend on x, so the loads of the first step are issued before x is looked at and return
// while the block reduces and quantises x. After that, the loads of step s+1 are issued before step s is multiplied; the
// stream of steps runs on over row tiles.
//
// Activations in shared memory. int8: a chunk's 64 values are four 16-byte pieces, one for each word of weights; float32:
// sixteen pieces of four. Piece p of chunk c lies at 16-byte index p * pitch + c, so that lanes with consecutive chunks
// read consecutive 16 bytes; the host picks a pitch that also keeps the writes free of bank conflicts. Where K does not
// fit, the host asks for slices of `slice_steps` steps and x is staged again for each.
//
// Arithmetic. int8: codes u = t + 1, so sum(t q) = sum(u q) - sum(q), the latter once a token. With one token, a word is
// masked in place to one field a byte (u * 4^i) and each field has an accumulator that is shifted at the end; with more
// tokens the four operands are shifted once and serve them all. All sums are exact in int32 (K < 4 million).
// float: a byte of codes is put under the exponent of 2^23 and 2^23 + 1 is taken away, which leaves t as a float exactly;
// then fused multiply-adds in float32, each chunk on its own before it joins the running sum, which keeps the error far
// below that of one long chain.
//
// Bound: reading the packed weights, from some MB on; below that, latency: the launch, the trip of x, two barriers. What
// made a difference there on an H200 (M = K = 576, N = 1, int8; the floor kernel takes 1.3 us, an empty one 0.56):
//   - x converted where it was loaded: 2.77 us. The conversion waited for x before the weights' loads were even issued.
//     Raw bits first, conversion when used: 2.27.
//   - x read a second time for quantisation, scale and residual loaded at the end: 0.15 more.
//   - rare paths (extreme tokens, unaligned rows) in the straight line and loops unrolled over tokens: five times the
//     code. An SM starts each launch with cold instruction caches, so that code beside the path costs as well.
//   - several vectors of x a thread where the block could be wider: 0.3 to 0.8 more (K = 1536, 2560).
#pragma once
#include "token_scale.cuh"

template <bool kInt8>
struct SumType {
  using type = float;
};
template <>
struct SumType<true> {
  using type = int;
};

// The compile-time shape of one specialisation.
// X: float, __half, __nv_bfloat16, or signed char for activations that rmsnorm_quantise.cu has quantised already.
template <typename X_, bool kNorm_, bool kInt8_, int kTokens_, int kLanes_, int kRows_, int kAhead_, int kThreads_,
          int kHeld_>
struct ProductShape {
  using X = X_;
  using Sum = typename SumType<kInt8_>::type;
  static constexpr bool kNorm = kNorm_, kInt8 = kInt8_, kQuantised = sizeof(X) == 1;
  static constexpr int kTokens = kTokens_, kLanes = kLanes_, kRows = kRows_, kAhead = kAhead_, kThreads = kThreads_,
                       kHeld = kHeld_;
  static constexpr int kGroups = kThreads / kLanes, kTile = kGroups * kRows, kStep = kLanes * kAhead,
                       kWarps = kThreads / 32;
  static constexpr int kFields = kInt8 && kTokens == 1 ? 4 : 1;  // accumulators of one sum
  static constexpr int kPieces = kInt8 ? 4 : 16;                 // 16-byte pieces of a chunk's activations
  static_assert(kThreads % 32 == 0 && kLanes <= 32 && 32 % kLanes == 0, "a group of lanes may not straddle warps");
  static_assert(!kQuantised || (kInt8 && !kNorm), "quantised activations are neither normalised nor float");
};

template <typename S>
struct Weights {
  uint4 chunk[S::kRows][S::kAhead];
};

// What the lane that stores a result needs beside the sum. A lane stores at most one result of a tile, so both are loaded
// with the tile's first weights and are there when the sums are.
struct Tail {
  float scale;
  unsigned residual;  // bits; converted when it is added
};

template <typename S>
struct Sums {
  typename S::Sum of[S::kRows][S::kTokens][S::kFields];
};

__device__ __forceinline__ unsigned word(const uint4& v, int j) {
  return j == 0 ? v.x : j == 1 ? v.y : j == 2 ? v.z : v.w;
}

// This lane's chunks of one step; zero codes where the row or the chunk does not exist.
template <typename S>
__device__ __forceinline__ Weights<S> load_weights(const uint4* w, int M, int C, int tile, int step) {
  const int lane = threadIdx.x % S::kLanes, group = threadIdx.x / S::kLanes;
  Weights<S> weights;
#pragma unroll
  for (int r = 0; r < S::kRows; ++r) {
    const int row = tile * S::kTile + r * S::kGroups + group;
#pragma unroll
    for (int a = 0; a < S::kAhead; ++a) {
      const int c = step * S::kStep + a * S::kLanes + lane;
      weights.chunk[r][a] = row < M && c < C ? load_once(w + (long long)row * C + c) : make_uint4(0u, 0u, 0u, 0u);
    }
  }
  return weights;
}

// sums += one chunk of every row times the same chunk of every token: int8.
template <typename S>
__device__ __forceinline__ void multiply_chunk(Sums<S>& sums, const Weights<S>& weights, int a, const int4* staged,
                                               int pitch, int local, int) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    int4 q[S::kTokens];
#pragma unroll
    for (int t = 0; t < S::kTokens; ++t) q[t] = staged[(t * S::kPieces + j) * pitch + local];
#pragma unroll
    for (int r = 0; r < S::kRows; ++r) {
      const unsigned codes = word(weights.chunk[r][a], j);
      if constexpr (S::kFields == 4) {
        int (&sum)[4] = sums.of[r][0];
        sum[0] = dp4a_us(codes & 0x03030303u, q[0].x, sum[0]);
        sum[1] = dp4a_us(codes & 0x0c0c0c0cu, q[0].y, sum[1]);
        sum[2] = dp4a_us(codes & 0x30303030u, q[0].z, sum[2]);
        sum[3] = dp4a_us(codes & 0xc0c0c0c0u, q[0].w, sum[3]);
      } else {
        const unsigned u0 = codes & 0x03030303u, u1 = (codes >> 2) & 0x03030303u;
        const unsigned u2 = (codes >> 4) & 0x03030303u, u3 = (codes >> 6) & 0x03030303u;
#pragma unroll
        for (int t = 0; t < S::kTokens; ++t) {
          int& sum = sums.of[r][t][0];
          sum = dp4a_us(u3, q[t].w, dp4a_us(u2, q[t].z, dp4a_us(u1, q[t].y, dp4a_us(u0, q[t].x, sum))));
        }
      }
    }
  }
}

// Code B of four codes, one a byte, as the float -1, 0 or 1.
template <int B>
__device__ __forceinline__ float ternary_float(unsigned codes) {
  return __int_as_float(int(__byte_perm(codes, 0x4b000000u, 0x7640u + B))) - 8388609.f;
}

// The same for float activations.
template <typename S>
__device__ __forceinline__ void multiply_chunk(Sums<S>& sums, const Weights<S>& weights, int a, const int4* staged,
                                               int pitch, int local, float) {
  const float4* activations = reinterpret_cast<const float4*>(staged);
  float4 part[S::kRows][S::kTokens];
#pragma unroll
  for (int r = 0; r < S::kRows; ++r)
#pragma unroll
    for (int t = 0; t < S::kTokens; ++t) part[r][t] = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
#pragma unroll(S::kTokens < 8 ? 4 : 1)  // eight tokens' pieces at once would not fit the registers
    for (int i = 0; i < 4; ++i) {
      float4 n[S::kTokens];
#pragma unroll
      for (int t = 0; t < S::kTokens; ++t) n[t] = activations[(t * S::kPieces + j * 4 + i) * pitch + local];
#pragma unroll
      for (int r = 0; r < S::kRows; ++r) {
        const unsigned codes = (word(weights.chunk[r][a], j) >> (2 * i)) & 0x03030303u;
        const float t0 = ternary_float<0>(codes), t1 = ternary_float<1>(codes);
        const float t2 = ternary_float<2>(codes), t3 = ternary_float<3>(codes);
#pragma unroll
        for (int t = 0; t < S::kTokens; ++t) {
          float4& sum = part[r][t];
          sum.x = fmaf(t0, n[t].x, sum.x);
          sum.y = fmaf(t1, n[t].y, sum.y);
          sum.z = fmaf(t2, n[t].z, sum.z);
          sum.w = fmaf(t3, n[t].w, sum.w);
        }
      }
    }
  }
#pragma unroll
  for (int r = 0; r < S::kRows; ++r)
#pragma unroll
    for (int t = 0; t < S::kTokens; ++t)
      sums.of[r][t][0] += (part[r][t].x + part[r][t].y) + (part[r][t].z + part[r][t].w);
}

// Puts four activations into shared memory; v is x g, or x without a norm. Returns the sum of the quantised values.
template <typename S>
__device__ __forceinline__ int stage4(int4* staged, float4 v, float factor, int t, int i, int pitch) {
  const int chunk = i / 64, piece = i / 16 % 4, field = i / 4 % 4;
  if constexpr (S::kInt8) {
    const int q = quantise4(v, factor);
    reinterpret_cast<int*>(staged)[((t * S::kPieces + piece) * pitch + chunk) * 4 + field] = q;
    return __dp4a(q, 0x01010101, 0);
  } else {
    // x - x is zero, or NaN where x is not finite: then the whole token shall be NaN.
    v = S::kNorm ? v * factor : make_float4(v.x + (v.x - v.x), v.y + (v.y - v.y), v.z + (v.z - v.z), v.w + (v.w - v.w));
    reinterpret_cast<float4*>(staged)[(t * S::kPieces + piece * 4 + field) * pitch + chunk] = v;
    return 0;
  }
}

// Puts the activations of one slice of K into shared memory, normalised and quantised, zero beyond K and beyond N, and
// adds each warp's share of sum(q) to q_sums. Ends before the barrier that publishes them.
template <typename S>
__device__ __forceinline__ void stage(int4* staged, int (&q_sums)[S::kTokens][S::kWarps],
                                      const Held<typename S::X, S::kHeld>& held, const typename S::X* x,
                                      const Gamma<typename S::X>& gamma, const TokenScale* scale, int n0, int N, int K,
                                      int first_chunk, int chunks, bool whole, int pitch, bool aligned) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll 1
  for (int t = 0; t < S::kTokens; ++t) {
    int q_sum = 0;
    if (S::kHeld > 0 && __builtin_expect(whole && scale[t].pre == 1.f, 1)) {  // the token is in registers, as it is
      if constexpr (S::kHeld > 0) {
#pragma unroll
        for (int h = 0; h < S::kHeld; ++h) {
          const int i = 4 * (threadIdx.x + h * S::kThreads);
          if (i < chunks * 64) q_sum += stage4<S>(staged, held.xg[h], scale[t].factor, t, i, pitch);
        }
      }
    } else {
      const typename S::X* row = x + (long long)(n0 + t) * K;
#pragma unroll 2
      for (int i = 4 * threadIdx.x; i < chunks * 64; i += 4 * S::kThreads) {
        const int k = first_chunk * 64 + i;
        float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
        if (n0 + t < N) v = load4_or_zero(row, k, K, aligned);
        if (S::kNorm) v = (v * scale[t].pre) * gamma.at(k, K);
        q_sum += stage4<S>(staged, v, scale[t].factor, t, i, pitch);
      }
    }
    if constexpr (S::kInt8) {
      q_sum = warp_sum(q_sum);
      if (lane == 0) q_sums[t][warp] = first_chunk == 0 ? q_sum : q_sums[t][warp] + q_sum;
    }
  }
}

// The same for activations that are quantised already: rows of C * 64 int8, zero beyond K.
template <typename S>
__device__ __forceinline__ void stage_quantised(int4* staged, int (&q_sums)[S::kTokens][S::kWarps], TokenScale* scale,
                                                const signed char* x, const float* dequant, int n0, int N, int C,
                                                int first_chunk, int chunks, int pitch) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int own = S::kTokens == 1 ? 0 : threadIdx.x;
  if (own < S::kTokens && n0 + own < N) scale[own].dequant = dequant[n0 + own];
#pragma unroll 1
  for (int t = 0; t < S::kTokens; ++t) {
    const int4* row = reinterpret_cast<const int4*>(x) + ((long long)(n0 + t) * C + first_chunk) * 4;
    int q_sum = 0;
#pragma unroll 1
    for (int i = threadIdx.x; i < chunks * 4; i += S::kThreads) {
      const int4 q = n0 + t < N ? row[i] : make_int4(0, 0, 0, 0);
      q_sum = __dp4a(q.x, 0x01010101, __dp4a(q.y, 0x01010101, q_sum));
      q_sum = __dp4a(q.z, 0x01010101, __dp4a(q.w, 0x01010101, q_sum));
      staged[(t * S::kPieces + i % 4) * pitch + i / 4] = q;
    }
    q_sum = warp_sum(q_sum);
    if (lane == 0) q_sums[t][warp] = first_chunk == 0 ? q_sum : q_sums[t][warp] + q_sum;
  }
}

// Lane r * kTokens + t of a group stores the result of row r and token t.
template <typename S>
__device__ __forceinline__ int stored_row(int tile) {
  const int lane = threadIdx.x % S::kLanes, group = threadIdx.x / S::kLanes;
  return tile * S::kTile + lane / S::kTokens * S::kGroups + group;
}

template <typename S>
__device__ __forceinline__ bool stores(int row, int n0, int M, int N) {
  static_assert(S::kRows * S::kTokens <= S::kLanes, "a lane stores at most one result");
  const int lane = threadIdx.x % S::kLanes;
  return lane < S::kRows * S::kTokens && row < M && n0 + lane % S::kTokens < N;
}

template <typename S>
__device__ __forceinline__ Tail load_tail(const float* scale, int scale_stride, const void* residual,
                                          int residual_dtype, int tile, int n0, int M, int N) {
  const int row = stored_row<S>(tile), t = threadIdx.x % S::kLanes % S::kTokens;
  Tail tail{0.f, 0u};
  if (stores<S>(row, n0, M, N)) {
    tail.scale = scale[(long long)row * scale_stride];
    if (residual != nullptr) tail.residual = load_bits(residual, (long long)(n0 + t) * M + row, residual_dtype);
  }
  return tail;
}

// sum(q) of the token whose result this lane stores, once q_sums is published.
template <typename S>
__device__ __forceinline__ int total_q_sum(const int (&q_sums)[S::kTokens][S::kWarps]) {
  int total = 0;
  if constexpr (S::kInt8) {
    const int t = threadIdx.x % S::kLanes % S::kTokens;
#pragma unroll
    for (int i = 0; i < S::kWarps; ++i) total += q_sums[t][i];
  }
  return total;
}

// Adds up the lanes of each group and stores the tile's results.
template <typename S>
__device__ __forceinline__ void finish(Sums<S>& sums, const Tail& tail, int q_sum, const TokenScale* token_scale,
                                       bool has_residual, int residual_dtype, void* y, int y_dtype, int tile, int n0,
                                       int M, int N) {
  const int lane = threadIdx.x % S::kLanes;
  typename S::Sum result = 0;
#pragma unroll
  for (int r = 0; r < S::kRows; ++r) {
#pragma unroll
    for (int t = 0; t < S::kTokens; ++t) {
      typename S::Sum sum = sums.of[r][t][0];
      if constexpr (S::kFields == 4) {
        sum += (sums.of[r][t][1] >> 2) + (sums.of[r][t][2] >> 4) + (sums.of[r][t][3] >> 6);
      }
#pragma unroll
      for (int d = S::kLanes / 2; d; d >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, d);
      if (lane == r * S::kTokens + t) result = sum;
    }
  }
  sums = {};

  const int t = lane % S::kTokens, row = stored_row<S>(tile);
  if (stores<S>(row, n0, M, N)) {
    const float sum = S::kInt8 ? float(result - q_sum) * token_scale[t].dequant : float(result);
    const float added = has_residual ? float_of_bits(tail.residual, residual_dtype) : 0.f;
    store_as(y, (long long)(n0 + t) * M + row, fmaf(sum, tail.scale, added), y_dtype);
  }
}

// See the head of this file. `dequant` [N] belongs to quantised activations and is null otherwise; `gamma` [K] is null
// without kNorm.
template <typename S>
__device__ __forceinline__ void ternary_product(const typename S::X* x, const float* dequant, const void* gamma,
                                                int gamma_is_float32, const uint4* w, const float* scale,
                                                int scale_stride, const void* residual, int residual_dtype, void* y,
                                                int y_dtype, int M, int K, int N, float eps, int slice_steps,
                                                int pitch) {
  int4* staged = dynamic_shared<int4>();
  __shared__ __align__(16) int q_sums[S::kTokens][S::kWarps];
  __shared__ TokenScale shared_scale[S::kTokens];
  TokenScale own_scale{};
  TokenScale* token_scale = S::kTokens == 1 ? &own_scale : shared_scale;
  const int C = (K + 63) / 64, steps = (C + S::kStep - 1) / S::kStep, tiles = (M + S::kTile - 1) / S::kTile;
  const bool sliced = slice_steps < steps;

#pragma unroll 1
  for (int n0 = blockIdx.y * S::kTokens; n0 < N; n0 += gridDim.y * S::kTokens) {
    int tile = blockIdx.x, step = 0;
    bool aligned = true;
    Held<typename S::X, S::kHeld> held;
    const Gamma<typename S::X> norm(gamma, gamma_is_float32, K);
    if constexpr (!S::kQuantised) {
      // Few loads, from L2: they go out before those of the weights, which take longer.
      aligned = rows_aligned(x, K);
      load_held<S::kNorm, S::kThreads>(held, x + (long long)n0 * K, norm, K, aligned);
    }
    Weights<S> now = load_weights<S>(w, M, C, tile, step);
    Tail tail = load_tail<S>(scale, scale_stride, residual, residual_dtype, tile, n0, M, N);
    if constexpr (!S::kQuantised && (S::kNorm || S::kInt8)) {
      token_scales<S::kNorm, S::kInt8, S::kTokens, S::kThreads>(token_scale, held, x, norm, n0, N, K, eps, aligned);
    }

    Sums<S> sums = {};
    int first_chunk = 0, q_sum = 0;
    bool stage_now = true;
#pragma unroll 1
    for (;;) {
      if (stage_now) {
        first_chunk = step * S::kStep;
        const int chunks = min(slice_steps * S::kStep, C - first_chunk);
        if constexpr (S::kQuantised) {
          stage_quantised<S>(staged, q_sums, token_scale, x, dequant, n0, N, C, first_chunk, chunks, pitch);
        } else {
          stage<S>(staged, q_sums, held, x, norm, token_scale, n0, N, K, first_chunk, chunks, !sliced, pitch, aligned);
        }
        __syncthreads();
        q_sum = total_q_sum<S>(q_sums);
      }

      const bool last_step = step + 1 == steps;
      const int next_step = last_step ? 0 : step + 1, next_tile = last_step ? tile + gridDim.x : tile;
      const bool more = next_tile < tiles;
      Weights<S> next;
      Tail next_tail = tail;
      if (more) {
        next = load_weights<S>(w, M, C, next_tile, next_step);
        if (last_step) next_tail = load_tail<S>(scale, scale_stride, residual, residual_dtype, next_tile, n0, M, N);
      }

#pragma unroll
      for (int a = 0; a < S::kAhead; ++a) {
        const int c = step * S::kStep + a * S::kLanes + int(threadIdx.x % S::kLanes);
        if (c < C) multiply_chunk<S>(sums, now, a, staged, pitch, c - first_chunk, typename S::Sum());
      }
      if (last_step) {
        finish<S>(sums, tail, q_sum, token_scale, residual != nullptr, residual_dtype, y, y_dtype, tile, n0, M, N);
      }
      if (!more) break;
      now = next;
      tail = next_tail;
      tile = next_tile;
      step = next_step;
      stage_now = sliced && step % slice_steps == 0;
      if (stage_now) __syncthreads();  // nobody multiplies with the last slice any more
    }
    if (n0 + gridDim.y * S::kTokens < N) __syncthreads();  // nor with the last tokens
  }
}
