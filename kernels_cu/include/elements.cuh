// float16, bfloat16 and float32 elements: loading them as float32, and storing float32 as any of the three.
#pragma once
#include <cuda_fp16.h>
#include <cuda_bf16.h>

// Run-time tags of arrays whose dtype is not worth a specialisation (DTYPE_TAGS of edgellm_cupy/ops/enqueue.py): the branch is the
// same for the whole grid and costs nothing beside a memory access, while x's dtype decides how many registers and
// instructions the inner loops take and is a template parameter.
constexpr int kFloat16 = 0, kBfloat16 = 1, kFloat32 = 2;

__device__ __forceinline__ float infinity() {
  return __int_as_float(0x7f800000);
}

__device__ __forceinline__ float to_float(float v) {
  return v;
}
__device__ __forceinline__ float to_float(signed char v) {
  return float(v);
}
__device__ __forceinline__ float to_float(__half v) {
  return __half2float(v);
}
__device__ __forceinline__ float to_float(__nv_bfloat16 v) {
  return __bfloat162float(v);
}

__device__ __forceinline__ void from_float(float v, float* p) {
  *p = v;
}
__device__ __forceinline__ void from_float(float v, __half* p) {
  *p = __float2half_rn(v);
}
__device__ __forceinline__ void from_float(float v, __nv_bfloat16* p) {
  *p = __float2bfloat16_rn(v);
}

// v as it comes back from memory in T.
template <typename T>
__device__ __forceinline__ float rounded(float v) {
  T stored;
  from_float(v, &stored);
  return to_float(stored);
}

// Four signed bytes, lowest first: a byte becomes a float by putting (value + 128) under the exponent of 2^23.
__device__ __forceinline__ float4 bytes_to_floats(unsigned bytes) {
  const unsigned shifted = bytes ^ 0x80808080u;
  return make_float4(__int_as_float(int(__byte_perm(shifted, 0x4b000000u, 0x7650u))) - 8388736.f,
                     __int_as_float(int(__byte_perm(shifted, 0x4b000000u, 0x7651u))) - 8388736.f,
                     __int_as_float(int(__byte_perm(shifted, 0x4b000000u, 0x7652u))) - 8388736.f,
                     __int_as_float(int(__byte_perm(shifted, 0x4b000000u, 0x7653u))) - 8388736.f);
}

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

// The bits of element i of such an array, and the element that they stand for. Loading and converting are apart, because a
// conversion waits for its load: what is needed late is loaded early and converted when it is used.
__device__ __forceinline__ unsigned load_bits(const void* p, long long i, int dtype) {
  return dtype == kFloat32 ? static_cast<const unsigned*>(p)[i] : static_cast<const unsigned short*>(p)[i];
}
__device__ __forceinline__ float float_of_bits(unsigned bits, int dtype) {
  if (dtype == kFloat32) return __int_as_float(int(bits));
  return dtype == kBfloat16 ? __int_as_float(int(bits << 16)) : __half2float(__ushort_as_half((unsigned short)bits));
}

// The bits of four consecutive elements, for the same reason.
template <typename T>
struct Quad {
  uint2 bits;
};
template <>
struct Quad<float> {
  uint4 bits;
};

__device__ __forceinline__ float4 unpack(const Quad<float>& q) {
  return make_float4(__int_as_float(int(q.bits.x)), __int_as_float(int(q.bits.y)), __int_as_float(int(q.bits.z)),
                     __int_as_float(int(q.bits.w)));
}
__device__ __forceinline__ float4 unpack(const Quad<__half>& q) {
  return make_float4(float_of_bits(q.bits.x & 0xffffu, kFloat16), float_of_bits(q.bits.x >> 16, kFloat16),
                     float_of_bits(q.bits.y & 0xffffu, kFloat16), float_of_bits(q.bits.y >> 16, kFloat16));
}
__device__ __forceinline__ float4 unpack(const Quad<__nv_bfloat16>& q) {
  return make_float4(__int_as_float(int(q.bits.x << 16)), __int_as_float(int(q.bits.x & 0xffff0000u)),
                     __int_as_float(int(q.bits.y << 16)), __int_as_float(int(q.bits.y & 0xffff0000u)));
}

