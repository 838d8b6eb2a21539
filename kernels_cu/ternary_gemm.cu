// y = scale * (t @ a) (+ residual) for many tokens on the tensor cores; a comes from quantise_tiles.cu.
//
// Partition of work
//   grid     one block a tile of kRows rows x kTiles * 8 columns. Blocks that run together share a panel of up to
//            kPanel column tiles, row by row of tiles, so that both operands come from L2:
//
//                 columns ->                     then the next panel
//            rows   0   1   2 ..  7
//             |     8   9  10 .. 15
//
//   block    kSplits groups of WARP_ROWS x WARP_COLUMNS warps. A step is kSplits blocks of 256 k, one a group; what
//            the groups have summed is added up in shared memory at the end.
//   warp     ROW_TILES * 16 rows x COLUMN_TILES * 8 columns, 256 k at a time: per piece of the activations the weights
//            are unpacked once for all columns, then COLUMN_TILES 16-byte loads feed ROW_TILES * COLUMN_TILES * 2 mma.
//
// A ring of `stages` steps in shared memory is filled by cp.async; weights do not depend on earlier kernels, so their
// first copies are on the way before this one waits for its predecessor. A group copies what it alone reads: where it
// is one warp, warps run free of each other.
//
//     a group's part of a stage    weights [kRows][4 chunks q]     activations [kTiles][kPieces][8 columns][4 chunks q]
//
// so that a warp's operand loads are 512 consecutive bytes each.
//
// Arithmetic. int8: exact. Float: tensor cores cut off what float32 cannot hold instead of rounding it. One plane
// (float16 and bfloat16 x) can afford that, to some 250,000 k of one sign; with two (float32 x) each block of 256 k is summed on its own, and the
// blocks in ordinary float32.
//
// Bound: the tensor cores from some hundred tokens on; before, the trip of weights and activations from L2 and latency.
//
// Macros: INT8, PLANES (of float16; 1 with INT8), ROW_TILES, COLUMN_TILES, WARP_ROWS, WARP_COLUMNS, THREADS, RESIDENT
// blocks a multiprocessor that registers are left for, KERNEL_NAME.
#include "elements.cuh"
#include "ffn.cuh"
#include "fragments.cuh"

#if !defined(INT8) || !defined(PLANES) || !defined(ROW_TILES) || !defined(COLUMN_TILES) || !defined(WARP_ROWS) || \
    !defined(WARP_COLUMNS) || !defined(THREADS) || !defined(RESIDENT) || !defined(KERNEL_NAME)
#error "ternary_gemm.cu needs every macro that its head names"
#endif

constexpr int kPanel = 8;

template <bool kInt8_, int kPlanes_, int kRowTiles_, int kColumnTiles_, int kWarpRows_, int kWarpColumns_,
          int kThreads_>
struct GemmShape {
  using Operands = Fragments<kInt8_>;
  using Sum = typename Operands::Sum;
  static constexpr bool kInt8 = kInt8_;
  static constexpr int kPlanes = kPlanes_, kRowTiles = kRowTiles_, kColumnTiles = kColumnTiles_, kWarpRows = kWarpRows_,
                       kWarpColumns = kWarpColumns_, kThreads = kThreads_;
  static constexpr int kGroup = 32 * kWarpRows * kWarpColumns, kSplits = kThreads / kGroup;
  static constexpr int kRows = kBlockRows * kRowTiles * kWarpRows, kTiles = kColumnTiles * kWarpColumns,
                       kTokens = kColumns * kTiles / kPlanes;
  // In pieces of 16 bytes: one column tile and the weights of a block of 256 k; what a group has of a stage; a stage.
  static constexpr int kTilePieces = Operands::kPieces * kColumns * kBlockChunks, kWeightPieces = kRows * kBlockChunks,
                       kGroupPieces = kWeightPieces + kTiles * kTilePieces, kStagePieces = kSplits * kGroupPieces;
  // Sums on their way to y: [kSplits][kTokens][kPitch]. The pitch spreads the fragments' columns over the banks.
  static constexpr int kPitch = kRows + 4 * kPlanes;
  static_assert(kPlanes == 1 || (kPlanes == 2 && !kInt8), "int8 has one plane, float one or two");
  static_assert((kGroup & (kGroup - 1)) == 0 && kThreads % kGroup == 0, "a thread's copies are a fixed stride apart");
  static_assert(kWeightPieces % kGroup == 0 && kTiles * kTilePieces % kGroup == 0, "every thread copies as much");
};

