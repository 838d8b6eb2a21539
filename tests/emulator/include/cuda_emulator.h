// CUDA C++ for g++: the language, the built-in variables and the intrinsics that our kernels use.
//
// A .cu file is compiled unchanged after this header. What needs other threads (barriers, shuffles, atomics,
// tensor cores) calls the runtime through emu_abi.h; what does not is written here. The compiler instruments every
// load and store of the kernel (-fsanitize=thread) and the runtime checks each one. What calls the runtime is
// inlined by force (EMU_CALL), so that the return address it sees is a line of the kernel.
#pragma once
#ifndef EDGELLM_EMULATOR
#define EDGELLM_EMULATOR 1
#endif

#include <cfloat>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <type_traits>
#include <utility>

#include "emu_abi.h"

// ---------------------------------------------------------------------------------------------- the language

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __shared__ static __attribute__((used))  // in .bss, which holds nothing else: see ../build.py
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __maxnreg__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
#define __builtin_assume(condition) ((void)0)
#define EMU_CALL inline __attribute__((always_inline))
#undef assert
#define assert(condition) ((condition) ? (void)0 : emu::trap("assertion failed: " #condition))
#define __trap() emu::trap("__trap()")

#include "emu_vector_types.h"

#define threadIdx (uint3{emu::builtin(0), emu::builtin(1), emu::builtin(2)})
#define blockIdx (uint3{emu::builtin(3), emu::builtin(4), emu::builtin(5)})
#define blockDim (dim3(emu::builtin(6), emu::builtin(7), emu::builtin(8)))
#define gridDim (dim3(emu::builtin(9), emu::builtin(10), emu::builtin(11)))
#define warpSize 32

// ---------------------------------------------------------------------------------------------- bits

namespace emu {
template <class To, class From>
inline To bits(From value) {
  static_assert(sizeof(To) <= sizeof(From) || sizeof(From) <= 8, "");
  To result{};
  __builtin_memcpy(&result, &value, sizeof(To) < sizeof(From) ? sizeof(To) : sizeof(From));
  return result;
}
}  // namespace emu

inline int __float_as_int(float x) { return emu::bits<int>(x); }
inline unsigned __float_as_uint(float x) { return emu::bits<unsigned>(x); }
inline float __int_as_float(int x) { return emu::bits<float>(x); }
inline float __uint_as_float(unsigned x) { return emu::bits<float>(x); }
inline long long __double_as_longlong(double x) { return emu::bits<long long>(x); }
inline double __longlong_as_double(long long x) { return emu::bits<double>(x); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll(x) : 64; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __brev(unsigned x) {
  unsigned r = 0;
  for (int i = 0; i < 32; ++i) r |= (x >> i & 1u) << (31 - i);
  return r;
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = (uint64_t(b) << 32) | a;
  unsigned r = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned choice = selector >> (4 * i);
    unsigned byte = unsigned(bytes >> (8 * (choice & 7))) & 255u;
    if (choice & 8) byte = byte & 128 ? 255u : 0u;  // replicate the sign
    r |= byte << (8 * i);
  }
  return r;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return unsigned(((uint64_t(high) << 32 | low) << (shift & 31)) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return unsigned((uint64_t(high) << 32 | low) >> (shift & 31));
}
inline unsigned __funnelshift_lc(unsigned low, unsigned high, unsigned shift) {
  return shift >= 32 ? low : __funnelshift_l(low, high, shift);
}
inline unsigned __funnelshift_rc(unsigned low, unsigned high, unsigned shift) {
  return shift >= 32 ? high : __funnelshift_r(low, high, shift);
}

// ---------------------------------------------------------------------------------------------- integers

inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return (unsigned long long)((unsigned __int128)a * b >> 64);
}
inline int __mulhi(int a, int b) { return int((int64_t(a) * b) >> 32); }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned((uint64_t(a) * b) >> 32); }
inline int __mul24(int a, int b) { return int(int64_t(int(unsigned(a) << 8) >> 8) * (int(unsigned(b) << 8) >> 8)); }
inline unsigned __sad(int a, int b, unsigned c) { return unsigned(a > b ? int64_t(a) - b : int64_t(b) - a) + c; }

