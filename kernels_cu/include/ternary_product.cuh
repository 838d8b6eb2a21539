// The body of the streaming ternary product, with or without RMSNorm in front, for a few tokens:
// y[n, m] = scale[m] * sum_k t[m, k] a[n, k] (+ residual), where a is the (normalised, for int8 quantised) activation; with
// the activation of an FFN on top where asked for (ffn.cuh).
// The packed layout is defined in edgellm_cupy/formats/packing.py, the tensor cores' operands in fragments.cuh.
//
// Partition of work
//   grid.y   blocks of kTokens tokens
//   grid.x   a persistent row of blocks: block b computes the row tiles b, b + gridDim.x, ...
//   block    kRowWarps x kSplit warps; a tile is kRowWarps * kRows rows
//   warp     kRows = 16 / kSpread rows; the kSplit warps of the same rows take turns along K, in units of kSpread * 256 k:
//
//              unit           0    1   ...  S-1 |  S  ...            S = kSplit
//              warp           0    1   ...  S-1 |  0  ...
//              step 0, a = 0  ^-----------------^   a = 1 .. kAhead-1 follow
//
//   lane     one chunk of two rows of the unit: two 16-byte loads, 2 * kAhead of them in flight all the time
//
// Spread. The 16 rows of an instruction need not be 16 rows of W. With kSpread = 2 its rows 0, 2, 4 .. are the first 256 k of
// rows of W, its rows 1, 3, 5 .. the next 256 k of the same rows, and there are columns for either; each result takes the
// columns that belong to its k. So a warp reads 64 * kSpread consecutive bytes of a row, with the columns that few tokens
// leave idle. Whole cache lines matter: with half lines a multiprocessor has only half as many bytes on their way,
// 28672 x 4096 then reads 2.2 TB/s on an H200.
//
// Order. Packed weights and scales do not depend on earlier kernels, so the loads of the first step are issued before the
// kernel waits for its predecessor (programmatic dependent launch) and return while the block waits, then reduces and
// quantises x. After that each register is loaded again as soon as it has been multiplied; the stream runs on over tiles.
//
// Arithmetic. All of it is in exact integers. int8: a token is one column of B. Float: a token is written in 8-bit
// digits of a fixed-point number relative to its largest element, and each digit is a column: four for float16 and
// bfloat16 (an error of at most 2^-29 of the largest), six for float32 (2^-44). The tensor cores have columns to spare: eight
// are multiplied at a time, however few are used. Float16 operands instead (two planes of 11 bits) need one conversion for
// every two weights, where integers need one mask for four: 21.0 against 13.9 us for 28672 x 4096 on an H200, which was
// bound by just those instructions (logic runs at half rate).
//
// Masks, no shifts: field i of a byte is used as u * 4^i, and each i has accumulators of its own that are shifted at the
// end. sum(t q) = sum(u q) - sum(q), the latter once a token.
//
// Activations lie in shared memory as B operands, kPitch 16-byte words from piece to piece, which is odd to spread the
// writes over the banks. A piece is what two instructions take: fields i and i + 1 of words j and j + 1 of a chunk, in the
// order i of j, i of j + 1, i + 1 of j, i + 1 of j + 1, so that each finds its two registers side by side. Where K does not fit, the host asks for slices of `slice_steps` steps and x is staged
// again for each.
//
// Bound: reading the packed weights, from some MB on; below that, latency: the trip of x, two reductions, three barriers.
// What made a difference on an H200, microseconds a launch in a chain of launches with a cold L2, in the order in which it
// was found (each number is of the kernel as it was then; floor: only reading the weights):
//   - digits instead of float16 operands, masks without shifts: 28672 x 4096 float 21.0 -> 14.2, int8 13.9 -> 13.5.
//   - whole cache lines (spread): the same int8 13.5 -> 10.0 (floor 8.1).
//   - weights loaded before the wait: only with plain loads, ptxas moves ld.global.nc below it: 10.0 -> 9.4.
//   - code that is jumped over costs its fetching: the rescue of extreme tokens as a second turn of a loop instead of a copy
//     of the code, no branches for rows that are not aligned: 9.4 -> 9.0, 576 x 576 1.67 -> 1.60.
//   - rounding by an addition instead of F2I, the next kernel one ahead instead of as many as fit: 576 x 576 1.60 -> 1.53
//     (floor 1.34), 2560 x 6912 4.04 -> 3.86 (2.43). Without starting early: 2.47, 5.81.
//   - the token in registers for two tokens too: 2560 x 2560 3.7 -> 2.8.
// Tried and dropped: clusters of 2 to 8 blocks that quantise a part of x each and write it to one another (4096 x 14336:
// 16.3 instead of 8.6); a rehearsal of the whole path on zeros before the wait, to have its instructions fetched (2560 x
// 2560: 4.3 instead of 3.0); column sums by a product with ones (13824 x 2560: 1.3 more, the same sums in every warp).
// Not tried: bulk copies into shared memory, tile-contiguous packing, binary tensor cores (b1 m16n8k256 on bit planes, native
// from sm_80 to sm_90, would need no masks at all).
// Where the rest goes (2560 x 6912, 3.9, floor 2.4): 0.5 from the end of one kernel to the wait's return in the next, 1.3 for
// x and the norm (every block reads all of x and gamma: 28 KB from L2), 0.4 quantisation, 1.1 products, 0.3 the end.
#pragma once
#include "ffn.cuh"
#include "fragments.cuh"
#include "token_scale.cuh"