// The copies of one thread: pieces t, t + kGroup, ... of its group's part of each stage.
template <typename S>
struct Copies {
  const uint4 *weights, *tiles;  // the thread's first piece of the next step
  int row_stride;                // pieces from one of its rows to the next
  int tile_stride;               // pieces of one column tile
  int t, rows, columns, chunks;  // how many are left, from the thread's first piece on

  __device__ __forceinline__ Copies(const uint4* w, const uint4* a, int M, int columns_, int C, int row0, int tile0)
      : t(threadIdx.x % S::kGroup) {
    const int B = (C + kBlockChunks - 1) / kBlockChunks, group = threadIdx.x / S::kGroup;
    const int row = row0 + t / kBlockChunks, chunk = group * kBlockChunks + t % kBlockChunks;
    const int tile = tile0 + t / S::kTilePieces;
    weights = w + (long long)row * C + chunk;
    tiles = a + ((long long)tile * B + group) * S::kTilePieces + t % S::kTilePieces;
    row_stride = S::kGroup / kBlockChunks * C;
    tile_stride = B * S::kTilePieces;
    rows = M - row;
    columns = columns_ - tile * kColumns - t / kBlockChunks % kColumns;
    chunks = C - chunk;
  }
  __device__ __forceinline__ void copy_weights(uint4* part) {
#pragma unroll
    for (int j = 0; j < S::kWeightPieces / S::kGroup; ++j) {
      const bool valid = j * (S::kGroup / kBlockChunks) < rows && chunks > 0;
      copy_async16(part + t + j * S::kGroup, weights + (long long)j * row_stride, valid);
    }
    weights += S::kSplits * kBlockChunks;
    chunks -= S::kSplits * kBlockChunks;
  }
  // Columns of no token are zero. `block_exists`: K does not end before this group's block of 256 k.
  __device__ __forceinline__ void copy_tiles(uint4* part, bool block_exists) {
#pragma unroll
    for (int j = 0; j < S::kTiles * S::kTilePieces / S::kGroup; ++j) {
      const int tile = j * S::kGroup / S::kTilePieces, within = j * S::kGroup % S::kTilePieces;
      const bool valid = tile * kColumns < columns && block_exists;
      copy_async16(part + S::kWeightPieces + t + j * S::kGroup, tiles + ((long long)tile * tile_stride + within),
                   valid);
    }
    tiles += S::kSplits * S::kTilePieces;
  }
};

// A operands of piece p: its first and second field.
__device__ __forceinline__ void unpack_piece(Fragments<true>, unsigned (&a)[2][4], unsigned low, unsigned high, int) {
  Fragments<true>::unpack(a, low, high);
}
__device__ __forceinline__ void unpack_piece(Fragments<false>, unsigned (&a)[2][4], unsigned low, unsigned high,
                                             int p) {
  if (p % 2 == 0) {
    Fragments<false>::unpack_field<0>(a[0], low, high);
    Fragments<false>::unpack_field<1>(a[1], low, high);
  } else {
    Fragments<false>::unpack_field<2>(a[0], low, high);
    Fragments<false>::unpack_field<3>(a[1], low, high);
  }
}
__device__ __forceinline__ void multiply(int (&sums)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  mma_u8s8(sums, a, b0, b1);
}
__device__ __forceinline__ void multiply(float (&sums)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  mma_f16(sums, a, b0, b1);
}

