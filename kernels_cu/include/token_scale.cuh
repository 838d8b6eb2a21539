// What one token's elements have to be multiplied with: the RMSNorm factor and that of the operand format, from one pass
// over the token and one reduction over the threads that share it.
//
// With r = 1 / sqrt(mean(x^2) + eps), the quantised value of n = x r g is round(n * 127 / absmax(n)) and r cancels in it:
// round(x g * 127 / absmax(x g)). So the sum of squares and the absmax are found in the same pass; r only enters the
// scale of the result, and the quantiser's floor absmax(n) >= 1e-5 becomes absmax(x g) >= 1e-5 / r. Float activations
// (float16 planes or digits: fragments.cuh) go the same way with the power of two that brings absmax(x g) into [2^14, 2^15).
//
// float32 cannot hold the squares of elements above 2^63 or far below 2^-63. A token whose mean square leaves
// [1e-30, 1e30] is done again with its elements multiplied by 2^-80 or 2^80 (`pre`), which cancels in the same way. That
// branch is taken practically never. What float32 with -ftz=true cannot hold beside the result stays out: subnormal
// elements count as zero, as do those below 2^-46 in a token whose root mean square is above 1e15.
#pragma once
#include "elements.cuh"
#include "ptx.cuh"

constexpr float kQMax = 127.f;
constexpr float kAbsmaxFloor = 1e-5f;
constexpr unsigned kInfBits = 0x7f800000u;

struct TokenScale {
  float pre;      // multiply x by this first (1, or a power of two for extreme tokens)
  float factor;   // int8: the quantised value is round((x pre g) factor); float: (x pre g) factor is below 2^15
  float dequant;  // the normalised value is about that times dequant; NaN for a token that is not finite
};

// Elements of one token that a thread keeps in registers between the reduction and the staging, so that x crosses L2 once:
// four consecutive k of every 4 * kCount, kCount threads to the token. First as loaded, then as x g pre.
template <typename X, int kHeld>
struct Held {
  Quad<X> x[kHeld];
  typename Gamma<X>::Four gamma[kHeld];
  float4 xg[kHeld];
};
template <typename X>
struct Held<X, 0> {};

// Only issues the loads: nothing here may wait for one. `row` null: there is no such token, and all is zero.
template <bool kNorm, int kCount, typename X, int kHeld>
__device__ __forceinline__ void load_held(Held<X, kHeld>& held, const X* row, const Gamma<X>& gamma, int K,
                                          bool aligned, int thread) {
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int k = 4 * (thread + i * kCount);
    held.x[i] = load_quad(row, k, row == nullptr ? 0 : K, aligned);
    if (kNorm) held.gamma[i] = gamma.load(k, K);
  }
}

// Sum of squares and largest |x g| of this thread's share of a token. The absmax travels as the bits of a non-negative
// float, which compare like unsigned integers and put inf and NaN above every number, so that neither is lost.
struct TokenStats {
  float squares;
  unsigned absmax;
};

__device__ __forceinline__ float squares4(float4 v) {
  return (v.x * v.x + v.y * v.y) + (v.z * v.z + v.w * v.w);
}

__device__ __forceinline__ unsigned absmax4(float4 v) {
  const unsigned a = max(unsigned(__float_as_int(fabsf(v.x))), unsigned(__float_as_int(fabsf(v.y))));
  const unsigned b = max(unsigned(__float_as_int(fabsf(v.z))), unsigned(__float_as_int(fabsf(v.w))));
  return max(a, b);
}

// `thread` of the kCount that share the token.
template <typename X, bool kNorm, int kCount>
__device__ __forceinline__ TokenStats thread_stats(const X* row, const Gamma<X>& gamma, int K, bool aligned, float pre,
                                                   int thread) {
  TokenStats s{0.f, 0u};
#pragma unroll 4
  for (int k = 4 * thread; k < K; k += 4 * kCount) {
    float4 v = load4_or_zero(row, k, K, aligned) * pre;
    if (kNorm) {
      s.squares += squares4(v);
      v = v * gamma.at(k, K);
    }
    s.absmax = max(s.absmax, absmax4(v));
  }
  return s;
}

// The same from registers, which then hold x g pre.
template <bool kNorm, typename X, int kHeld>
__device__ __forceinline__ TokenStats held_stats(Held<X, kHeld>& held, const Gamma<X>& gamma, float pre) {
  TokenStats s{0.f, 0u};
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    held.xg[i] = unpack(held.x[i]) * pre;
    if (kNorm) {
      s.squares += squares4(held.xg[i]);
      held.xg[i] = held.xg[i] * gamma.value(held.gamma[i]);
    }
    s.absmax = max(s.absmax, absmax4(held.xg[i]));
  }
  return s;
}

// One warp's share of the reduction, to entry `warp` of both arrays.
template <bool kNorm>
__device__ __forceinline__ void reduce_warp(TokenStats s, float* squares, unsigned* absmax, int warp) {
  if (kNorm) {
#pragma unroll
    for (int d = 16; d; d >>= 1) s.squares += __shfl_xor_sync(0xffffffffu, s.squares, d);
  }
  s.absmax = warp_max(s.absmax);
  if (threadIdx.x % 32 == 0) {
    squares[warp] = s.squares;
    absmax[warp] = s.absmax;
  }
}

// K, and what the mean divides by it; computed where nobody waits for it.
struct TokenLength {
  int K;
  float inverse;
  __device__ __forceinline__ explicit TokenLength(int K) : K(K), inverse(1.f / float(K)) {}
};