// The compile-time shape of one specialisation. X: float, __half or __nv_bfloat16.
template <typename X_, bool kNorm_, bool kGammaF32_, bool kAligned_, bool kInt8_, int kTokens_, int kSpread_,
          int kSplit_, int kAhead_, int kThreads_, int kHeld_>
struct ProductShape {
  using X = X_;
  static constexpr bool kNorm = kNorm_, kGammaF32 = kGammaF32_, kAligned = kAligned_, kInt8 = kInt8_;
  static constexpr int kTokens = kTokens_, kSpread = kSpread_, kSplit = kSplit_, kAhead = kAhead_, kThreads = kThreads_,
                       kHeld = kHeld_;
  static constexpr int kWarps = kThreads / 32, kRowWarps = kWarps / kSplit, kRows = kBlockRows / kSpread,
                       kTile = kRowWarps * kRows, kStep = kSplit * kAhead;  // units
  static constexpr int kDigits = kInt8 ? 1 : sizeof(X) == 4 ? 6 : 4;
  static constexpr int kTokenColumns = kInt8 ? 1 : sizeof(X) == 4 ? 8 : 4;  // those of the digits, and unused ones
  static constexpr int kUnitColumns = kTokens * kTokenColumns;              // of one block of 256 k
  static constexpr int kColumnTiles = (kUnitColumns * kSpread + kColumns - 1) / kColumns;
  static constexpr int kStaged = kTokens * kDigits;  // columns in shared memory
  static constexpr int kPitch = kStaged * kBlockChunks + 1, kStagedBlock = 4 * kPitch,
                       kStagedUnit = kSpread * kStagedBlock;
  static constexpr int kGroup = kSplit * 32;     // threads that share rows
  static constexpr int kPlaces = kTokenColumns;  // neighbouring threads that share a result, a digit each
  static constexpr int kResults = (kRows * kTokens * kPlaces + kGroup - 1) / kGroup;  // of a thread
  static constexpr int kShares = kSplit * kSpread;                                    // that a result is the sum of
  using Threads = Share<kTokens, kThreads>;
  static_assert(kThreads % 32 == 0 && kWarps % kSplit == 0, "the warps are kRowWarps x kSplit");
  static_assert(8 % kSpread == 0, "a lane has two rows of W");
};

// A lane's two rows of a tile; null where they do not exist.
struct Rows {
  const uint4 *low, *high;
};

template <typename S>
struct Weights {
  uint4 low[S::kAhead], high[S::kAhead];
};

