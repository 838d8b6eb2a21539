// Activations of ternary_gemm.cu: RMSNorm where asked for, then int8 or float16 planes in the tensor cores' operand
// layout. For many tokens it is cheaper to do this once a token than in every block of the product.
//
// tiles [ceil(N * PLANES / 8)][B blocks of 256 k][kPieces][8 columns][4 chunks q] of 16-byte pieces: fragments.cuh says
// what a piece holds. Token n, plane p is column PLANES * n + p; k >= K is zero. Columns of tokens >= N are not
// written.
//
// Partition of work: a token is one block, in units of 16 consecutive k, which are one piece of int8 or two of float16.
// Neighbouring threads take the same words of a block's four chunks, so that four lanes write 64 consecutive bytes:
//
//     thread        0    1    2    3     4    5    6    7   ...
//     chunk q       0    1    2    3     0    1    2    3
//     k of chunk    0 .. 15             16 .. 31
//
// The launch has a thread a unit, so that x g stays in registers from the reduction to the conversion. Only tokens of
// more than THREADS units are read again, from L1.
//
// Bound: latency (a trip of x and one reduction) for few tokens, HBM for very many. In between count the blocks that a
// multiprocessor holds, so registers (two units a thread, 103 of them: 16.7 us for 2048 x 2560 on an H200, where the
// bytes take 4), and the instructions an element, so values are rounded by an addition: a
// conversion to an integer has a fraction of its rate. Now 5 us with both.
//
// Macros: X_T (float, __half, __nv_bfloat16), NORM, INT8, PLANES (of float16; 1 with INT8), THREADS (of a block at most),
// KERNEL_NAME.
#include "fragments.cuh"
#include "token_scale.cuh"

#if !defined(X_T) || !defined(NORM) || !defined(INT8) || !defined(PLANES) || !defined(THREADS) || !defined(KERNEL_NAME)
#error "quantise_tiles.cu needs X_T, NORM, INT8, PLANES, THREADS and KERNEL_NAME"
#endif

static_assert(PLANES == 1 || (PLANES == 2 && !INT8), "int8 has one plane, float one or two");

constexpr int kUnitLength = 16, kUnitFields = 4, kBlockUnits = 16;  // k of a unit, its fields; units of 256 k

// A unit of a row, as loaded.
template <typename T>
struct Unit {
  uint4 bits[sizeof(T)];
};

template <typename T>
__device__ __forceinline__ bool units_aligned(const T* p, int length) {
  return length % kUnitLength == 0 && reinterpret_cast<unsigned long long>(p) % 16 == 0;
}

// Elements k .. k + 15; zero beyond the end.
template <typename T>
__device__ __forceinline__ Unit<T> load_unit(const T* row, int k, int length, bool aligned) {
  Unit<T> unit = {};
  if (__builtin_expect(aligned, 1)) {
    if (k < length) {
#pragma unroll
      for (int i = 0; i < int(sizeof(T)); ++i) unit.bits[i] = reinterpret_cast<const uint4*>(row + k)[i];
    }
  } else {
#pragma unroll
    for (int f = 0; f < 4; ++f) {
      const Quad<T> quad = load_quad(row, k + 4 * f, length, false);
      if constexpr (sizeof(T) == 4) {
        unit.bits[f] = quad.bits;
      } else if (f % 2 == 0) {
        unit.bits[f / 2].x = quad.bits.x, unit.bits[f / 2].y = quad.bits.y;
      } else {
        unit.bits[f / 2].z = quad.bits.x, unit.bits[f / 2].w = quad.bits.y;
      }
    }
  }
  return unit;
}

// Its field f: four elements.
template <typename T>
__device__ __forceinline__ float4 field_of(const Unit<T>& unit, int f) {
  if constexpr (sizeof(T) == 4) {
    return unpack(Quad<T>{unit.bits[f]});
  } else {
    const uint4& bits = unit.bits[f / 2];
    return unpack(Quad<T>{f % 2 == 0 ? make_uint2(bits.x, bits.y) : make_uint2(bits.z, bits.w)});
  }
}

