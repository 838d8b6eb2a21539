// y = scale * (t @ x) (+ residual) in one launch: a ternary matrix times a few tokens, without a norm.
// include/ternary_product.cuh says how the work is split and what bounds it.
//
// Macros: X_T (float, __half, __nv_bfloat16), ALIGNED (1: four elements of x can be loaded at once), INT8,
// TOKENS, SPREAD, SPLIT, AHEAD, THREADS, HELD: see ProductShape; RESIDENT blocks a multiprocessor that registers are left for;
// KERNEL_NAME.
#include "ternary_product.cuh"

#if !defined(X_T) || !defined(ALIGNED) || !defined(INT8) || !defined(TOKENS) || !defined(SPREAD) || !defined(SPLIT) || \
    !defined(AHEAD) || !defined(THREADS) || !defined(HELD) || !defined(RESIDENT) || !defined(KERNEL_NAME)
#error \
    "ternary_matmul.cu needs X_T, ALIGNED, INT8, TOKENS, SPREAD, SPLIT, AHEAD, THREADS, HELD, RESIDENT and KERNEL_NAME"
#endif

// Nothing is __restrict__: loads of the read-only path may move over the wait for earlier kernels, in both directions.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
    KERNEL_NAME(const X_T* x,         // [N, K]
                const uint4* w,       // [M, C] packed chunks, C = ceil(K / 64)
                const float* scale,   // [M], or one with scale_stride 0
                int scale_stride,     //
                const X_T* residual,  // [N, M], or null; may be y itself
                void* y,              // [N, M]
                int y_dtype,          // 0 float16, 1 bfloat16, 2 float32
                int M, int K, int N,  //
                int slice_steps) {    // tuning.ProductLaunch
  using Shape = ProductShape<X_T, false, true, ALIGNED, INT8, TOKENS, SPREAD, SPLIT, AHEAD, THREADS, HELD>;
  ternary_product<Shape>(x, nullptr, w, scale, scale_stride, residual, y, y_dtype, kNoFfn, M, K, N, 0.f, slice_steps);
}
