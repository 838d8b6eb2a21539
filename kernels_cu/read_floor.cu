// The yardstick of the benchmark: reads bytes with 16-byte loads and does nothing else with them. What a kernel that has
// to read the same bytes can hope for, launch included. Nothing in the library uses it. With CHECK it also shows that it did
// read them all.
//
// Macros: THREADS, CHECK (0: the yardstick; 1: the same loop, and the exclusive or of every 32-bit word goes to sink),
// KERNEL_NAME.
#include "ptx.cuh"

#if !defined(THREADS) || !defined(CHECK) || !defined(KERNEL_NAME)
#error "read_floor.cu needs THREADS, CHECK and KERNEL_NAME"
#endif

extern "C" __global__ void __launch_bounds__(THREADS)
    KERNEL_NAME(const uint4* __restrict__ data,  // [count]
                long long count,                 // 16-byte words
                unsigned* __restrict__ sink) {   // [1]; CHECK: zero before; else written for one hash in 2^32, so that
  const long long stride = (long long)gridDim.x * THREADS;  // the loads are not for nothing
  unsigned hash = 0u;
  long long i = (long long)blockIdx.x * THREADS + threadIdx.x;
  for (; i + 3 * stride < count; i += 4 * stride) {
    const uint4 a = load_once(data + i), b = load_once(data + i + stride);
    const uint4 c = load_once(data + i + 2 * stride), d = load_once(data + i + 3 * stride);
    hash ^= (a.x ^ a.y ^ a.z ^ a.w) ^ (b.x ^ b.y ^ b.z ^ b.w) ^ (c.x ^ c.y ^ c.z ^ c.w) ^ (d.x ^ d.y ^ d.z ^ d.w);
  }
  for (; i < count; i += stride) {
    const uint4 a = load_once(data + i);
    hash ^= a.x ^ a.y ^ a.z ^ a.w;
  }
  if (CHECK) {
    atomicXor(sink, hash);
  } else if (hash == 0x9e3779b9u) {
    sink[0] = hash;
  }
}