// The norm weight, float32 or x's dtype (a run-time choice); the narrower one lies in the first half of a unit.
template <typename X>
struct GammaUnits {
  const void* data;
  bool is_float32, aligned;

  __device__ __forceinline__ GammaUnits(const void* data, int is_float32, int K)
      : data(data),
        is_float32(sizeof(X) == 4 || is_float32),
        aligned(this->is_float32 ? units_aligned(static_cast<const float*>(data), K)
                                 : units_aligned(static_cast<const X*>(data), K)) {}
  __device__ __forceinline__ Unit<float> load(int k, int K) const {
    if (is_float32) return load_unit(static_cast<const float*>(data), k, K, aligned);
    const Unit<X> narrow = load_unit(static_cast<const X*>(data), k, K, aligned);
    return {{narrow.bits[0], narrow.bits[1]}};
  }
  __device__ __forceinline__ float4 field(const Unit<float>& unit, int f) const {
    if (is_float32) return field_of(unit, f);
    return field_of(Unit<X>{{unit.bits[0], unit.bits[1]}}, f);
  }
};

// First k of a unit.
__device__ __forceinline__ int first_k(int unit) {
  return unit / kBlockUnits * 256 + unit % kBlockChunks * 64 + unit / kBlockChunks % 4 * kUnitLength;
}

// The shares of the block's warps. Summed four at a time; what is beyond the last warp is zero.
template <int kWarps>
struct WarpShares {
  __align__(16) float squares[kWarps + 4];
  __align__(16) unsigned absmax[kWarps + 4];
};

// Sum and maximum over the block, in every thread.
template <bool kNorm, int kWarps>
__device__ __forceinline__ TokenStats reduce_block(TokenStats stats, WarpShares<kWarps>& shares) {
  const int warps = blockDim.x / 32;
  reduce_warp<kNorm>(stats, shares.squares, shares.absmax, threadIdx.x / 32);
  if (threadIdx.x < 4) shares.squares[warps + threadIdx.x] = 0.f, shares.absmax[warps + threadIdx.x] = 0u;
  __syncthreads();
  float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
  unsigned top = 0u;
#pragma unroll 1  // rarely more than twice
  for (int w = 0; w < warps; w += 4) {
    const uint4 a = *reinterpret_cast<const uint4*>(shares.absmax + w);
    top = max(max(top, max(a.x, a.y)), max(a.z, a.w));
    if (kNorm) {
      const float4 s = *reinterpret_cast<const float4*>(shares.squares + w);
      sum = make_float4(sum.x + s.x, sum.y + s.y, sum.z + s.z, sum.w + s.w);
    }
  }
  return {(sum.x + sum.y) + (sum.z + sum.w), top};
}

// Four quantised values as bytes. Their magnitude is below 127.5 by the choice of the factor (any, where the result is
// NaN anyway), so that adding 1.5 * 2^23 rounds to the nearest, ties to even, and leaves the integer in the low byte.
__device__ __forceinline__ unsigned quantise_field(float4 v, float factor) {
  constexpr float kRound = 12582912.f;
  const unsigned a = unsigned(__float_as_int(v.x * factor + kRound)),
                 b = unsigned(__float_as_int(v.y * factor + kRound));
  const unsigned c = unsigned(__float_as_int(v.z * factor + kRound)),
                 d = unsigned(__float_as_int(v.w * factor + kRound));
  return __byte_perm(__byte_perm(a, b, 0x0040u), __byte_perm(c, d, 0x0040u), 0x5410u);
}

