// Elements of the KV cache: what a lane loads of a key or value at once, and how a new one is stored.
//
// A cached vector of a head lies in `pitch` elements, D of them used, the rest zero: whole 16-byte pieces. int8 vectors have
// a float32 scale each, absmax / 127.
#pragma once
#include "elements.cuh"
#include "ptx.cuh"

// kE consecutive features.
template <typename T>
struct KvVector {  // __half, __nv_bfloat16
  static constexpr int kE = 8;
  static constexpr bool kScaled = false;
  uint4 bits;
  __device__ __forceinline__ void load(const T* p, bool exists) {
    bits = exists ? *reinterpret_cast<const uint4*>(p) : make_uint4(0u, 0u, 0u, 0u);
  }
  __device__ __forceinline__ void read(float* v) const {
    const float4 low = unpack(Quad<T>{make_uint2(bits.x, bits.y)}), high = unpack(Quad<T>{make_uint2(bits.z, bits.w)});
    v[0] = low.x, v[1] = low.y, v[2] = low.z, v[3] = low.w;
    v[4] = high.x, v[5] = high.y, v[6] = high.z, v[7] = high.w;
  }
};
template <>
struct KvVector<float> {
  static constexpr int kE = 4;
  static constexpr bool kScaled = false;
  uint4 bits;
  __device__ __forceinline__ void load(const float* p, bool exists) {
    bits = exists ? *reinterpret_cast<const uint4*>(p) : make_uint4(0u, 0u, 0u, 0u);
  }
  __device__ __forceinline__ void read(float* v) const {
    const float4 f = unpack(Quad<float>{bits});
    v[0] = f.x, v[1] = f.y, v[2] = f.z, v[3] = f.w;
  }
};
template <>
struct KvVector<signed char> {
  static constexpr int kE = 8;
  static constexpr bool kScaled = true;
  uint2 bits;
  __device__ __forceinline__ void load(const signed char* p, bool exists) {
    bits = exists ? *reinterpret_cast<const uint2*>(p) : make_uint2(0u, 0u);
  }
  __device__ __forceinline__ void read(float* v) const {
    const float4 low = bytes_to_floats(bits.x), high = bytes_to_floats(bits.y);
    v[0] = low.x, v[1] = low.y, v[2] = low.z, v[3] = low.w;
    v[4] = high.x, v[5] = high.y, v[6] = high.z, v[7] = high.w;
  }
};

// Stores a vector [D] that lies in shared memory to an int8 cache, by one warp, and puts back what the cache then stands for.
// Magnitudes are compared as bits, among which NaN is the largest: a vector with NaN has scale NaN.
template <int kDim>
__device__ __forceinline__ void append_row(float* row, signed char* to, float* scale, bool append) {
  const int lane = threadIdx.x % 32;
  unsigned largest = 0u;
  for (int d = lane; d < kDim; d += 32) largest = max(largest, unsigned(__float_as_int(fabsf(row[d]))));
  const float step = __int_as_float(int(warp_max(largest))) / 127.f, factor = step > 0.f ? 1.f / step : 0.f;
  for (int d = lane; d < kDim; d += 32) {
    const float q = fminf(fmaxf(rintf(row[d] * factor), -127.f), 127.f);
    if (append) to[d] = (signed char)q;
    row[d] = q * step;
  }
  if (append && lane == 0) *scale = step;
}