namespace emu {
// Sum of four byte products; each side is signed or not; the sum wraps.
template <class A, class B>
inline int dp4a(uint32_t a, uint32_t b, int c) {
  unsigned sum = unsigned(c);
  for (int i = 0; i < 4; ++i) sum += unsigned(int(A(a >> 8 * i)) * int(B(b >> 8 * i)));
  return int(sum);
}
}  // namespace emu
inline int __dp4a(int a, int b, int c) { return emu::dp4a<int8_t, int8_t>(a, b, c); }
inline unsigned __dp4a(unsigned a, unsigned b, unsigned c) { return emu::dp4a<uint8_t, uint8_t>(a, b, int(c)); }

namespace emu {
template <class F>
inline unsigned by_bytes(unsigned a, unsigned b, F f) {
  unsigned r = 0;
  for (int i = 0; i < 4; ++i) r |= (unsigned(f(a >> 8 * i & 255u, b >> 8 * i & 255u)) & 255u) << (8 * i);
  return r;
}
}  // namespace emu
inline unsigned __vadd4(unsigned a, unsigned b) {
  return emu::by_bytes(a, b, [](int x, int y) { return x + y; });
}
inline unsigned __vsub4(unsigned a, unsigned b) {
  return emu::by_bytes(a, b, [](int x, int y) { return x - y; });
}
inline unsigned __vcmpeq4(unsigned a, unsigned b) {
  return emu::by_bytes(a, b, [](int x, int y) { return x == y ? 255 : 0; });
}

// min and max as CUDA overloads them: mixed signs give unsigned, floats ignore NaN
#define EMU_MIN_MAX(T)                             \
  inline T min(T a, T b) { return b < a ? b : a; } \
  inline T max(T a, T b) { return a < b ? b : a; }
EMU_MIN_MAX(int)
EMU_MIN_MAX(unsigned)
EMU_MIN_MAX(long)
EMU_MIN_MAX(unsigned long) EMU_MIN_MAX(long long) EMU_MIN_MAX(unsigned long long)
#undef EMU_MIN_MAX
    inline unsigned min(int a, unsigned b) {
  return min(unsigned(a), b);
}
inline unsigned min(unsigned a, int b) { return min(a, unsigned(b)); }
inline unsigned max(int a, unsigned b) { return max(unsigned(a), b); }
inline unsigned max(unsigned a, int b) { return max(a, unsigned(b)); }
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }
using std::abs;
using std::isfinite;
using std::isinf;
using std::isnan;

// ---------------------------------------------------------------------------------------------- floats

inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
inline float __expf(float x) { return expf(x); }
inline float __exp10f(float x) { return powf(10.0f, x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __log10f(float x) { return log10f(x); }
inline float __powf(float x, float y) { return powf(x, y); }
inline float __sinf(float x) { return sinf(x); }
inline float __cosf(float x) { return cosf(x); }
inline void __sincosf(float x, float* s, float* c) { *s = sinf(x), *c = cosf(x); }
inline float __tanhf(float x) { return tanhf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __saturatef(float x) { return fminf(fmaxf(x, 0.0f), 1.0f); }
inline float sinpif(float x) { return float(sin(M_PI * fmod(double(x), 2.0))); }
inline float cospif(float x) { return float(cos(M_PI * fmod(double(x), 2.0))); }
inline void sincospif(float x, float* s, float* c) { *s = sinpif(x), *c = cospif(x); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __frsqrt_rn(float a) { return float(1.0 / sqrt(double(a))); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }

namespace emu {
// Conversions saturate and turn NaN into 0, as cvt does.
template <class Int>
inline Int to_int(double rounded) {
  if (rounded != rounded) return 0;
  constexpr double low = double(std::is_signed<Int>::value ? -(double(Int(1) << (sizeof(Int) * 8 - 2)) * 2) : 0.0);
  const double high = std::is_signed<Int>::value ? -low : double(uint64_t(1) << (sizeof(Int) * 8 - 1)) * 2;
  if (rounded <= low) return std::is_signed<Int>::value ? Int(uint64_t(1) << (sizeof(Int) * 8 - 1)) : Int(0);
  if (rounded >= high) return Int(~Int(0)) < 0 ? Int(~(uint64_t(1) << (sizeof(Int) * 8 - 1))) : Int(~Int(0));
  return Int(rounded);
}
}  // namespace emu
#define EMU_FLOAT_TO_INT(name, Int)                                                      \
  inline Int __float2##name##_rn(float x) { return emu::to_int<Int>(rint(double(x))); }  \
  inline Int __float2##name##_rz(float x) { return emu::to_int<Int>(trunc(double(x))); } \
  inline Int __float2##name##_rd(float x) { return emu::to_int<Int>(floor(double(x))); } \
  inline Int __float2##name##_ru(float x) { return emu::to_int<Int>(ceil(double(x))); }  \
  inline Int __double2##name##_rn(double x) { return emu::to_int<Int>(rint(x)); }        \
  inline Int __double2##name##_rz(double x) { return emu::to_int<Int>(trunc(x)); }
EMU_FLOAT_TO_INT(int, int)
EMU_FLOAT_TO_INT(uint, unsigned)
EMU_FLOAT_TO_INT(ll, long long)
EMU_FLOAT_TO_INT(ull, unsigned long long)
#undef EMU_FLOAT_TO_INT
    inline float __int2float_rn(int x) {
  return float(x);
}
inline float __uint2float_rn(unsigned x) { return float(x); }
inline float __ll2float_rn(long long x) { return float(x); }
inline float __ull2float_rn(unsigned long long x) { return float(x); }
inline double __int2double_rn(int x) { return x; }
inline float __double2float_rn(double x) { return float(x); }

#include "emu_half.h"

// ---------------------------------------------------------------------------------------------- barriers, votes

EMU_CALL void __syncthreads() { emu::barrier(0, 0, 0, emu::Predicate::none); }
EMU_CALL int __syncthreads_count(int p) { return emu::barrier(0, 0, p, emu::Predicate::count); }
EMU_CALL int __syncthreads_and(int p) { return emu::barrier(0, 0, p, emu::Predicate::all); }
EMU_CALL int __syncthreads_or(int p) { return emu::barrier(0, 0, p, emu::Predicate::any); }
EMU_CALL void __syncwarp(unsigned mask = 0xffffffffu) { emu::sync_warp(mask); }
EMU_CALL unsigned __ballot_sync(unsigned mask, int p) { return emu::ballot(mask, p != 0); }
EMU_CALL int __any_sync(unsigned mask, int p) { return emu::ballot(mask, p != 0) != 0; }
EMU_CALL int __all_sync(unsigned mask, int p) { return emu::ballot(mask, p != 0) == mask; }
EMU_CALL unsigned __activemask() { return emu::active_mask(); }
template <class T>
EMU_CALL unsigned __match_any_sync(unsigned mask, T value) {
  return emu::match_any(mask, emu::bits<uint64_t>(value));
}
template <class T>
EMU_CALL unsigned __match_all_sync(unsigned mask, T value, int* predicate) {
  const unsigned same = emu::match_any(mask, emu::bits<uint64_t>(value));
  *predicate = same == mask;
  return *predicate ? mask : 0;
}

// ---------------------------------------------------------------------------------------------- shuffles

namespace emu {
template <class T>
EMU_CALL T shuffle_value(unsigned mask, T value, unsigned source) {
  static_assert(std::is_trivially_copyable<T>::value && (sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 2),
                "CUDA shuffles 2 (half), 4 and 8 byte values");
  return bits<T>(shuffle(mask, bits<uint64_t>(value), source));
}
}  // namespace emu
template <class T>
EMU_CALL T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const unsigned lane = emu::builtin(emu::kLane);
  return emu::shuffle_value(mask, value, (lane & ~unsigned(width - 1)) | (source & unsigned(width - 1)));
}
template <class T>
EMU_CALL T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
  const unsigned lane = emu::builtin(emu::kLane), source = lane ^ unsigned(lane_mask);
  const unsigned last = lane | unsigned(width - 1);  // of this lane's segment: later segments cannot be read
  return emu::shuffle_value(mask, value, source <= last ? source : lane);
}
template <class T>
EMU_CALL T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const unsigned lane = emu::builtin(emu::kLane);
  return emu::shuffle_value(mask, value, (lane & unsigned(width - 1)) + delta < unsigned(width) ? lane + delta : lane);
}
template <class T>
EMU_CALL T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const unsigned lane = emu::builtin(emu::kLane);
  return emu::shuffle_value(mask, value, (lane & unsigned(width - 1)) >= delta ? lane - delta : lane);
}

