// __half, __nv_bfloat16 and their pairs: the storage formats, exact conversions (round to nearest even), and
// arithmetic that computes in float or double and rounds once. Written out rather than taken from cuda_fp16.h,
// whose host side needs headers (crt/) that our extras do not install.
#pragma once

struct alignas(2) __half {
  uint16_t __x;
  __half() = default;
  inline __half(float value);
  inline __half(double value);
  inline __half(int value);
  inline operator float() const;
};
struct alignas(2) __nv_bfloat16 {
  uint16_t __x;
  __nv_bfloat16() = default;
  inline __nv_bfloat16(float value);
  inline __nv_bfloat16(double value);
  inline __nv_bfloat16(int value);
  inline operator float() const;
};
struct alignas(4) __half2 {
  __half x, y;
  __half2() = default;
  __half2(__half a, __half b) : x(a), y(b) {}
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
  __nv_bfloat162() = default;
  __nv_bfloat162(__nv_bfloat16 a, __nv_bfloat16 b) : x(a), y(b) {}
};
using half = __half;
using half2 = __half2;
using nv_bfloat16 = __nv_bfloat16;
using nv_bfloat162 = __nv_bfloat162;
struct __half_raw {
  unsigned short x;
};
struct __nv_bfloat16_raw {
  unsigned short x;
};

namespace emu {

// Binary formats with 1 sign bit, EXPONENT bits, MANTISSA bits: from double with one rounding, to nearest even.
template <int EXPONENT, int MANTISSA>
inline uint16_t narrow(double value) {
  constexpr int bias = (1 << (EXPONENT - 1)) - 1;
  constexpr uint16_t infinity = uint16_t(((1 << EXPONENT) - 1) << MANTISSA);
  const uint64_t b = bits<uint64_t>(value);
  const uint16_t sign = uint16_t(b >> 63 << 15);
  const int exponent = int(b >> 52 & 0x7ff);
  uint64_t mantissa = b & ((uint64_t(1) << 52) - 1);
  if (exponent == 0x7ff) return mantissa ? uint16_t(0x7fff) : uint16_t(sign | infinity);
  if (exponent == 0) return sign;  // far below the smallest subnormal
  mantissa |= uint64_t(1) << 52;
  int unbiased = exponent - 1023;
  int drop = 52 - MANTISSA;  // bits that do not fit
  if (unbiased < 1 - bias) drop += 1 - bias - unbiased;
  if (drop > 53) return sign;
  uint64_t kept = mantissa >> drop;
  const uint64_t rest = mantissa & ((uint64_t(1) << drop) - 1), half_way = uint64_t(1) << (drop - 1);
  if (rest > half_way || (rest == half_way && (kept & 1))) ++kept;
  // kept holds the implicit bit of a normal number; a carry moves into the exponent by itself
  uint64_t result = unbiased < 1 - bias ? kept : kept + (uint64_t(unbiased + bias - 1) << MANTISSA);
  if (result >= infinity) result = infinity;
  return uint16_t(sign | result);
}

inline float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = h >> 10 & 31, mantissa = h & 1023;
  if (exponent == 31) return bits<float>(sign | 0x7f800000u | mantissa << 13);
  if (exponent) return bits<float>(sign | (exponent + 112) << 23 | mantissa << 13);
  const float magnitude = float(mantissa) * 0x1p-24f;  // zero and subnormals: normal as floats, so FTZ spares them
  return sign ? -magnitude : magnitude;
}
inline float bfloat16_to_float(uint16_t h) { return bits<float>(uint32_t(h) << 16); }

inline uint16_t float_to_bfloat16(float value) {  // keeps subnormals: no arithmetic, so no flushing
  const uint32_t b = bits<uint32_t>(value);
  if ((b & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return uint16_t((b + 0x7fffu + (b >> 16 & 1)) >> 16);
}

}  // namespace emu

inline __half __ushort_as_half(unsigned short x) {
  __half h;
  h.__x = x;
  return h;
}
inline unsigned short __half_as_ushort(__half h) { return h.__x; }
inline __half __short_as_half(short x) { return __ushort_as_half((unsigned short)x); }
inline short __half_as_short(__half h) { return short(h.__x); }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short x) {
  __nv_bfloat16 h;
  h.__x = x;
  return h;
}
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 h) { return h.__x; }

