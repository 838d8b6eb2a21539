// What one token's elements have to be multiplied with: the RMSNorm factor and the int8 quantisation factor, from one
// pass over the token and one reduction over the block.
//
// With r = 1 / sqrt(mean(x^2) + eps), the quantised value of n = x r g is round(n * 127 / absmax(n)) and r cancels in it:
// round(x g * 127 / absmax(x g)). So the sum of squares and the absmax are found in the same pass; r only enters the
// scale of the result, and the quantiser's floor absmax(n) >= 1e-5 becomes absmax(x g) >= 1e-5 / r.
//
// float32 cannot hold the squares of elements above 2^63 or far below 2^-63. A token whose mean square leaves
// [1e-30, 1e30] is done again with its elements multiplied by 2^-80 or 2^80 (`pre`), which cancels in the same way. That
// branch is taken by whole blocks, practically never, and makes every finite input correct.
#pragma once
#include "elements.cuh"
#include "ptx.cuh"

constexpr float kQMax = 127.f;
constexpr float kAbsmaxFloor = 1e-5f;
constexpr unsigned kInfBits = 0x7f800000u;

struct TokenScale {
  float pre;      // multiply x by this first (1, or a power of two for extreme tokens)
  float factor;   // float: the normalised value is (x pre) factor g; int8: the quantised value is round((x pre g) factor)
  float dequant;  // int8: the normalised value is about quantised * dequant; NaN for a token that is not finite
};

// Elements of one token that a thread keeps in registers between the reduction and the staging, so that x crosses L2 once:
// four consecutive k of every 4 * kThreads, times gamma. Empty when the token is longer than that.
template <int kHeld>
struct Held {
  float4 x[kHeld], xg[kHeld];
};
template <>
struct Held<0> {};

template <typename X, bool kNorm, int kThreads, int kHeld>
__device__ __forceinline__ Held<kHeld> load_held(const X* row, const Gamma<X>& gamma, int K, bool aligned) {
  Held<kHeld> held;
  if constexpr (kHeld > 0) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int k = 4 * (threadIdx.x + i * kThreads);
      held.x[i] = load4_or_zero(row, k, K, aligned);
      if (kNorm) held.xg[i] = gamma.at(k, K);
    }
  }
  return held;
}

// Sum of squares and largest |x g| of this thread's share of a token. The absmax travels as the bits of a non-negative
// float, which compare like unsigned integers and put inf and NaN above every number, so that neither is lost.
struct TokenStats {
  float squares;
  unsigned absmax;
};

__device__ __forceinline__ float squares4(float4 v) { return (v.x * v.x + v.y * v.y) + (v.z * v.z + v.w * v.w); }

__device__ __forceinline__ unsigned absmax4(float4 v) {
  const unsigned a = max(unsigned(__float_as_int(fabsf(v.x))), unsigned(__float_as_int(fabsf(v.y))));
  const unsigned b = max(unsigned(__float_as_int(fabsf(v.z))), unsigned(__float_as_int(fabsf(v.w))));
  return max(a, b);
}

template <typename X, bool kNorm, int kThreads>
__device__ __forceinline__ TokenStats thread_stats(const X* row, const Gamma<X>& gamma, int K, bool aligned, float pre) {
  TokenStats s{0.f, 0u};
#pragma unroll 4
  for (int k = 4 * threadIdx.x; k < K; k += 4 * kThreads) {
    float4 v = load4_or_zero(row, k, K, aligned) * pre;
    if (kNorm) {
      s.squares += squares4(v);
      v = v * gamma.at(k, K);
    }
    s.absmax = max(s.absmax, absmax4(v));
  }
  return s;
}

// The same from registers, which then hold x g.
template <bool kNorm, int kHeld>
__device__ __forceinline__ TokenStats held_stats(Held<kHeld>& held) {
  TokenStats s{0.f, 0u};
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    if (kNorm) s.squares += squares4(held.x[i]);
    held.xg[i] = kNorm ? held.x[i] * held.xg[i] : held.x[i];
    s.absmax = max(s.absmax, absmax4(held.xg[i]));
  }
  return s;
}