// A token's scale from the shares of all its warps. The first attempt comes with pre = 1; where that is out of range, the
// result's `pre` says what to multiply by, and its `dequant` is -1. Every thread waits for this: what can be side by side is.
template <bool kNorm, bool kInt8, int kWarps>
__device__ __forceinline__ TokenScale finish_scale(const float* squares, const unsigned* absmax,
                                                   const TokenLength& length, float eps, float pre) {
  float sums[4] = {0.f, 0.f, 0.f, 0.f};
  unsigned top = 0u;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    sums[w % 4] += squares[w];
    top = max(top, absmax[w]);
  }
  const float sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  const float level = kNorm ? fmaf(sum, length.inverse, (eps * pre) * pre) : 1.f;
  const bool finite = level < infinity() && top < kInfBits;
  if (kNorm && pre == 1.f && !(finite && level > 1e-30f && level < 1e30f)) {
    return {level <= 1e-30f ? 1.2089258e24f : 8.2718061e-25f, 0.f, -1.f};  // 2^80, 2^-80
  }
  if (!finite) return {pre, 0.f, __int_as_float(0x7fc00000)};
  if (level <= 0.f) return {pre, 0.f, 0.f};  // eps = 0 and a token of zeros, whose result is zero
  const float r = kNorm ? rsqrtf(level) : 1.f;
  if (kInt8) {
    // 127 / largest with largest = max(absmax, 1e-5 / r). The quick division is off by 2 ulp and gives zero for a divisor
    // above 2^126, infinity for a zero token.
    const float largest = __int_as_float(int(top));
    const float factor = fminf(__fdividef(kQMax * 0x1p-4f, largest * 0x1p-4f), (kQMax / kAbsmaxFloor) * r);
    return {pre, factor, fmaxf(largest * r, kAbsmaxFloor) * (1.f / kQMax)};
  }
  // With e the exponent of the largest: 2^(14 - e) and its inverse, by their own exponent fields. The clamp keeps both normal.
  const int e = max(int(top >> 23), 15);
  return {pre, __int_as_float((268 - e) << 23), __int_as_float((e - 14) << 23) * r};
}

// The block's threads, dealt out to kTokens tokens: each has whole warps of its own.
template <int kTokens, int kThreads>
struct Share {
  static_assert(kThreads % (32 * kTokens) == 0, "a token has whole warps");
  static constexpr int kCount = kThreads / kTokens, kWarps = kCount / 32;  // of one token
  static __device__ __forceinline__ int token() { return threadIdx.x / kCount; }
  static __device__ __forceinline__ int thread() { return threadIdx.x % kCount; }
  // Until all threads of this token are here.
  static __device__ __forceinline__ void wait() {
    if (kTokens == 1) {
      __syncthreads();
    } else {
      barrier(1 + token(), kCount);
    }
  }
};

// The scale of this thread's token, whose elements are at `row` (null: no such token; its factor and dequant are zero), and
// with kHeld > 0 the token in registers. All threads of the block call it together. The second attempt, which practically
// no token needs, is a second turn of the same loop: code that is jumped over still costs its fetching.
template <bool kNorm, bool kInt8, int kTokens, int kThreads, typename X, int kHeld>
__device__ __forceinline__ TokenScale token_scale(Held<X, kHeld>& held, const X* row, const Gamma<X>& gamma,
                                                  const TokenLength& length, float eps, bool aligned) {
  using Mine = Share<kTokens, kThreads>;
  __shared__ __align__(16) float squares[kTokens][Mine::kWarps];
  __shared__ __align__(16) unsigned absmax[kTokens][Mine::kWarps];
  const int t = Mine::token(), warp = Mine::thread() / 32;
  TokenScale scale{1.f, 0.f, 0.f};
#pragma unroll 1
  for (bool first = true;; first = false) {
    TokenStats stats{0.f, 0u};
    if constexpr (kHeld > 0) {
      load_held<kNorm, Mine::kCount>(held, row, gamma, length.K, aligned, Mine::thread());
      stats = held_stats<kNorm>(held, gamma, scale.pre);
    } else if (row != nullptr) {
      stats = thread_stats<X, kNorm, Mine::kCount>(row, gamma, length.K, aligned, scale.pre, Mine::thread());
    }
    reduce_warp<kNorm>(stats, squares[t], absmax[t], warp);
    Mine::wait();
    if (row == nullptr) return scale;
    scale = finish_scale<kNorm, kInt8, Mine::kWarps>(squares[t], absmax[t], length, eps, scale.pre);
    if (!kNorm || !first || !(scale.dequant < 0.f)) return scale;
    Mine::wait();  // every thread has read the first attempt
  }
}

// Four quantised values of an int8 token in one word, lowest k in the lowest byte. Added to 1.5 * 2^23 in one fma, the product
// is rounded half to even and lies in the low bits; conversions (F2I) run at a quarter of the rate. No clamp: what the
// factor leaves above 127 rounds to 127, and a token with a NaN has a result of NaN whatever is here.
__device__ __forceinline__ unsigned rounded_bits(float v, float factor) {
  return unsigned(__float_as_int(fmaf(v, factor, 12582912.f)));
}
__device__ __forceinline__ int quantise4(float4 v, float factor) {
  const unsigned low = __byte_perm(rounded_bits(v.x, factor), rounded_bits(v.y, factor), 0x0040u);
  const unsigned high = __byte_perm(rounded_bits(v.z, factor), rounded_bits(v.w, factor), 0x0040u);
  return int(__byte_perm(low, high, 0x5410u));
}