inline float __half2float(__half h) { return emu::half_to_float(h.__x); }
inline float __bfloat162float(__nv_bfloat16 h) { return emu::bfloat16_to_float(h.__x); }
inline __half __double2half(double x) { return __ushort_as_half(emu::narrow<5, 10>(x)); }
inline __half __float2half_rn(float x) { return __double2half(double(x)); }
inline __half __float2half(float x) { return __float2half_rn(x); }
inline __nv_bfloat16 __double2bfloat16(double x) { return __ushort_as_bfloat16(emu::narrow<8, 7>(x)); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return __ushort_as_bfloat16(emu::float_to_bfloat16(x)); }
inline __nv_bfloat16 __float2bfloat16(float x) { return __float2bfloat16_rn(x); }

inline __half::__half(float v) { *this = __float2half_rn(v); }
inline __half::__half(double v) { *this = __double2half(v); }
inline __half::__half(int v) { *this = __double2half(v); }
inline __half::operator float() const { return __half2float(*this); }
inline __nv_bfloat16::__nv_bfloat16(float v) { *this = __float2bfloat16_rn(v); }
inline __nv_bfloat16::__nv_bfloat16(double v) { *this = __double2bfloat16(v); }
inline __nv_bfloat16::__nv_bfloat16(int v) { *this = __double2bfloat16(v); }
inline __nv_bfloat16::operator float() const { return __bfloat162float(*this); }

// One set of definitions for both types. TO: double -> T; F: T -> float (exact).
#define EMU_SIXTEEN_BITS(T, T2, F, TO, raw)                                                      \
  inline T __hadd(T a, T b) { return TO(double(F(a)) + F(b)); }                                  \
  inline T __hsub(T a, T b) { return TO(double(F(a)) - F(b)); }                                  \
  inline T __hmul(T a, T b) { return TO(double(F(a)) * F(b)); }                                  \
  inline T __hdiv(T a, T b) { return TO(double(F(a)) / F(b)); }                                  \
  inline T __hfma(T a, T b, T c) { return TO(double(F(a)) * F(b) + F(c)); }                      \
  inline T __hneg(T a) {                                                                         \
    a.__x ^= 0x8000;                                                                             \
    return a;                                                                                    \
  }                                                                                              \
  inline T __habs(T a) {                                                                         \
    a.__x &= 0x7fff;                                                                             \
    return a;                                                                                    \
  }                                                                                              \
  inline T __hmax(T a, T b) { return TO(fmaxf(F(a), F(b))); }                                    \
  inline T __hmin(T a, T b) { return TO(fminf(F(a), F(b))); }                                    \
  inline bool __hgt(T a, T b) { return F(a) > F(b); }                                            \
  inline bool __hge(T a, T b) { return F(a) >= F(b); }                                           \
  inline bool __hlt(T a, T b) { return F(a) < F(b); }                                            \
  inline bool __hle(T a, T b) { return F(a) <= F(b); }                                           \
  inline bool __heq(T a, T b) { return F(a) == F(b); }                                           \
  inline bool __hne(T a, T b) { return F(a) != F(b); }                                           \
  inline bool __hisnan(T a) { return F(a) != F(a); }                                             \
  inline int __hisinf(T a) { return __builtin_isinf_sign(F(a)); }                                \
  inline T operator+(T a, T b) { return __hadd(a, b); }                                          \
  inline T operator-(T a, T b) { return __hsub(a, b); }                                          \
  inline T operator*(T a, T b) { return __hmul(a, b); }                                          \
  inline T operator/(T a, T b) { return __hdiv(a, b); }                                          \
  inline T operator-(T a) { return __hneg(a); }                                                  \
  inline T& operator+=(T& a, T b) { return a = __hadd(a, b); }                                   \
  inline T& operator-=(T& a, T b) { return a = __hsub(a, b); }                                   \
  inline T& operator*=(T& a, T b) { return a = __hmul(a, b); }                                   \
  inline T& operator/=(T& a, T b) { return a = __hdiv(a, b); }                                   \
  inline bool operator<(T a, T b) { return __hlt(a, b); }                                        \
  inline bool operator>(T a, T b) { return __hgt(a, b); }                                        \
  inline bool operator<=(T a, T b) { return __hle(a, b); }                                       \
  inline bool operator>=(T a, T b) { return __hge(a, b); }                                       \
  inline bool operator==(T a, T b) { return __heq(a, b); }                                       \
  inline bool operator!=(T a, T b) { return __hne(a, b); }                                       \
  inline T2 operator+(T2 a, T2 b) { return {__hadd(a.x, b.x), __hadd(a.y, b.y)}; }               \
  inline T2 operator-(T2 a, T2 b) { return {__hsub(a.x, b.x), __hsub(a.y, b.y)}; }               \
  inline T2 operator*(T2 a, T2 b) { return {__hmul(a.x, b.x), __hmul(a.y, b.y)}; }               \
  inline T2 __hadd2(T2 a, T2 b) { return a + b; }                                                \
  inline T2 __hsub2(T2 a, T2 b) { return a - b; }                                                \
  inline T2 __hmul2(T2 a, T2 b) { return a * b; }                                                \
  inline T2 __hfma2(T2 a, T2 b, T2 c) { return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)}; } \
  inline T2 __hmax2(T2 a, T2 b) { return {__hmax(a.x, b.x), __hmax(a.y, b.y)}; }                 \
  inline T2 __hmin2(T2 a, T2 b) { return {__hmin(a.x, b.x), __hmin(a.y, b.y)}; }                 \
  inline T2 __habs2(T2 a) { return {__habs(a.x), __habs(a.y)}; }                                 \
  inline T2 __hneg2(T2 a) { return {__hneg(a.x), __hneg(a.y)}; }                                 \
  inline float __low2float(T2 a) { return F(a.x); }                                              \
  inline float __high2float(T2 a) { return F(a.y); }