EMU_CALL unsigned __reduce_add_sync(unsigned m, unsigned v) { return emu::reduce(m, v, emu::Reduction::add); }
EMU_CALL int __reduce_add_sync(unsigned m, int v) { return int(emu::reduce(m, unsigned(v), emu::Reduction::add)); }
EMU_CALL unsigned __reduce_min_sync(unsigned m, unsigned v) { return emu::reduce(m, v, emu::Reduction::min_u); }
EMU_CALL int __reduce_min_sync(unsigned m, int v) { return int(emu::reduce(m, unsigned(v), emu::Reduction::min_s)); }
EMU_CALL unsigned __reduce_max_sync(unsigned m, unsigned v) { return emu::reduce(m, v, emu::Reduction::max_u); }
EMU_CALL int __reduce_max_sync(unsigned m, int v) { return int(emu::reduce(m, unsigned(v), emu::Reduction::max_s)); }
EMU_CALL unsigned __reduce_and_sync(unsigned m, unsigned v) { return emu::reduce(m, v, emu::Reduction::and_); }
EMU_CALL unsigned __reduce_or_sync(unsigned m, unsigned v) { return emu::reduce(m, v, emu::Reduction::or_); }
EMU_CALL unsigned __reduce_xor_sync(unsigned m, unsigned v) { return emu::reduce(m, v, emu::Reduction::xor_); }

// ---------------------------------------------------------------------------------------------- loads, atomics

namespace emu {

// ld/st with .relaxed/.acquire/.release and a scope. Spinning on load() lets the other threads run.
template <class T>
EMU_CALL T load(const T* address, Scope scope = Scope::gpu) {
  return bits<T>(atomic_begin(address, sizeof(T), Access::read, scope));
}
template <class T>
EMU_CALL void store(T* address, T value, Scope scope = Scope::gpu) {
  atomic_begin(address, sizeof(T), Access::write, scope);
  atomic_end(address, sizeof(T), bits<uint64_t>(value));
}
// atom.*: new value = f(old value); returns the old one.
template <class T, class F>
EMU_CALL T update(T* address, F f, Scope scope) {
  static_assert(sizeof(T) <= 8, "atomics of 16 bytes are not here");
  const T old = bits<T>(atomic_begin(address, sizeof(T), Access::update, scope));
  atomic_end(address, sizeof(T), bits<uint64_t>(f(old)));
  return old;
}
template <class T>
EMU_CALL T wrapping_add(T a, T b) {
  if constexpr (std::is_integral<T>::value)
    return T(typename std::make_unsigned<T>::type(a) + b);
  else
    return a + b;
}
template <class T>
EMU_CALL bool same_bits(T a, T b) {
  return bits<uint64_t>(a) == bits<uint64_t>(b);
}

#define EMU_UPDATE(name, new_value)                               \
  template <class T>                                              \
  EMU_CALL T atomic_##name(T* p, T v, Scope scope = Scope::gpu) { \
    return update(p, [v](T old) { return T(new_value); }, scope); \
  }
EMU_UPDATE(add, wrapping_add(old, v))
EMU_UPDATE(sub, wrapping_add(old, T(T(0) - v)))
EMU_UPDATE(exch, ((void)old, v))
EMU_UPDATE(min, v < old ? v : old)
EMU_UPDATE(max, old < v ? v : old)
EMU_UPDATE(and, old& v)
EMU_UPDATE(or, old | v)
EMU_UPDATE(xor, old ^ v)
EMU_UPDATE(inc, old >= v ? T(0) : T(old + 1))
EMU_UPDATE(dec, old == 0 || old > v ? v : T(old - 1))
#undef EMU_UPDATE
template <class T>
EMU_CALL T atomic_cas(T* p, T expected, T v, Scope scope = Scope::gpu) {
  return update(p, [expected, v](T old) { return same_bits(old, expected) ? v : old; }, scope);
}

// The value's type does not take part in deduction: atomicAdd(float*, 1) converts, as CUDA's overloads do.
template <class T>
struct identity {
  using type = T;
};
template <class T>
using same = typename identity<T>::type;

}  // namespace emu