// The scales of tokens n0 .. n0+kTokens-1; those beyond N get a factor and dequant of zero. All threads of the block call
// it together. One token: `scale` is the caller's own variable, which every thread computes for itself, at the cost of
// one barrier. More tokens: `scale` lies in shared memory, thread t finishes token t, and a second barrier publishes it.
// `held` may hold the (one) token; it stays valid for scales whose `pre` is 1.
template <typename X, bool kNorm, bool kInt8, int kTokens, int kThreads, int kHeld>
__device__ __forceinline__ void token_scales(TokenScale* scale, Held<kHeld>& held, const X* x, const Gamma<X>& gamma, int n0,
                                             int N, int K, float eps, bool aligned) {
  constexpr int kWarps = kThreads / 32;
  static_assert(kTokens <= kThreads, "a thread finishes one token");
  static_assert(kTokens == 1 || kHeld == 0, "registers hold one token");
  __shared__ float squares[kTokens][kWarps];
  __shared__ unsigned absmax[kTokens][kWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

#pragma unroll 1
  for (int attempt = 0;; ++attempt) {
#pragma unroll 1
    for (int t = 0; t < kTokens; ++t) {
      TokenStats s{0.f, 0u};
      if (kHeld > 0 && attempt == 0) {
        if constexpr (kHeld > 0) s = held_stats<kNorm>(held);
      } else if (n0 + t < N) {
        const X* row = x + (long long)(n0 + t) * K;
        s = thread_stats<X, kNorm, kThreads>(row, gamma, K, aligned, attempt == 0 ? 1.f : scale[t].pre);
      }
      if (kNorm) {
#pragma unroll
        for (int d = 16; d; d >>= 1) s.squares += __shfl_xor_sync(0xffffffffu, s.squares, d);
      }
      s.absmax = warp_max(s.absmax);
      if (lane == 0) {
        squares[t][warp] = s.squares;
        absmax[t][warp] = s.absmax;
      }
    }
    __syncthreads();

    bool again = false;
    const int t = kTokens == 1 ? 0 : threadIdx.x;
    if (t < kTokens) {
      float sum = 0.f;
      unsigned top = 0u;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        sum += squares[t][w];
        top = max(top, absmax[t][w]);
      }
      const float pre = attempt == 0 ? 1.f : scale[t].pre;
      const float level = kNorm ? __fdividef(sum, float(K)) + (eps * pre) * pre : 1.f;
      const bool finite = top < kInfBits && level < infinity();
      TokenScale s{pre, 0.f, 0.f};
      if (kNorm && attempt == 0 && n0 + t < N && !(finite && level > 1e-30f && level < 1e30f)) {
        again = true;
        s.pre = level <= 1e-30f ? 1.2089258e24f : 8.2718061e-25f;  // 2^80, 2^-80
      } else if (!finite) {
        s.factor = s.dequant = __int_as_float(0x7fc00000);
      } else if (level > 0.f) {  // zero: eps = 0 and a token of zeros, whose result is zero
        const float r = kNorm ? rsqrtf(level) : 1.f;
        const float largest = fmaxf(__int_as_float(int(top)), kAbsmaxFloor * (level * r));  // level r = 1 / r
        // The quick division is off by 2 ulp and fails above 2^126, which rescaling keeps a normed token away from.
        s.factor = !kInt8 ? r : kNorm ? __fdividef(kQMax, largest) : kQMax / largest;
        s.dequant = largest * r * (1.f / kQMax);
      }
      scale[t] = s;
    }
    if (kTokens > 1) again = __syncthreads_or(again);
    if (!again) break;
    if (kTokens == 1) __syncthreads();  // every thread has read the first attempt
  }
}

// Four quantised values of an int8 token in one word, lowest k in the lowest byte.
__device__ __forceinline__ int quantise4(float4 v, float factor) {
  // The clamp is the quantiser's own; it also turns the NaN of a token whose result is NaN anyway into a number.
  const int a = __float2int_rn(fminf(fmaxf(v.x * factor, -kQMax), kQMax));
  const int b = __float2int_rn(fminf(fmaxf(v.y * factor, -kQMax), kQMax));
  const int c = __float2int_rn(fminf(fmaxf(v.z * factor, -kQMax), kQMax));
  const int d = __float2int_rn(fminf(fmaxf(v.w * factor, -kQMax), kQMax));
  return int((a & 255u) | (b & 255u) << 8 | (c & 255u) << 16 | unsigned(d) << 24);
}