// sums += this warp's rows and columns over one block of 256 k.
template <typename S>
__device__ __forceinline__ void multiply_block(typename S::Sum (&sums)[S::kRowTiles][S::kColumnTiles][4],
                                               const uint4* part) {
  constexpr int kRowPieces = kBlockRows * kBlockChunks, kPieces = S::Operands::kPieces;
  constexpr int kUnroll = S::kRowTiles * S::kColumnTiles > 16 ? 1 : 2;  // large tiles: no registers for what comes next
  const int warp = threadIdx.x % S::kGroup / 32, lane = threadIdx.x % 32;
  const uint4* weights = part + warp / S::kWarpColumns * S::kRowTiles * kRowPieces + lane;
  const uint4* tiles = part + S::kWeightPieces + warp % S::kWarpColumns * S::kColumnTiles * S::kTilePieces + lane;
#pragma unroll kUnroll
  for (int half = 0; half < 2; ++half) {          // of the chunks
    uint2 low[S::kRowTiles], high[S::kRowTiles];  // rows g and g + 8
#pragma unroll
    for (int r = 0; r < S::kRowTiles; ++r) {
      low[r] = reinterpret_cast<const uint2*>(weights + r * kRowPieces)[half];
      high[r] = reinterpret_cast<const uint2*>(weights + r * kRowPieces + kRowPieces / 2)[half];
    }
#pragma unroll
    for (int i = 0; i < kPieces / 2; ++i) {
      const int p = half * (kPieces / 2) + i;
      const bool first = i < kPieces / 4;  // of the half's two words
      unsigned a[S::kRowTiles][2][4];
#pragma unroll
      for (int r = 0; r < S::kRowTiles; ++r) {
        unpack_piece(typename S::Operands(), a[r], first ? low[r].x : low[r].y, first ? high[r].x : high[r].y, p);
      }
#pragma unroll
      for (int c = 0; c < S::kColumnTiles; ++c) {
        const uint4 b = tiles[c * S::kTilePieces + p * (kColumns * kBlockChunks)];
#pragma unroll
        for (int r = 0; r < S::kRowTiles; ++r) multiply(sums[r][c], a[r][0], b.x, b.y);
#pragma unroll
        for (int r = 0; r < S::kRowTiles; ++r) multiply(sums[r][c], a[r][1], b.z, b.w);
      }
    }
  }
}

// Until all but the last stages - 2 groups of copies are there, and everyone who reads them knows.
template <typename S>
__device__ __forceinline__ void wait_for_stage(int stages) {
  if (stages == 2) {
    wait_for_copies<0>();
  } else if (stages == 3) {
    wait_for_copies<1>();
  } else {
    wait_for_copies<2>();
  }
  if (S::kGroup == 32) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}

// Up to four consecutive elements of y or of the residual; `vector`: all four, by one access.
struct Four {
  unsigned bits[4];
};

__device__ __forceinline__ Four load_four(const void* p, long long i, int count, int dtype, bool vector) {
  if (vector && dtype == kFloat32) {
    const uint4 v = *reinterpret_cast<const uint4*>(static_cast<const float*>(p) + i);
    return {{v.x, v.y, v.z, v.w}};
  }
  if (vector) {
    const uint2 v = *reinterpret_cast<const uint2*>(static_cast<const __half*>(p) + i);
    return {{v.x & 0xffffu, v.x >> 16, v.y & 0xffffu, v.y >> 16}};
  }
  Four four;
#pragma unroll
  for (int j = 0; j < 4; ++j) four.bits[j] = j < count ? load_bits(p, i + j, dtype) : 0u;
  return four;
}

__device__ __forceinline__ unsigned pair_bits(float a, float b, int dtype) {
  if (dtype == kFloat16) return f16_bits(a) | f16_bits(b) << 16;
  return __bfloat16_as_ushort(__float2bfloat16_rn(a)) | unsigned(__bfloat16_as_ushort(__float2bfloat16_rn(b))) << 16;
}
__device__ __forceinline__ void store_four(void* p, long long i, const float (&v)[4], int count, int dtype,
                                           bool vector) {
  if (vector && dtype == kFloat32) {
    *reinterpret_cast<float4*>(static_cast<float*>(p) + i) = make_float4(v[0], v[1], v[2], v[3]);
  } else if (vector) {
    *reinterpret_cast<uint2*>(static_cast<__half*>(p) + i) =
        make_uint2(pair_bits(v[0], v[1], dtype), pair_bits(v[2], v[3], dtype));
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (j < count) store_as(p, i + j, v[j], dtype);
    }
  }
}
__device__ __forceinline__ bool fours_aligned(const void* p, int M, int dtype) {
  return M % 4 == 0 && reinterpret_cast<unsigned long long>(p) % (dtype == kFloat32 ? 16 : 8) == 0;
}

// Four sums, or scales, of consecutive rows by one access.
template <typename T>
struct __align__(16) RowQuad {
  T v[4];
};
template <typename T>
__device__ __forceinline__ RowQuad<T> quad_at(const T* p) {
  return *reinterpret_cast<const RowQuad<T>*>(p);
}

// What the results need beside the sums, of the block's rows and tokens.
template <typename S>
struct Scales {
  __align__(16) float scale[S::kRows];
  float dequant[S::kTokens];
  int q_sum[S::kTokens];
};