// Results that this thread has to do with, i = thread, thread + kGroup, ... of its group: digit i % kPlaces of row
// i / kPlaces % kRows and token i / kPlaces / kRows. The first of the kPlaces threads stores it.
template <typename S>
struct Results {
  int row[S::kResults], token[S::kResults];  // of the group's rows, and of the block's tokens
  bool exists[S::kResults];                  // the token does, and the digit

  __device__ __forceinline__ Results(int n0, int N) {
#pragma unroll
    for (int r = 0; r < S::kResults; ++r) {
      const int i = threadIdx.x % S::kGroup + r * S::kGroup;
      row[r] = i / S::kPlaces % S::kRows;
      token[r] = i / S::kPlaces / S::kRows;
      exists[r] = token[r] < S::kTokens && n0 + token[r] < N && place() < S::kDigits;
    }
  }
  static __device__ __forceinline__ int place() { return threadIdx.x % S::kPlaces; }
};

// What they need beside the sum: loaded with the tile's first weights, and there when the sums are.
template <typename S>
struct Tail {
  float scale[S::kResults];
  typename S::X residual[S::kResults];  // converted when it is added
};

__device__ __forceinline__ unsigned word(const uint4& v, int j) {
  return j == 0 ? v.x : j == 1 ? v.y : j == 2 ? v.z : v.w;
}

// First of the rows that this warp computes in a tile.
template <typename S>
__device__ __forceinline__ int first_row(int tile) {
  return tile * S::kTile + int(threadIdx.x / S::kGroup) * S::kRows;
}

template <typename S>
__device__ __forceinline__ Rows rows_of(const uint4* w, int M, int C, int tile) {
  const int row = first_row<S>(tile) + threadIdx.x % 32 / (4 * S::kSpread);
  const uint4* low = w + (long long)row * C;
  return {row < M ? low : nullptr, row + S::kRows / 2 < M ? low + (long long)(S::kRows / 2) * C : nullptr};
}

// The unit that this warp takes as its a-th of a step.
template <typename S>
__device__ __forceinline__ int own_unit(int step, int a) {
  return step * S::kStep + a * S::kSplit + int(threadIdx.x / 32 % S::kSplit);
}

template <typename S>
__device__ __forceinline__ void load_weights(Weights<S>& weights, int a, const Rows& rows, int C, int step) {
  const int c = own_unit<S>(step, a) * (4 * S::kSpread) + threadIdx.x % (4 * S::kSpread);
  weights.low[a] = rows.low != nullptr && c < C ? load_once(rows.low + c) : make_uint4(0u, 0u, 0u, 0u);
  weights.high[a] = rows.high != nullptr && c < C ? load_once(rows.high + c) : make_uint4(0u, 0u, 0u, 0u);
}

template <typename S>
__device__ __forceinline__ void load_scales(Tail<S>& tail, const Results<S>& results, const float* scale, int stride,
                                            int tile, int M) {
#pragma unroll
  for (int r = 0; r < S::kResults; ++r) {
    const int row = first_row<S>(tile) + results.row[r];
    tail.scale[r] = results.exists[r] && row < M ? scale[(long long)row * stride] : 0.f;
  }
}

template <typename S>
__device__ __forceinline__ void load_residuals(Tail<S>& tail, const Results<S>& results, const typename S::X* residual,
                                               int tile, int n0, int M) {
#pragma unroll
  for (int r = 0; r < S::kResults; ++r) {
    const int row = first_row<S>(tile) + results.row[r];
    if (residual != nullptr && results.exists[r] && row < M) {
      tail.residual[r] = residual[(long long)(n0 + results.token[r]) * M + row];
    }
  }
}

// Where a column's activations start within a staged unit, in 16-byte words; an unused column repeats a used one, and its
// results are never looked at.
template <typename S>
__device__ __forceinline__ int staged_column(int column) {
  const int block = min(column / S::kUnitColumns, S::kSpread - 1), rest = column % S::kUnitColumns;
  const int digit = min(rest % S::kTokenColumns, S::kDigits - 1);
  return block * S::kStagedBlock + (rest / S::kTokenColumns * S::kDigits + digit) * kBlockChunks;
}

