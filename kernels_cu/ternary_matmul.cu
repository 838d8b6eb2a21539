// y = scale * (t @ x) (+ residual): a ternary matrix times one or more tokens, without a norm.
// include/ternary_product.cuh says how the work is split and what bounds it.
//
// Macros: X_T (float, __half, __nv_bfloat16; signed char: quantised by rmsnorm_quantise.cu), INT8, TOKENS, LANES, ROWS,
// AHEAD, THREADS, HELD: see ProductShape; RESIDENT blocks a
// multiprocessor that registers are left for. KERNEL_NAME.
#include "ternary_product.cuh"

#if !defined(X_T) || !defined(INT8) || !defined(TOKENS) || !defined(LANES) || !defined(ROWS) || !defined(AHEAD) || \
    !defined(THREADS) || !defined(HELD) || !defined(RESIDENT) || !defined(KERNEL_NAME)
#error "ternary_matmul.cu needs X_T, INT8, TOKENS, LANES, ROWS, AHEAD, THREADS, HELD, RESIDENT and KERNEL_NAME"
#endif

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
    KERNEL_NAME(const X_T* __restrict__ x,          // [N, K]; quantised: [N, C * 64], C = ceil(K / 64), zero beyond K
                const float* __restrict__ dequant,  // [N] with quantised x, else null
                const uint4* __restrict__ w,        // [M, C] packed chunks
                const float* __restrict__ scale,    // [M], or one with scale_stride 0
                int scale_stride,                   //
                const void* residual,               // [N, M] of x's dtype, or null; may be y itself
                int residual_dtype,                 // 0 float16, 1 bfloat16, 2 float32
                void* y,                            // [N, M]
                int y_dtype,                        // as residual_dtype
                int M, int K, int N,                //
                int slice_steps, int pitch) {       // tuning.ProductLaunch
  using Shape = ProductShape<X_T, false, INT8, TOKENS, LANES, ROWS, AHEAD, THREADS, HELD>;
  ternary_product<Shape>(x, dequant, nullptr, 1, w, scale, scale_stride, residual, residual_dtype, y, y_dtype, M, K, N,
                         0.f, slice_steps, pitch);
}
