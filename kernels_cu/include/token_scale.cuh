// What one token's elements have to be multiplied with: the RMSNorm factor and the int8 quantisation factor, from one
// pass over the token and one reduction over the block.
//
// With r = 1 / sqrt(mean(x^2) + eps), the quantised value of n = x r g is round(n * 127 / absmax(n)) and r cancels in it:
// round(x g * 127 / absmax(x g)). So the sum of squares and the absmax are found in the same pass; r only enters the
// scale of the result, and the quantiser's floor absmax(n) >= 1e-5 becomes absmax(x g) >= 1e-5 / r.
//
// float32 cannot hold the squares of elements above 2^63 or far below 2^-63. A token whose mean square leaves
// [1e-30, 1e30] is done again with its elements multiplied by 2^-80 or 2^80 (`pre`), which cancels in the same way. That
// branch is taken by whole blocks, practically never. What float32 with -ftz=true cannot hold beside the result stays out:
// subnormal elements count as zero, as do those below 2^-46 in a token whose root mean square is above 1e15.
#pragma once
#include "elements.cuh"
#include "ptx.cuh"

constexpr float kQMax = 127.f;
constexpr float kAbsmaxFloor = 1e-5f;
constexpr unsigned kInfBits = 0x7f800000u;

struct TokenScale {
  float pre;      // multiply x by this first (1, or a power of two for extreme tokens)
  float factor;   // float: the normalised value is (x pre) factor g; int8: quantised is round((x pre g) factor)
  float dequant;  // int8: the normalised value is about quantised * dequant; NaN for a token that is not finite
};

// Elements of one token that a thread keeps in registers between the reduction and the staging, so that x crosses L2 once:
// four consecutive k of every 4 * kThreads. First as loaded, then as x g. Empty when the token is longer than that.
template <typename X, int kHeld>
struct Held {
  Quad<X> x[kHeld];
  typename Gamma<X>::Four gamma[kHeld];
  float4 xg[kHeld];
};
template <typename X>
struct Held<X, 0> {};

// Only issues the loads. Nothing here may wait for one: the loads of the weights come next.
template <bool kNorm, int kThreads, typename X, int kHeld>
__device__ __forceinline__ void load_held(Held<X, kHeld>& held, const X* row, const Gamma<X>& gamma, int K,
                                          bool aligned) {
  if constexpr (kHeld > 0) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int k = 4 * (threadIdx.x + i * kThreads);
      held.x[i] = load_quad(row, k, K, aligned);
      if (kNorm) held.gamma[i] = gamma.load(k, K);
    }
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

template <typename X, bool kNorm, int kThreads>
__device__ __forceinline__ TokenStats thread_stats(const X* row, const Gamma<X>& gamma, int K, bool aligned,
                                                   float pre) {
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
template <bool kNorm, typename X, int kHeld>
__device__ __forceinline__ TokenStats held_stats(Held<X, kHeld>& held, const Gamma<X>& gamma) {
  TokenStats s{0.f, 0u};
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    held.xg[i] = unpack(held.x[i]);
    if (kNorm) {
      s.squares += squares4(held.xg[i]);
      held.xg[i] = held.xg[i] * gamma.value(held.gamma[i]);
    }
    s.absmax = max(s.absmax, absmax4(held.xg[i]));
  }
  return s;
}

// One warp's share of the block's reduction. Only the quantiser wants the absmax.
template <bool kNorm, bool kInt8>
__device__ __forceinline__ void reduce_warp(TokenStats s, float* squares, unsigned* absmax) {
  if (kNorm) {
#pragma unroll
    for (int d = 16; d; d >>= 1) s.squares += __shfl_xor_sync(0xffffffffu, s.squares, d);
  }
  if (kInt8) s.absmax = warp_max(s.absmax);
  if (threadIdx.x % 32 == 0) {
    squares[threadIdx.x / 32] = s.squares;
    absmax[threadIdx.x / 32] = s.absmax;
  }
}