// Accumulators of the four fields of a byte; field i counts 4^i times.
template <typename S>
struct Sums {
  int of[S::kColumnTiles][4][4];

  __device__ __forceinline__ int total(int tile, int i) const {
    return of[tile][0][i] + (of[tile][1][i] >> 2) + (of[tile][2][i] >> 4) + (of[tile][3][i] >> 6);
  }
};

// sums += the lanes' codes of a unit times its staged activations.
template <typename S>
__device__ __forceinline__ void multiply_unit(Sums<S>& sums, const uint4& low, const uint4& high, const uint4* staged) {
  const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
#pragma unroll
  for (int t = 0; t < S::kColumnTiles; ++t) {
    const uint4* own = staged + staged_column<S>(t * kColumns + g) + q;
#pragma unroll
    for (int j = 0; j < 4; j += 2) {
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const uint4 b = own[(j + i / 2) * S::kPitch];
#pragma unroll
        for (int f = i; f < i + 2; ++f) {
          const unsigned mask = 0x03030303u << (2 * f);
          const unsigned a[4] = {word(low, j) & mask, word(high, j) & mask, word(low, j + 1) & mask,
                                 word(high, j + 1) & mask};
          mma_u8s8(sums.of[t][f], a, f == i ? b.x : b.z, f == i ? b.y : b.w);
        }
      }
    }
  }
}

// Puts four activations of token t, k = 4 f .. 4 f + 3 of the slice, into shared memory; v is x g, or x without a norm.
template <typename S>
__device__ __forceinline__ void stage4(uint4* staged, int (&sums)[S::kDigits], float4 v, float factor, int t, int f) {
  unsigned digits[S::kDigits];
  if constexpr (S::kInt8) {
    digits[0] = unsigned(quantise4(v, factor));
  } else {
    digits4(digits, v * factor);
  }
  const unsigned block = f / 64u, q = f / 16u % 4u, word = f / 4u % 4u, field = f % 4u;
  uint4* piece =
      staged + block * S::kStagedBlock + (word / 2 * 2 + field / 2) * S::kPitch + t * S::kDigits * kBlockChunks + q;
#pragma unroll
  for (int d = 0; d < S::kDigits; ++d) {
    reinterpret_cast<unsigned*>(piece + d * kBlockChunks)[field % 2 * 2 + word % 2] = digits[d];
    sums[d] = __dp4a(int(digits[d]), 0x01010101, sums[d]);
  }
}

// Puts one slice of K of this thread's token into shared memory, zero beyond K and beyond N, and adds what its digits add
// up to to `sums`. `row` is null where there is no token. With kHeld > 0 the registers hold all there is to stage: the
// host sees to it.
template <typename S>
__device__ __forceinline__ void stage(uint4* staged, int (&sums)[S::kDigits], const Held<typename S::X, S::kHeld>& held,
                                      const typename S::X* row, const Gamma<typename S::X>& gamma,
                                      const TokenScale& scale, int K, int first_block, int blocks, bool aligned) {
  using Mine = typename S::Threads;
  const int t = Mine::token(), fields = blocks * 64;
  if constexpr (S::kHeld > 0) {
#pragma unroll
    for (int h = 0; h < S::kHeld; ++h) {
      const int f = Mine::thread() + h * Mine::kCount;
      if (f < fields) stage4<S>(staged, sums, held.xg[h], scale.factor, t, f);
    }
  } else {
#pragma unroll 4
    for (int f = Mine::thread(); f < fields; f += Mine::kCount) {
      const int k = first_block * 256 + 4 * f;
      float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
      if (row != nullptr) v = load4_or_zero(row, k, K, aligned) * scale.pre;
      if (S::kNorm) v = v * gamma.at(k, K);
      stage4<S>(staged, sums, v, scale.factor, t, f);
    }
  }
}

