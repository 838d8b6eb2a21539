// Activations of ternary_gemm.cu: RMSNorm where asked for, then int8 or float16 planes in the tensor cores' operand
// layout. For many tokens it is cheaper to do this once a token than in every block of the product.
//
// tiles [ceil(N * PLANES / 8)][B blocks of 256 k][kPieces][8 columns][4 chunks q] of 16-byte pieces: fragments.cuh says
// what a piece holds. Token n, plane p is column PLANES * n + p; k >= K is zero. Columns of tokens >= N are not
// written.
//
// Partition of work: one token a block at a time, in units of 16 consecutive k, which are one piece of int8 or two of
// float16. Neighbouring threads take the same words of a block's four chunks, so that four lanes write 64 consecutive
// bytes:
//
//     thread        0    1    2    3     4    5    6    7   ...
//     chunk q       0    1    2    3     0    1    2    3
//     k of chunk    0 .. 15             16 .. 31
//
// A thread has kUnits units at a time, all loaded before the first is used. They stay in registers from the reduction
// to the conversion, unless the token is longer than kUnits * THREADS of them: then it is read again, from L1.
//
// Bound: latency (a trip of x and one reduction) for few tokens, HBM for very many.
//
// Macros: X_T (float, __half, __nv_bfloat16), NORM, INT8, PLANES (of float16; 1 with INT8), THREADS, KERNEL_NAME.
#include "fragments.cuh"
#include "token_scale.cuh"

#if !defined(X_T) || !defined(NORM) || !defined(INT8) || !defined(PLANES) || !defined(THREADS) || !defined(KERNEL_NAME)
#error "quantise_tiles.cu needs X_T, NORM, INT8, PLANES, THREADS and KERNEL_NAME"
#endif

static_assert(PLANES == 1 || (PLANES == 2 && !INT8), "int8 has one plane, float one or two");

constexpr int kUnits = 2, kUnitLength = 16, kBlockUnits = 16;  // units of a thread; k of a unit; units of 256 k

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

template <typename X, bool kNorm, bool kInt8, int kPlanes, int kThreads>
__device__ __forceinline__ void quantise_tiles(const X* x, const GammaUnits<X>& gamma, uint4* tiles, float* dequant,
                                               int* q_sums, int K, int N, float eps) {
  const TokenLength length(K);
  constexpr int kPieces = Fragments<kInt8>::kPieces, kWarps = kThreads / 32, kRound = kUnits * kThreads;
  __shared__ __align__(16) float squares[kWarps];
  __shared__ __align__(16) unsigned absmax[kWarps];
  __shared__ int q_sum;
  const bool aligned = units_aligned(x, K);
  const int blocks = (K + 255) / 256, units = blocks * kBlockUnits;

  for (int n = blockIdx.x; n < N; n += gridDim.x) {
    const X* row = x + (long long)n * K;
    Unit<X> held[kUnits];
    Unit<float> held_gamma[kUnits];
    const auto first_k = [&](int unit) {
      return unit / kBlockUnits * 256 + unit % kBlockChunks * 64 + unit / kBlockChunks % 4 * kUnitLength;
    };
    const auto load = [&](int first) {
#pragma unroll
      for (int i = 0; i < kUnits; ++i) {
        const int k = first_k(first + i * kThreads + threadIdx.x);
        held[i] = load_unit(row, k, K, aligned);
        if (kNorm) held_gamma[i] = gamma.load(k, K);
      }
    };

    TokenScale scale{1.f, 0.f, 0.f};
    if (threadIdx.x == 0) q_sum = 0;
    do {
      const float pre = scale.pre;
      TokenStats stats{0.f, 0u};
      for (int first = 0; first < units; first += kRound) {
        load(first);
#pragma unroll
        for (int i = 0; i < kUnits; ++i)
#pragma unroll
          for (int f = 0; f < 4; ++f) {
            float4 v = field_of(held[i], f) * pre;
            if (kNorm) {
              stats.squares += squares4(v);
              v = v * gamma.field(held_gamma[i], f);
            }
            stats.absmax = max(stats.absmax, absmax4(v));
          }
      }
      reduce_warp<kNorm>(stats, squares, absmax, threadIdx.x / 32);
      __syncthreads();
      scale = finish_scale<kNorm, kInt8, kWarps>(squares, absmax, length, eps, pre);
      __syncthreads();  // both arrays are free again
    } while (kNorm && __builtin_expect(scale.dequant < 0.f, 0));

    const int column = kPlanes * n % kColumns;
    uint4* tile = tiles + (long long)n * kPlanes / kColumns * blocks * (kPieces * kColumns * kBlockChunks);
    int sum = 0;
    for (int first = 0; first < units; first += kRound) {
      if (units > kRound) load(first);
#pragma unroll
      for (int i = 0; i < kUnits; ++i) {
        const int unit = first + i * kThreads + threadIdx.x;
        if (unit >= units) break;
        float4 v[4];
#pragma unroll
        for (int f = 0; f < 4; ++f) {
          v[f] = field_of(held[i], f) * scale.pre;
          if (kNorm) v[f] = v[f] * gamma.field(held_gamma[i], f);
        }
        const int piece = unit / kBlockChunks * (kPieces / 4);  // counted through all blocks
        uint4* at = tile + (piece * kColumns + column) * kBlockChunks + unit % kBlockChunks;
        if constexpr (kInt8) {
          int words[4];
#pragma unroll
          for (int f = 0; f < 4; ++f) {
            words[f] = quantise4(v[f], scale.factor);
            sum = __dp4a(words[f], 0x01010101, sum);
          }
          *at = make_uint4(words[0], words[1], words[2], words[3]);
        } else {
#pragma unroll
          for (int f = 0; f < 4; f += 2, at += kColumns * kBlockChunks) {
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
    }
    if (threadIdx.x == 0) dequant[n] = scale.dequant;
    if (kInt8) {
      sum = warp_sum(sum);
      if (threadIdx.x % 32 == 0) atomicAdd(&q_sum, sum);
      __syncthreads();
      if (threadIdx.x == 0) q_sums[n] = q_sum;
    }
  }
}

// No __restrict__: loads of what earlier kernels write could be moved before the wait.
extern "C" __global__ void __launch_bounds__(THREADS)
    KERNEL_NAME(const X_T* x,          // [N, K]
                const void* gamma,     // [K], float32 or x's dtype; null without NORM
                int gamma_is_float32,  //
                uint4* tiles,          // see above
                float* dequant,        // [N]: the value is about the tile's times dequant; NaN if not finite
                int* q_sums,           // [N] sum of the quantised values; float: null
                int K, int N, float eps) {
  let_next_kernel_start();
  wait_for_previous_kernels();
  quantise_tiles<X_T, NORM, INT8, PLANES, THREADS>(x, GammaUnits<X_T>(gamma, gamma_is_float32, K), tiles, dequant,
                                                   q_sums, K, N, eps);
}