// Brings this warp's sums to `exchange`; planes become one value.
template <typename S, typename Value, int kValues>
__device__ __forceinline__ void put_sums(Value* exchange, const Value (&sums)[S::kRowTiles][S::kColumnTiles][kValues]) {
  constexpr int kAcross = kValues / 2;  // tokens of a lane's two columns
  const int warp = threadIdx.x % S::kGroup / 32, g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
  const int row0 = warp / S::kWarpColumns * S::kRowTiles * kBlockRows + g;
  const int token0 = warp % S::kWarpColumns * S::kColumnTiles * (kColumns / S::kPlanes) + kAcross * q;
  Value* own = exchange + (threadIdx.x / S::kGroup * S::kTokens + token0) * S::kPitch + row0;
#pragma unroll
  for (int r = 0; r < S::kRowTiles; ++r)
#pragma unroll
    for (int c = 0; c < S::kColumnTiles; ++c)
#pragma unroll
      for (int i = 0; i < kValues; ++i) {
        const int token = c * (kColumns / S::kPlanes) + i % kAcross, row = r * kBlockRows + i / kAcross * 8;
        own[token * S::kPitch + row] = sums[r][c][i];
      }
}

// y from the sums of all groups: a thread has four consecutive rows, of every (kThreads * 4 / kRows)-th token.
template <typename S>
__device__ __forceinline__ void finish(const typename S::Sum* exchange, const Scales<S>& scales, const void* residual,
                                       int residual_dtype, void* y, int y_dtype, int ffn, int M, int N, int row0,
                                       int n0) {
  constexpr int kQuads = S::kRows / 4, kStride = S::kThreads / kQuads;
  constexpr int kBatch = S::kTokens > 4 * kStride ? 4 : 1;  // residuals in flight
  static_assert(S::kThreads % kQuads == 0, "a thread has the same rows all the time");
  const int row = threadIdx.x % kQuads * 4, count = M - row0 - row;
  const bool vector = fours_aligned(y, M, y_dtype);
  const bool residual_vector = fours_aligned(residual, M, residual_dtype);
  const RowQuad<float> scale = quad_at(scales.scale + row);
  if (count <= 0) return;
  for (int first = threadIdx.x / kQuads; first < min(S::kTokens, N - n0); first += kBatch * kStride) {
    Four added[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int token = first + b * kStride;
      if (residual != nullptr && token < S::kTokens && n0 + token < N) {
        const long long i = (long long)(n0 + token) * M + row0 + row;
        added[b] = load_four(residual, i, count, residual_dtype, residual_vector);
      }
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int token = first + b * kStride;
      if (token < S::kTokens && n0 + token < N) {
        RowQuad<typename S::Sum> sum = quad_at(exchange + token * S::kPitch + row);
#pragma unroll
        for (int s = 1; s < S::kSplits; ++s) {
          const auto more = quad_at(exchange + (s * S::kTokens + token) * S::kPitch + row);
#pragma unroll
          for (int j = 0; j < 4; ++j) sum.v[j] += more.v[j];
        }
        float v[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float value = float(S::kInt8 ? sum.v[j] - scales.q_sum[token] : sum.v[j]) * scales.dequant[token];
          const float plus = residual != nullptr ? float_of_bits(added[b].bits[j], residual_dtype) : 0.f;
          v[j] = fmaf(value, scale.v[j], plus);
        }
        const long long at = (long long)(n0 + token) * M + row0 + row;
        if (ffn == kNoFfn) {
          store_four(y, at, v, count, y_dtype, vector);
        } else if (ffn & kGated) {  // M is even, and so is count
          store_as(y, at / 2, ffn_activation(v[0], ffn) * v[1], y_dtype);
          if (count > 2) store_as(y, at / 2 + 1, ffn_activation(v[2], ffn) * v[3], y_dtype);
        } else {
#pragma unroll
          for (int j = 0; j < 4; ++j) v[j] = ffn_activation(v[j], ffn);
          store_four(y, at, v, count, y_dtype, vector);
        }
      }
    }
  }
}