// Adds up what the warps of the same rows have, through `partial` [kShares][kStaged][kRows], and stores the tile's results.
template <typename S>
__device__ __forceinline__ void finish(const Sums<S>& sums, int* partial, const Results<S>& results,
                                       const Tail<S>& tail, const int (&q_sum)[S::kResults],
                                       const float (&dequant)[S::kResults], bool has_residual, void* y, int y_dtype,
                                       int ffn, int tile, int n0, int M) {
  const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4, block = g % S::kSpread;
  const int share = threadIdx.x / 32 % S::kSplit * S::kSpread + block;
  int* own = partial + share * (S::kStaged * S::kRows) + g / S::kSpread;
#pragma unroll
  for (int t = 0; t < S::kColumnTiles; ++t) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      // This lane's column, counted from the first that belongs to the k of its rows.
      const int column = t * kColumns + 2 * q + i - block * S::kUnitColumns;
      const int token = column / S::kTokenColumns, digit = column % S::kTokenColumns;
      if (column >= 0 && column < S::kUnitColumns && digit < S::kDigits) {
        int* at = own + (token * S::kDigits + digit) * S::kRows;
        at[0] = sums.total(t, i);
        at[S::kRows / 2] = sums.total(t, 2 + i);
      }
    }
  }
  if (S::kSplit == 1) {
    __syncwarp();
  } else if (S::kRowWarps == 1) {
    __syncthreads();
  } else {
    barrier(1 + threadIdx.x / S::kGroup, S::kGroup);
  }
#pragma unroll
  for (int r = 0; r < S::kResults; ++r) {
    int total = 0;
    if (results.exists[r]) {
      const int* at = partial + (results.token[r] * S::kDigits + results.place()) * S::kRows + results.row[r];
#pragma unroll
      for (int s = 0; s < S::kShares; ++s) total += at[s * (S::kStaged * S::kRows)];
      total -= q_sum[r];
    }
    float sum = float(total);
    if constexpr (S::kPlaces > 1) {
      sum *= digit_weight(results.place());
#pragma unroll
      for (int d = 1; d < S::kPlaces; d *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, d);
    }
    int row = first_row<S>(tile) + results.row[r];
    const float added = has_residual && results.exists[r] && row < M ? to_float(tail.residual[r]) : 0.f;
    float value = fmaf(sum * dequant[r], tail.scale[r], added);
    if (ffn != kNoFfn) {
      const float up = __shfl_xor_sync(0xffffffffu, value, S::kPlaces);  // of the next row, for an even one
      value = ffn_activation(value, ffn);
      if (ffn & kGated) {
        value *= up;
        if (row % 2) row = M;
      }
    }
    if (results.exists[r] && results.place() == 0 && row < M) {
      const long long at = (long long)(n0 + results.token[r]) * M + row;
      store_as(y, at >> (ffn / kGated), value, y_dtype);  // gated: M is even
    }
  }
}