template <typename X, bool kNorm, bool kInt8, int kPlanes, int kThreads>
__device__ __forceinline__ void quantise_tiles(const X* x, const GammaUnits<X>& gamma, uint4* tiles, float* dequant,
                                               int* q_sums, int K, float eps) {
  constexpr int kPieces = Fragments<kInt8>::kPieces;
  __shared__ WarpShares<kThreads / 32> shares;
  const TokenLength length(K);
  const int n = blockIdx.x, blocks = (K + 255) / 256, units = blocks * kBlockUnits, round = blockDim.x;
  const X* row = x + (long long)n * K;
  const bool aligned = units_aligned(x, K);
  if (kInt8 && threadIdx.x == 0) q_sums[n] = 0;  // before the barrier; every warp adds to it

  // x g of a unit, and its part of the statistics.
  float4 v[kUnitFields];
  const auto load = [&](int unit, float pre, TokenStats& stats) {
    const int k = first_k(unit);
    const Unit<X> bits = load_unit(row, k, K, aligned);
    Unit<float> gamma_bits;
    if (kNorm) gamma_bits = gamma.load(k, K);
#pragma unroll
    for (int f = 0; f < kUnitFields; ++f) {
      v[f] = field_of(bits, f) * pre;
      if (kNorm) {
        stats.squares += squares4(v[f]);
        v[f] = v[f] * gamma.field(gamma_bits, f);
      }
      stats.absmax = max(stats.absmax, absmax4(v[f]));
    }
  };
  const auto measure = [&](float pre) {
    TokenStats stats{0.f, 0u};
    for (int unit = threadIdx.x; unit < units; unit += round) load(unit, pre, stats);
    stats = reduce_block<kNorm>(stats, shares);
    return finish_scale<kNorm, kInt8, 1>(&stats.squares, &stats.absmax, length, eps, pre);
  };
  TokenScale scale = measure(1.f);
  if (kNorm && __builtin_expect(scale.dequant < 0.f, 0)) {
    __syncthreads();  // every thread has read the first attempt
    scale = measure(scale.pre);
  }
  if (threadIdx.x == 0) dequant[n] = scale.dequant;

  const int column = kPlanes * n % kColumns;
  uint4* tile = tiles + ((long long)(kPlanes * n / kColumns) * blocks * (kPieces * kColumns) + column) * kBlockChunks;
  int sum = 0;
  for (int unit = threadIdx.x; unit < units; unit += round) {
    if (units > round) {
      TokenStats ignored{0.f, 0u};
      load(unit, scale.pre, ignored);
    }
    // Pieces are counted through all blocks.
    uint4* at = tile + unit / kBlockChunks * (kPieces / 4) * (kColumns * kBlockChunks) + unit % kBlockChunks;
    if constexpr (kInt8) {
      unsigned words[kUnitFields];
#pragma unroll
      for (int f = 0; f < kUnitFields; ++f) {
        words[f] = quantise_field(v[f], scale.factor);
        sum = __dp4a(int(words[f]), 0x01010101, sum);
      }
      *at = make_uint4(words[0], words[1], words[2], words[3]);
    } else {
#pragma unroll
      for (int f = 0; f < kUnitFields; f += 2, at += kColumns * kBlockChunks) {
        const float4 a = v[f] * scale.factor, b = v[f + 1] * scale.factor;
        const uint2 high_a = high_plane(a), high_b = high_plane(b);
        *at = make_uint4(high_a.x, high_a.y, high_b.x, high_b.y);
        if (kPlanes == 2) {
          const uint2 low_a = low_plane(a), low_b = low_plane(b);
          at[kBlockChunks] = make_uint4(low_a.x, low_a.y, low_b.x, low_b.y);
        }
      }
    }
  }
  if (kInt8) {
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) atomicAdd(q_sums + n, sum);
  }
}

// No __restrict__: loads of what earlier kernels write could be moved before the wait.
extern "C" __global__ void __launch_bounds__(THREADS)
    KERNEL_NAME(const X_T* x,          // [N, K], a block each
                const void* gamma,     // [K], float32 or x's dtype; null without NORM
                int gamma_is_float32,  //
                uint4* tiles,          // see above
                float* dequant,        // [N]: the value is about the tile's times dequant; NaN if not finite
                int* q_sums,           // [N] sum of the quantised values; float: null
                int K, float eps) {
  wait_for_previous_kernels();
  let_next_kernel_start();
  quantise_tiles<X_T, NORM, INT8, PLANES, THREADS>(x, GammaUnits<X_T>(gamma, gamma_is_float32, K), tiles, dequant,
                                                   q_sums, K, eps);
}