// True where four elements of every row of p [rows, length] can be loaded at once, from k = 0, 4, 8, ...
template <typename T>
__device__ __forceinline__ bool rows_aligned(const T* p, int length) {
  return length % 4 == 0 && reinterpret_cast<unsigned long long>(p) % (4 * sizeof(T)) == 0;
}

__device__ __forceinline__ unsigned bits_or_zero(const float* row, int k, int length) {
  return k < length ? reinterpret_cast<const unsigned*>(row)[k] : 0u;
}
template <typename T>
__device__ __forceinline__ unsigned bits_or_zero(const T* row, int k, int length) {
  return k < length ? reinterpret_cast<const unsigned short*>(row)[k] : 0u;
}

// Elements k .. k+3 of a row of `length`; what lies beyond the end is zero.
__device__ __forceinline__ Quad<float> load_quad(const float* row, int k, int length, bool aligned) {
  if (__builtin_expect(aligned, 1)) {
    return {k < length ? *reinterpret_cast<const uint4*>(row + k) : make_uint4(0u, 0u, 0u, 0u)};
  }
  return {make_uint4(bits_or_zero(row, k, length), bits_or_zero(row, k + 1, length), bits_or_zero(row, k + 2, length),
                     bits_or_zero(row, k + 3, length))};
}
template <typename T>
__device__ __forceinline__ Quad<T> load_quad(const T* row, int k, int length, bool aligned) {
  if (__builtin_expect(aligned, 1)) {
    return {k < length ? *reinterpret_cast<const uint2*>(row + k) : make_uint2(0u, 0u)};
  }
  return {make_uint2(bits_or_zero(row, k, length) | bits_or_zero(row, k + 1, length) << 16,
                     bits_or_zero(row, k + 2, length) | bits_or_zero(row, k + 3, length) << 16)};
}

template <typename T>
__device__ __forceinline__ float4 load4_or_zero(const T* row, int k, int length, bool aligned) {
  return unpack(load_quad(row, k, length, aligned));
}

// A narrow quad in the first half of a wide one.
template <typename Q>
__device__ __forceinline__ uint2 first_half(const Q& q) {
  return make_uint2(q.bits.x, q.bits.y);
}
template <typename T>
__device__ __forceinline__ Quad<T> from_half(uint4 bits) {
  Quad<T> q = {};
  q.bits.x = bits.x;
  q.bits.y = bits.y;
  return q;
}

// The norm weight [K], float32 or x's dtype (a run-time choice).
template <typename X>
struct Gamma {
  struct Four {
    Quad<float> bits;  // float32: all of it; x's dtype, where that is narrower: the first half
  };

  const void* data;
  bool is_float32, aligned;

  // `known_aligned`: the caller knows that four elements can be loaded at once.
  __device__ __forceinline__ Gamma(const void* data, int is_float32, int k, bool known_aligned = false)
      : data(data),
        is_float32(is_float32),
        aligned(known_aligned || (is_float32 ? rows_aligned(static_cast<const float*>(data), k)
                                             : rows_aligned(static_cast<const X*>(data), k))) {}
  __device__ __forceinline__ Four load(int k, int length) const {
    if (sizeof(X) == sizeof(float) || is_float32)
      return {load_quad(static_cast<const float*>(data), k, length, aligned)};
    const uint2 low = first_half(load_quad(static_cast<const X*>(data), k, length, aligned));
    return {{make_uint4(low.x, low.y, 0u, 0u)}};
  }
  __device__ __forceinline__ float4 value(const Four& four) const {
    if (sizeof(X) == sizeof(float) || is_float32) return unpack(four.bits);
    return unpack(from_half<X>(four.bits.bits));
  }
  __device__ __forceinline__ float4 at(int k, int length) const { return value(load(k, length)); }
};

__device__ __forceinline__ float4 operator*(float4 a, float b) {
  return make_float4(a.x * b, a.y * b, a.z * b, a.w * b);
}
__device__ __forceinline__ float4 operator*(float4 a, float4 b) {
  return make_float4(a.x * b.x, a.y * b.y, a.z * b.z, a.w * b.w);
}