// See the head of this file. `gamma` [K] is null without kNorm.
template <typename S>
__device__ __forceinline__ void ternary_product(const typename S::X* x, const void* gamma, const uint4* w,
                                                const float* scale, int scale_stride, const typename S::X* residual,
                                                void* y, int y_dtype, int ffn, int M, int K, int N, float eps,
                                                int slice_steps) {
  using Mine = typename S::Threads;
  uint4* staged = dynamic_shared<uint4>();
  __shared__ __align__(16) int q_sums[S::kStaged][Mine::kWarps];
  __shared__ float dequants[S::kTokens];
  const int C = (K + 63) / 64, units = (C + 4 * S::kSpread - 1) / (4 * S::kSpread);
  const int steps = (units + S::kStep - 1) / S::kStep, tiles = (M + S::kTile - 1) / S::kTile;
  const bool sliced = slice_steps < steps;
  // Behind the activations: two sets of partial sums, so that the next tile's are written while the last are still read.
  constexpr int kPartial = S::kShares * S::kStaged * S::kRows;
  int* partial = reinterpret_cast<int*>(staged + min(units, slice_steps * S::kStep) * S::kStagedUnit) +
                 threadIdx.x / S::kGroup * (2 * kPartial);

#pragma unroll 1
  for (int n0 = blockIdx.y * S::kTokens; n0 < N; n0 += gridDim.y * S::kTokens) {
    const Results<S> results(n0, N);
    int tile = blockIdx.x, step = 0;
    Rows rows = rows_of<S>(w, M, C, tile);
    Weights<S> weights;
    Tail<S> tail;
#pragma unroll
    for (int a = 0; a < S::kAhead; ++a) load_weights<S>(weights, a, rows, C, step);
    load_scales<S>(tail, results, scale, scale_stride, tile, M);
    const TokenLength length(K);
    wait_for_previous_kernels();
    let_next_kernel_start();

    const bool aligned = S::kAligned || rows_aligned(x, K);
    const Gamma<typename S::X> norm(gamma, S::kGammaF32, K, S::kAligned);
    const typename S::X* row = n0 + Mine::token() < N ? x + (long long)(n0 + Mine::token()) * K : nullptr;
    Held<typename S::X, S::kHeld> held;
    const TokenScale own =
        token_scale<S::kNorm, S::kInt8, S::kTokens, S::kThreads>(held, row, norm, length, eps, aligned);
    load_residuals<S>(tail, results, residual, tile, n0, M);
    const float own_dequant = S::kInt8 ? own.dequant : own.dequant * kDigitUnit;
    if (S::kTokens > 1 && Mine::thread() == 0) dequants[Mine::token()] = own_dequant;

    Sums<S> sums = {};
    int first_unit = 0, digit_sums[S::kDigits] = {}, q_sum[S::kResults] = {};
    float dequant[S::kResults];
    bool stage_now = true, odd_tile = false;
#pragma unroll 1
    for (;;) {
      if (stage_now) {
        first_unit = step * S::kStep;
        const int staged_units = min(slice_steps * S::kStep, units - first_unit);
        if (first_unit == 0) {
#pragma unroll
          for (int d = 0; d < S::kDigits; ++d) digit_sums[d] = 0;
        }
        stage<S>(staged, digit_sums, held, row, norm, own, K, first_unit * S::kSpread, staged_units * S::kSpread,
                 aligned);
#pragma unroll
        for (int d = 0; d < S::kDigits; ++d) {
          const int sum = warp_sum(digit_sums[d]);
          if (threadIdx.x % 32 == 0) q_sums[Mine::token() * S::kDigits + d][Mine::thread() / 32] = sum;
        }
        __syncthreads();
#pragma unroll
        for (int r = 0; r < S::kResults; ++r) {
          q_sum[r] = 0;
          if (results.exists[r]) {
            dequant[r] = S::kTokens == 1 ? own_dequant : dequants[results.token[r]];
#pragma unroll
            for (int i = 0; i < Mine::kWarps; ++i) {
              q_sum[r] += q_sums[results.token[r] * S::kDigits + results.place()][i];
            }
          }
        }
      }

      const bool last_step = step + 1 == steps;
      const int next_step = last_step ? 0 : step + 1, next_tile = last_step ? tile + gridDim.x : tile;
      const bool more = next_tile < tiles;
      if (last_step) rows = more ? rows_of<S>(w, M, C, next_tile) : Rows{nullptr, nullptr};
#pragma unroll
      for (int a = 0; a < S::kAhead; ++a) {
        const int unit = own_unit<S>(step, a);
        if (unit < units) {
          multiply_unit<S>(sums, weights.low[a], weights.high[a], staged + (unit - first_unit) * S::kStagedUnit);
        }
        load_weights<S>(weights, a, rows, C, next_step);
      }
      if (last_step) {
        finish<S>(sums, partial + odd_tile * kPartial, results, tail, q_sum, dequant, residual != nullptr, y, y_dtype,
                  ffn, tile, n0, M);
        odd_tile = !odd_tile;
      }
      if (!more) break;
      if (last_step) {
        sums = {};
        load_scales<S>(tail, results, scale, scale_stride, next_tile, M);
        load_residuals<S>(tail, results, residual, next_tile, n0, M);
      }
      tile = next_tile;
      step = next_step;
      stage_now = sliced && step % slice_steps == 0;
      if (stage_now) __syncthreads();  // nobody multiplies with the last slice any more
    }
    if (n0 + gridDim.y * S::kTokens < N) __syncthreads();  // nor with the last tokens
  }
}