template <typename S>
__device__ __forceinline__ void ternary_gemm(const uint4* tiles, const float* dequant, const int* q_sums,
                                             const uint4* w, const float* scale, int scale_stride, const void* residual,
                                             int residual_dtype, void* y, int y_dtype, int ffn, int M, int K, int N,
                                             int stages) {
  __shared__ __align__(16) Scales<S> scales;
  uint4* ring = dynamic_shared<uint4>();
  const int C = (K + 63) / 64, B = (C + kBlockChunks - 1) / kBlockChunks, steps = (B + S::kSplits - 1) / S::kSplits;
  const int group = threadIdx.x / S::kGroup;
  uint4* part = ring + group * S::kGroupPieces;

  const int row_tiles = (M + S::kRows - 1) / S::kRows, column_tiles = (N + S::kTokens - 1) / S::kTokens;
  const int panel = blockIdx.x / (kPanel * row_tiles), within = blockIdx.x % (kPanel * row_tiles);
  const int width = min(kPanel, column_tiles - panel * kPanel);
  const int row0 = within / width * S::kRows, column_tile = panel * kPanel + within % width;
  const int n0 = column_tile * S::kTokens;

  Copies<S> copies(w, tiles, M, N * S::kPlanes, C, row0, column_tile * S::kTiles);
  const int ahead = min(stages - 1, steps);
  for (int step = 0; step < ahead; ++step) copies.copy_weights(part + step * S::kStagePieces);
  for (int r = threadIdx.x; r < S::kRows; r += S::kThreads) {
    scales.scale[r] = row0 + r < M ? scale[(long long)(row0 + r) * scale_stride] : 0.f;
  }
  wait_for_previous_kernels();
  let_next_kernel_start();
  for (int step = 0; step < stages - 1; ++step) {
    if (step < steps) copies.copy_tiles(part + step * S::kStagePieces, step * S::kSplits + group < B);
    commit_copies();
  }
  for (int t = threadIdx.x; t < min(S::kTokens, N - n0); t += S::kThreads) {
    scales.dequant[t] = dequant[n0 + t];
    if (S::kInt8) scales.q_sum[t] = q_sums[n0 + t];
  }

  typename S::Sum sums[S::kRowTiles][S::kColumnTiles][4] = {};
  float totals[S::kRowTiles][S::kColumnTiles][2] = {};  // with two planes
  int now = 0, next = (stages - 1) * S::kStagePieces;
  for (int step = 0; step < steps; ++step) {
    wait_for_stage<S>(stages);
    const int coming = step + stages - 1;
    if (coming < steps) {
      copies.copy_weights(part + next);
      copies.copy_tiles(part + next, coming * S::kSplits + group < B);
    }
    commit_copies();
    if (step * S::kSplits + group < B) {
      multiply_block<S>(sums, part + now);
      if constexpr (S::kPlanes == 2) {
#pragma unroll
        for (int r = 0; r < S::kRowTiles; ++r)
#pragma unroll
          for (int c = 0; c < S::kColumnTiles; ++c)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              totals[r][c][i] += fmaf(sums[r][c][2 * i + 1], 1.f / kLowPlane, sums[r][c][2 * i]);
              sums[r][c][2 * i] = sums[r][c][2 * i + 1] = 0.f;
            }
      }
    }
    now = now == (stages - 1) * S::kStagePieces ? 0 : now + S::kStagePieces;
    next = next == (stages - 1) * S::kStagePieces ? 0 : next + S::kStagePieces;
  }

  __syncthreads();  // nobody reads the ring any more
  auto* exchange = reinterpret_cast<typename S::Sum*>(ring);
  if constexpr (S::kPlanes == 2) {
    put_sums<S>(exchange, totals);
  } else {
    put_sums<S>(exchange, sums);
  }
  __syncthreads();
  finish<S>(exchange, scales, residual, residual_dtype, y, y_dtype, ffn, M, N, row0, n0);
}

// No __restrict__ for what earlier kernels write: its loads could be moved before the wait.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
    KERNEL_NAME(const uint4* tiles,               // activations: quantise_tiles.cu
                const float* dequant,             // [N]
                const int* q_sums,                // [N]; float: null
                const uint4* __restrict__ w,      // [M, C] packed chunks, C = ceil(K / 64)
                const float* __restrict__ scale,  // [M], or one with scale_stride 0
                int scale_stride,                 //
                const void* residual,             // [N, M] of residual_dtype, or null; may be y itself
                int residual_dtype,               // 0 float16, 1 bfloat16, 2 float32
                void* y,                          // [N, M]
                int y_dtype,                      // as residual_dtype
                int ffn,                          // ffn.cuh: 0, or the activation of an FFN
                int M, int K, int N,              //
                int stages) {                     // steps that shared memory holds: 2 to 4
  using Shape = GemmShape<INT8, PLANES, ROW_TILES, COLUMN_TILES, WARP_ROWS, WARP_COLUMNS, THREADS>;
  ternary_gemm<Shape>(tiles, dequant, q_sums, w, scale, scale_stride, residual, residual_dtype, y, y_dtype, ffn, M, K,
                      N, stages);
}