#define EMU_ATOMIC(Name, name)                             \
  template <class T>                                       \
  EMU_CALL T atomic##Name(T* p, emu::same<T> v) {          \
    return emu::atomic_##name(p, v);                       \
  }                                                        \
  template <class T>                                       \
  EMU_CALL T atomic##Name##_block(T* p, emu::same<T> v) {  \
    return emu::atomic_##name(p, v, emu::Scope::block);    \
  }                                                        \
  template <class T>                                       \
  EMU_CALL T atomic##Name##_system(T* p, emu::same<T> v) { \
    return emu::atomic_##name(p, v, emu::Scope::system);   \
  }
EMU_ATOMIC(Add, add)
EMU_ATOMIC(Sub, sub)
EMU_ATOMIC(Exch, exch)
EMU_ATOMIC(Min, min) EMU_ATOMIC(Max, max) EMU_ATOMIC(And, and) EMU_ATOMIC(Or, or) EMU_ATOMIC(Xor, xor)
    EMU_ATOMIC(Inc, inc) EMU_ATOMIC(Dec, dec)
#undef EMU_ATOMIC
        template <class T>
        EMU_CALL T atomicCAS(T* p, emu::same<T> e, emu::same<T> v) {
  return emu::atomic_cas(p, e, v);
}
template <class T>
EMU_CALL T atomicCAS_block(T* p, emu::same<T> e, emu::same<T> v) {
  return emu::atomic_cas(p, e, v, emu::Scope::block);
}
template <class T>
EMU_CALL T atomicCAS_system(T* p, emu::same<T> e, emu::same<T> v) {
  return emu::atomic_cas(p, e, v, emu::Scope::system);
}

EMU_CALL void __threadfence() { emu::fence(emu::Scope::gpu); }
EMU_CALL void __threadfence_block() { emu::fence(emu::Scope::block); }
EMU_CALL void __threadfence_system() { emu::fence(emu::Scope::system); }
EMU_CALL void __nanosleep(unsigned) { emu::yield(); }
EMU_CALL long long clock64() { return 0; }
EMU_CALL unsigned long long __globaltimer() { return 0; }

// cache hints: plain loads and stores
#define EMU_LOAD(name)                \
  template <class T>                  \
  EMU_CALL T name(const T* address) { \
    return *address;                  \
  }
EMU_LOAD(__ldg)
EMU_LOAD(__ldcs)
EMU_LOAD(__ldcg)
EMU_LOAD(__ldca) EMU_LOAD(__ldlu) EMU_LOAD(__ldcv)
#undef EMU_LOAD
#define EMU_STORE(name)                                \
  template <class T>                                   \
  EMU_CALL void name(T* address, emu::same<T> value) { \
    *address = value;                                  \
  }
    EMU_STORE(__stcs) EMU_STORE(__stcg) EMU_STORE(__stwb) EMU_STORE(__stwt)