// A token's scale from the shares of all warps. The first attempt comes with pre = 1; where that is out of range, the
// result's `pre` says what to multiply by, and its `dequant` is -1.
template <bool kNorm, bool kInt8, int kWarps>
__device__ __forceinline__ TokenScale finish_scale(const float* squares, const unsigned* absmax, int K, float eps,
                                                   float pre) {
  float sums[2] = {0.f, 0.f};  // two chains: every thread waits for this
  unsigned top = 0u;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    sums[w % 2] += squares[w];
    if (kInt8) top = max(top, absmax[w]);
  }
  const float sum = sums[0] + sums[1];
  const float level = kNorm ? __fdividef(sum, float(K)) + (eps * pre) * pre : 1.f;
  const bool finite = level < infinity() && top < kInfBits;
  if (kNorm && pre == 1.f && !(finite && level > 1e-30f && level < 1e30f)) {
    return {level <= 1e-30f ? 1.2089258e24f : 8.2718061e-25f, 0.f, -1.f};  // 2^80, 2^-80
  }
  if (!finite) return {pre, __int_as_float(0x7fc00000), __int_as_float(0x7fc00000)};
  if (level <= 0.f) return {pre, 0.f, 0.f};  // eps = 0 and a token of zeros, whose result is zero
  const float r = kNorm ? rsqrtf(level) : 1.f;
  const float largest = fmaxf(__int_as_float(int(top)), kAbsmaxFloor * (level * r));  // level r = 1 / r
  // The quick division is off by 2 ulp and gives zero for a divisor above 2^126.
  const float factor = !kInt8 ? r : __fdividef(kQMax * 0x1p-4f, largest * 0x1p-4f);
  return {pre, factor, largest * r * (1.f / kQMax)};
}

// The scales of tokens n0 .. n0+kTokens-1; those beyond N get a factor and dequant of zero. All threads of the block call
// it together. One token: `scale` is the caller's own variable, which every thread computes for itself, at the cost of
// one barrier. More tokens: `scale` lies in shared memory, thread t finishes token t, and a second barrier publishes it.
// `held` may hold the (one) token; its x g is right for a scale whose `pre` is 1.
template <bool kNorm, bool kInt8, int kTokens, int kThreads, typename X, int kHeld>
__device__ __forceinline__ void token_scales(TokenScale* scale, Held<X, kHeld>& held, const X* x, const Gamma<X>& gamma,
                                             int n0, int N, int K, float eps, bool aligned) {
  constexpr int kWarps = kThreads / 32;
  static_assert(kTokens <= kThreads, "a thread finishes one token");
  static_assert(kTokens == 1 || kHeld == 0, "registers hold one token");
  __shared__ __align__(16) float squares[kTokens][kWarps];
  __shared__ __align__(16) unsigned absmax[kTokens][kWarps];
  const int mine = kTokens == 1 ? 0 : threadIdx.x;  // the token that this thread finishes

#pragma unroll 1
  for (int t = 0; t < kTokens; ++t) {
    TokenStats s{0.f, 0u};
    if constexpr (kHeld > 0) {
      s = held_stats<kNorm>(held, gamma);
    } else if (n0 + t < N) {
      s = thread_stats<X, kNorm, kThreads>(x + (long long)(n0 + t) * K, gamma, K, aligned, 1.f);
    }
    reduce_warp<kNorm, kInt8>(s, squares[t], absmax[t]);
  }
  __syncthreads();
  bool again = false;
  if (mine < kTokens) {
    TokenScale s{1.f, 0.f, 0.f};
    if (n0 + mine < N) s = finish_scale<kNorm, kInt8, kWarps>(squares[mine], absmax[mine], K, eps, 1.f);
    again = s.dequant < 0.f;
    scale[mine] = s;
  }
  if (kTokens > 1) again = __syncthreads_or(again);

  if (kNorm && __builtin_expect(again, 0)) {
    __syncthreads();  // every thread has read the first attempt
#pragma unroll 1
    for (int t = 0; t < kTokens; ++t) {
      TokenStats s{0.f, 0u};
      if (n0 + t < N) {
        s = thread_stats<X, kNorm, kThreads>(x + (long long)(n0 + t) * K, gamma, K, aligned, scale[t].pre);
      }
      reduce_warp<kNorm, kInt8>(s, squares[t], absmax[t]);
    }
    __syncthreads();
    if (mine < kTokens && scale[mine].dequant < 0.f) {
      scale[mine] = finish_scale<kNorm, kInt8, kWarps>(squares[mine], absmax[mine], K, eps, scale[mine].pre);
    }
    if (kTokens > 1) __syncthreads();
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
