// float16, bfloat16 and float32 elements: loading them as float32, and storing float32 as any of the three.
#pragma once
#include <cuda_fp16.h>
#include <cuda_bf16.h>

// Run-time tags of arrays whose dtype is not worth a specialisation (edgellm_cupy.tuning.DTYPE_TAGS): the branch is the
// same for the whole grid and costs nothing beside a memory access, while x's dtype decides how many registers and
// instructions the inner loops take and is a template parameter.
constexpr int kFloat16 = 0, kBfloat16 = 1, kFloat32 = 2;

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

__device__ __forceinline__ void from_float(float v, float* p) { *p = v; }
__device__ __forceinline__ void from_float(float v, __half* p) { *p = __float2half_rn(v); }
__device__ __forceinline__ void from_float(float v, __nv_bfloat16* p) { *p = __float2bfloat16_rn(v); }

// Element i of an array with a run-time dtype.
__device__ __forceinline__ void store_as(void* y, long long i, float v, int dtype) {
  if (dtype == kFloat16) {
    from_float(v, static_cast<__half*>(y) + i);
  } else if (dtype == kBfloat16) {
    from_float(v, static_cast<__nv_bfloat16*>(y) + i);
  } else {
    from_float(v, static_cast<float*>(y) + i);
  }
}

__device__ __forceinline__ float load_as(const void* p, long long i, int dtype) {
  if (dtype == kFloat16) return to_float(static_cast<const __half*>(p)[i]);
  if (dtype == kBfloat16) return to_float(static_cast<const __nv_bfloat16*>(p)[i]);
  return static_cast<const float*>(p)[i];
}

// Four consecutive elements with one load. p is aligned to four elements.
__device__ __forceinline__ float4 load4(const float* p) { return *reinterpret_cast<const float4*>(p); }
__device__ __forceinline__ float4 load4(const __half* p) {
  const uint2 raw = *reinterpret_cast<const uint2*>(p);
  const float2 low = __half22float2(reinterpret_cast<const __half2&>(raw.x));
  const float2 high = __half22float2(reinterpret_cast<const __half2&>(raw.y));
  return make_float4(low.x, low.y, high.x, high.y);
}
__device__ __forceinline__ float4 load4(const __nv_bfloat16* p) {
  const uint2 raw = *reinterpret_cast<const uint2*>(p);
  return make_float4(__int_as_float(int(raw.x << 16)), __int_as_float(int(raw.x & 0xffff0000u)),
                     __int_as_float(int(raw.y << 16)), __int_as_float(int(raw.y & 0xffff0000u)));
}

// True where load4 may be used on every row of p [rows, length].
template <typename T>
__device__ __forceinline__ bool rows_aligned(const T* p, int length) {
  return length % 4 == 0 && reinterpret_cast<unsigned long long>(p) % (4 * sizeof(T)) == 0;
}

// Elements k .. k+3 of a row of `length`; what lies beyond the end is zero.
template <typename T>
__device__ __forceinline__ float4 load4_or_zero(const T* row, int k, int length, bool aligned) {
  if (aligned && k < length) return load4(row + k);
  float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
  if (k < length) v.x = to_float(row[k]);
  if (k + 1 < length) v.y = to_float(row[k + 1]);
  if (k + 2 < length) v.z = to_float(row[k + 2]);
  if (k + 3 < length) v.w = to_float(row[k + 3]);
  return v;
}

// The norm weight [K], float32 or x's dtype (a run-time choice).
template <typename X>
struct Gamma {
  const void* data;
  bool is_float32;
  bool aligned;
  __device__ __forceinline__ Gamma(const void* data, int is_float32, int k)
      : data(data),
        is_float32(is_float32),
        aligned(is_float32 ? rows_aligned(static_cast<const float*>(data), k)
                           : rows_aligned(static_cast<const X*>(data), k)) {}
  __device__ __forceinline__ float4 at(int k, int length) const {
    return is_float32 ? load4_or_zero(static_cast<const float*>(data), k, length, aligned)
                      : load4_or_zero(static_cast<const X*>(data), k, length, aligned);
  }
};

__device__ __forceinline__ float4 operator*(float4 a, float b) {
  return make_float4(a.x * b, a.y * b, a.z * b, a.w * b);
}
__device__ __forceinline__ float4 operator*(float4 a, float4 b) {
  return make_float4(a.x * b.x, a.y * b.y, a.z * b.z, a.w * b.w);
}