#undef EMU_STORE

    // ---------------------------------------------------------------------------------------------- for PTX wrappers

    namespace emu {

  template <class T>
  EMU_CALL T* dynamic_shared_as() {
    return static_cast<T*>(dynamic_shared());
  }

  EMU_CALL unsigned lane_id() { return builtin(kLane); }
  EMU_CALL unsigned cluster_rank() { return builtin(kClusterRank); }  // %cluster_ctarank
  EMU_CALL unsigned cluster_size() { return builtin(kClusterSize); }  // %cluster_nctarank
  EMU_CALL void cluster_sync() { cluster_arrive(), cluster_wait(); }
  template <class T>
  EMU_CALL T* map_shared_rank(T * shared, unsigned rank) {
    return static_cast<T*>(map_shared_rank_bytes(shared, rank));
  }

  EMU_CALL void barrier_sync(int id, int threads) { barrier(id, threads, 0, Predicate::none); }  // bar.sync id, threads

  // cp.async.{ca,cg}.shared.global [shared], [global], BYTES, source_bytes: what source_bytes leaves out is zero
  template <int BYTES>
  EMU_CALL void cp_async(void* shared, const void* global, int source_bytes = BYTES) {
    static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "cp.async copies 4, 8 or 16 bytes");
    async_copy(shared, global, BYTES, source_bytes);
  }
  EMU_CALL void cp_async_commit() { async_commit(); }
  template <int PENDING>
  EMU_CALL void cp_async_wait_group() {
    async_wait_group(PENDING);
  }
  EMU_CALL void cp_async_wait_all() { async_wait_all(); }

  // mma.sync.aligned.<shape>.row.col: registers as PTX numbers them; d may be c
  EMU_CALL void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4]) {
    mma(Mma::f16, d, a, 4, b, 2, c);
  }
  EMU_CALL void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4]) {
    mma(Mma::bf16, d, a, 4, b, 2, c);
  }
  EMU_CALL void mma_m16n8k8_f16(float (&d)[4], const uint32_t (&a)[2], const uint32_t (&b)[1], const float (&c)[4]) {
    mma(Mma::f16, d, a, 2, b, 1, c);
  }
  EMU_CALL void mma_m16n8k8_bf16(float (&d)[4], const uint32_t (&a)[2], const uint32_t (&b)[1], const float (&c)[4]) {
    mma(Mma::bf16, d, a, 2, b, 1, c);
  }
  EMU_CALL void mma_m16n8k32_s8(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const int (&c)[4],
                                Mma type = Mma::s8) {
    mma(type, d, a, 4, b, 2, c);
  }
  EMU_CALL void mma_m16n8k16_s8(int (&d)[4], const uint32_t (&a)[2], const uint32_t (&b)[1], const int (&c)[4],
                                Mma type = Mma::s8) {
    mma(type, d, a, 2, b, 1, c);
  }
  EMU_CALL void mma_m8n8k16_s8(int (&d)[2], const uint32_t (&a)[1], const uint32_t (&b)[1], const int (&c)[2],
                               Mma type = Mma::s8) {
    mma(type, d, a, 1, b, 1, c);
  }

  // ldmatrix.sync.aligned.m8n8.xN[.trans].shared.b16: lane 8*j + r passes the address of row r of matrix j
  template <int COUNT, bool TRANSPOSED = false>
  EMU_CALL void ldmatrix(uint32_t (&registers)[COUNT], const void* row) {
    static_assert(COUNT == 1 || COUNT == 2 || COUNT == 4, "ldmatrix loads 1, 2 or 4 matrices");
    load_matrix(registers, COUNT, TRANSPOSED, row);
  }

  EMU_CALL void griddepcontrol_wait() {}  // launches never overlap here
  EMU_CALL void griddepcontrol_launch_dependents() {}

}  // namespace emu

// ---------------------------------------------------------------------------------------------- launching

namespace emu {

template <class T>
constexpr char kind_of() {
  if (std::is_pointer<T>::value) return 'p';
  if (std::is_same<T, __half>::value) return 'h';
  if (std::is_same<T, __nv_bfloat16>::value) return 'b';
  if (std::is_void<T>::value) return 'v';
  if (std::is_floating_point<T>::value) return 'f';
  if (std::is_integral<T>::value) return std::is_signed<T>::value ? 'i' : 'u';
  return 's';
}
template <class T>
constexpr uint32_t size_of() {
  if constexpr (std::is_void<T>::value)
    return 1;
  else
    return sizeof(T);
}
template <class T>
constexpr Parameter parameter_of() {
  using Element = std::remove_pointer_t<T>;
  using Bare = std::remove_cv_t<Element>;
  const bool pointer = std::is_pointer<T>::value;
  return {kind_of<T>(), pointer ? kind_of<Bare>() : '-', pointer && std::is_const<Element>::value, 0,
          sizeof(T),    pointer ? size_of<Bare>() : 0};
}

template <auto KERNEL>
struct Launcher;
template <class... A, void (*KERNEL)(A...)>
struct Launcher<KERNEL> {
  static constexpr Parameter parameters[sizeof...(A) + 1] = {parameter_of<std::remove_cv_t<A>>()..., Parameter{}};
  template <size_t... I>
  __attribute__((no_sanitize("thread", "undefined"))) static void unpack([[maybe_unused]] void** arguments,
                                                                         std::index_sequence<I...>) {
    KERNEL(*static_cast<std::remove_cv_t<A>*>(arguments[I])...);
  }
  __attribute__((no_sanitize("thread", "undefined"))) static void call(void** arguments) {
    unpack(arguments, std::index_sequence_for<A...>{});
  }
  static constexpr Entry entry = {&call, parameters, sizeof...(A)};
};

}  // namespace emu

#define EMULATOR_KERNEL(space, NAME)                                                         \
  extern "C" __attribute__((visibility("default"), used)) const emu::Entry emu_entry_##NAME; \
  const emu::Entry emu_entry_##NAME = emu::Launcher<&space::NAME>::entry;
