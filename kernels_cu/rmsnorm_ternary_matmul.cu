// y = scale * (t @ rmsnorm(x)) (+ residual) in one launch: RMSNorm, int8 quantisation where asked for, and the product.
// include/ternary_product.cuh says how the work is split and what bounds it, include/token_scale.cuh how norm and
// quantisation share one pass.
//
// Every block normalises x for itself: K elements from L2 against ROWS * K / 4 bytes of weights a group. That is cheaper
// than any exchange between blocks while a block has several row tiles, or the matrix is so small that all is latency.
//
// Macros: X_T (float, __half, __nv_bfloat16), INT8, TOKENS, LANES, ROWS, AHEAD, THREADS, HELD: see ProductShape; RESIDENT blocks a
// multiprocessor that registers are left for. KERNEL_NAME.
#include "ternary_product.cuh"

#if !defined(X_T) || !defined(INT8) || !defined(TOKENS) || !defined(LANES) || !defined(ROWS) || !defined(AHEAD) || \
    !defined(THREADS) || !defined(HELD) || !defined(RESIDENT) || !defined(KERNEL_NAME)
#error "rmsnorm_ternary_matmul.cu needs X_T, INT8, TOKENS, LANES, ROWS, AHEAD, THREADS, HELD, RESIDENT and KERNEL_NAME"
#endif

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
    KERNEL_NAME(const X_T* __restrict__ x,        // [N, K]
                const void* __restrict__ gamma,   // [K], float32 or x's dtype
                int gamma_is_float32,             //
                const uint4* __restrict__ w,      // [M, C] packed chunks, C = ceil(K / 64)
                const float* __restrict__ scale,  // [M], or one with scale_stride 0
                int scale_stride,                 //
                const void* residual,             // [N, M] of x's dtype, or null; may be y itself
                int residual_dtype,               // 0 float16, 1 bfloat16, 2 float32
                void* y,                          // [N, M]
                int y_dtype,                      // as residual_dtype
                int M, int K, int N, float eps,   //
                int slice_steps, int pitch) {     // tuning.ProductLaunch
  using Shape = ProductShape<X_T, true, INT8, TOKENS, LANES, ROWS, AHEAD, THREADS, HELD>;
  ternary_product<Shape>(x, nullptr, gamma, gamma_is_float32, w, scale, scale_stride, residual, residual_dtype, y,
                         y_dtype, M, K, N, eps, slice_steps, pitch);
}
