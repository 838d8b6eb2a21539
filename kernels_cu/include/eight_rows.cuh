// mma with an operand of eight rows: the upper half of the instruction's sixteen is left out, and takes no registers.
#pragma once
#include "ptx.cuh"

// Two floats as X, the first in the low half.
template <typename X>
__device__ __forceinline__ unsigned pack2(float a, float b);
template <>
__device__ __forceinline__ unsigned pack2<__half>(float a, float b) {
  return __half_as_ushort(__float2half_rn(a)) | unsigned(__half_as_ushort(__float2half_rn(b))) << 16;
}
template <>
__device__ __forceinline__ unsigned pack2<__nv_bfloat16>(float a, float b) {
  return __bfloat16_as_ushort(__float2bfloat16_rn(a)) | unsigned(__bfloat16_as_ushort(__float2bfloat16_rn(b))) << 16;
}

// sums [8 x 8] += a [8 x 16] b [16 x 8] over one warp with float32 sums. Lane 4 g + q has in a0 row g, k = 2 q and 2 q + 1, in a1
// the same at k + 8; in b0, b1 column g at those k; in sums row g, columns 2 q and 2 q + 1.
__device__ __forceinline__ void mma_all_rows(float (&sums)[4], const unsigned (&a)[4], unsigned b0, unsigned b1,
                                             __half) {
  mma_f16(sums, a, b0, b1);
}
__device__ __forceinline__ void mma_all_rows(float (&sums)[4], const unsigned (&a)[4], unsigned b0, unsigned b1,
                                             __nv_bfloat16) {
  mma_bf16(sums, a, b0, b1);
}
template <typename X>
__device__ __forceinline__ void mma_eight_rows(float (&sums)[2], unsigned a0, unsigned a1, unsigned b0, unsigned b1) {
  // The upper rows' sums begin as zero constants each time: ptxas gives them registers for the instruction only.
  float all[4] = {sums[0], sums[1], 0.f, 0.f};
  const unsigned a[4] = {a0, 0u, a1, 0u};
  mma_all_rows(all, a, b0, b1, X());
  sums[0] = all[0];
  sums[1] = all[1];
}
