// Ternary weights and activations as operands of the tensor cores: weights are A (16 rows), activations B (8 columns).
//
// A warp works on a *block* of 16 rows x 256 k at a time. Lane 4 g + q holds chunk q of the block's four (64 k, 16 bytes:
// formats/packing.py) of rows g and g + 8:
//
//                 k     0 .. 63   64 .. 127   128 .. 191   192 .. 255
//     rows g, g + 8       q = 0       q = 1        q = 2        q = 3        g = 0 .. 7
//
// Which k an instruction's operand slots stand for is free, as long as A and B agree. So a lane feeds them from its own
// chunk: a *field* is four consecutive k, 4 f .. 4 f + 3 for f = 0 .. 15, and lies under one mask in word f / 4 of the
// chunk. int8: an instruction takes two fields (32 k over the quad of lanes), float16: one (16 k).
//
// B operands of ternary_gemm.cu are laid out for one 16-byte load a lane: a *piece* is what a lane needs for four fields
// (int8) or for two (float16), of its column g and its chunk q. Piece p of a block lies at 16-byte index
//
//     (p * 8 + column) * 4 + q
//
// so that the lanes of a warp read consecutive 16 bytes. Within a piece the fields follow one another; four k in int8
// are four bytes, in float16 eight: k = 0, 2, 1, 3, the order in which two masks find the codes. (The streaming product
// has an order of its own: ternary_product.cuh.)
//
// int8: codes u = t + 1 are used as they are; sum(t q) = sum(u q) - sum(q), the latter once a token. Sums are exact in int32.
// float, many tokens: t itself as float16, times activations that are brought below 2^15 by a power of two a token. One
// float16 plane keeps 11 bits of an activation, two planes (high, and what is left times 2^12: two columns) keep 22.
// Elements below 2^-29 of the token's largest are no longer normal float16 in the high plane; two planes still hold them.
// float, few tokens: whole numbers in 8-bit digits, a column each (digits4 below).
#pragma once
#include "ptx.cuh"

constexpr int kBlockRows = 16, kBlockChunks = 4, kColumns = 8;

template <bool kInt8>
struct Fragments;

template <>
struct Fragments<true> {
  using Sum = int;
  static constexpr int kPieces = 4;    // 16-byte pieces of a chunk's activations
  static constexpr int kOperands = 2;  // instructions a word of weights

  // Word j of the lane's two chunks as A operands.
  static __device__ __forceinline__ void unpack(unsigned (&a)[kOperands][4], unsigned low, unsigned high) {
#pragma unroll
    for (int o = 0; o < 2; ++o) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int shift = 4 * o + 2 * half;
        a[o][2 * half] = (low >> shift) & 0x03030303u;
        a[o][2 * half + 1] = (high >> shift) & 0x03030303u;
      }
    }
  }
};

template <>
struct Fragments<false> {
  using Sum = float;
  static constexpr int kPieces = 8;

  // Two codes, at bits 2 i of the halves of `word`, as float16: under the exponent of 1024, whose last bit is worth one,
  // the codes read 1024 + u 4^i; one fma makes them t. No shift is needed.
  template <int i>
  static __device__ __forceinline__ unsigned ternary_f16x2(unsigned word) {
    constexpr unsigned kScale[4] = {0x3c003c00u, 0x34003400u, 0x2c002c00u, 0x24002400u};   // 4^-i
    constexpr unsigned kOffset[4] = {0xe401e401u, 0xdc04dc04u, 0xd410d410u, 0xcc40cc40u};  // -(1024 4^-i + 1)
    return fma_f16x2((word & (0x00030003u << (2 * i))) | 0x64006400u, kScale[i], kOffset[i]);
  }
  template <int i>
  static __device__ __forceinline__ void unpack_field(unsigned (&a)[4], unsigned low, unsigned high) {
    a[0] = ternary_f16x2<i>(low);
    a[1] = ternary_f16x2<i>(high);
    a[2] = ternary_f16x2<i>(low >> 8);
    a[3] = ternary_f16x2<i>(high >> 8);
  }
};

// Four activations, scaled to at most 2^15, as the eight bytes of a field: the high plane, and the low one.
constexpr float kLowPlane = 4096.f;  // the low plane holds what the high one leaves, times this

__device__ __forceinline__ unsigned f16_bits(float v) {
  return __half_as_ushort(__float2half_rn(v));
}
__device__ __forceinline__ uint2 high_plane(float4 v) {
  return make_uint2(f16_bits(v.x) | f16_bits(v.z) << 16, f16_bits(v.y) | f16_bits(v.w) << 16);
}
__device__ __forceinline__ float left_by_f16(float v) {
  return (v - __half2float(__float2half_rn(v))) * kLowPlane;
}
__device__ __forceinline__ uint2 low_plane(float4 v) {
  return high_plane(make_float4(left_by_f16(v.x), left_by_f16(v.y), left_by_f16(v.z), left_by_f16(v.w)));
}

// Four activations, scaled to less than 2^15, in digits between -128 and 127: word d holds digit d of each. Pairs of digits
// make a whole number of 15 bits and a sign; each pair counts 2^-15 of the one before, the first digit of a pair 256 times
// the second. Four digits are the nearest multiple of 2^-14, six that of 2^-29. Rounding is by adding 1.5 * 2^23, which
// leaves the whole number in the low bits: conversions run at a quarter of the rate.
constexpr float kDigitUnit = 2.f;  // what the second digit counts

// The factor of digit d in a sum that counts kDigitUnit.
__device__ __forceinline__ float digit_weight(int d) {
  return __int_as_float((127 + 8 * (1 - d % 2) - 15 * (d / 2)) << 23);
}

template <int kDigits>
__device__ __forceinline__ void digits4(unsigned (&digits)[kDigits], float4 v) {
  constexpr float kRound = 12582912.f;
  float rest[4] = {v.x, v.y, v.z, v.w}, unit = 1.f / kDigitUnit;
#pragma unroll
  for (int pair = 0; pair < kDigits / 2; ++pair) {
    unsigned bits[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float scaled = rest[i] * unit, rounded = scaled + kRound;
      bits[i] = (unsigned(__float_as_int(rounded)) + 0x80u) ^ 0x80u;  // carries where the low byte is to be negative
      rest[i] = scaled - (rounded - kRound);
    }
    unit = 32768.f;
    const unsigned first = __byte_perm(bits[0], bits[1], 0x5410u), second = __byte_perm(bits[2], bits[3], 0x5410u);
    digits[2 * pair] = __byte_perm(first, second, 0x7531u);
    digits[2 * pair + 1] = __byte_perm(first, second, 0x6420u);
  }
}