EMU_SIXTEEN_BITS(__half, __half2, __half2float, __double2half, __half_raw)
EMU_SIXTEEN_BITS(__nv_bfloat16, __nv_bfloat162, __bfloat162float, __double2bfloat16, __nv_bfloat16_raw)
#undef EMU_SIXTEEN_BITS

inline __half __low2half(__half2 a) { return a.x; }
inline __half __high2half(__half2 a) { return a.y; }
inline __half2 __halves2half2(__half a, __half b) { return {a, b}; }
inline __half2 make_half2(__half a, __half b) { return {a, b}; }
inline __half2 __half2half2(__half a) { return {a, a}; }
inline float2 __half22float2(__half2 a) { return {__half2float(a.x), __half2float(a.y)}; }
inline __half2 __float22half2_rn(float2 a) { return {__float2half_rn(a.x), __float2half_rn(a.y)}; }
inline __half2 __floats2half2_rn(float a, float b) { return {__float2half_rn(a), __float2half_rn(b)}; }
inline __half2 __float2half2_rn(float a) { return {__float2half_rn(a), __float2half_rn(a)}; }
inline __half __int2half_rn(int x) { return __double2half(x); }
inline __half __uint2half_rn(unsigned x) { return __double2half(x); }
inline int __half2int_rn(__half h) { return __float2int_rn(__half2float(h)); }

inline __nv_bfloat16 __low2bfloat16(__nv_bfloat162 a) { return a.x; }
inline __nv_bfloat16 __high2bfloat16(__nv_bfloat162 a) { return a.y; }
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 a, __nv_bfloat16 b) { return {a, b}; }
inline __nv_bfloat162 make_bfloat162(__nv_bfloat16 a, __nv_bfloat16 b) { return {a, b}; }
inline __nv_bfloat162 __bfloat162bfloat162(__nv_bfloat16 a) { return {a, a}; }
inline float2 __bfloat1622float2(__nv_bfloat162 a) { return {__bfloat162float(a.x), __bfloat162float(a.y)}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 a) { return {__float2bfloat16_rn(a.x), __float2bfloat16_rn(a.y)}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) {
  return {__float2bfloat16_rn(a), __float2bfloat16_rn(b)};
}
inline __nv_bfloat162 __float2bfloat162_rn(float a) { return {__float2bfloat16_rn(a), __float2bfloat16_rn(a)}; }
inline __nv_bfloat16 __int2bfloat16_rn(int x) { return __double2bfloat16(x); }
inline int __bfloat162int_rn(__nv_bfloat16 h) { return __float2int_rn(__bfloat162float(h)); }
