// y = scale * (t @ rmsnorm(x)) (+ residual) in one launch: RMSNorm, int8 quantisation where asked for, and the product.
// include/ternary_product.cuh says how the work is split and what bounds it, include/token_scale.cuh how norm and
// quantisation share one pass.
//
// Every block normalises its tokens for itself: K elements from L2 a token. That is cheaper than any exchange between
// blocks while the tokens are few; for many there are quantise_tiles.cu and ternary_gemm.cu.
//
// Macros: X_T (float, __half, __nv_bfloat16), GAMMA_F32 (0: gamma has x's dtype), ALIGNED (1: four elements of x and gamma can be loaded at once), INT8,
// TOKENS, SPREAD, SPLIT, AHEAD, THREADS, HELD: see ProductShape; RESIDENT blocks a multiprocessor that registers are left for;
// KERNEL_NAME.
#include "ternary_product.cuh"

#if !defined(X_T) || !defined(GAMMA_F32) || !defined(ALIGNED) || !defined(INT8) || !defined(TOKENS) || \
    !defined(SPREAD) || !defined(SPLIT) || !defined(AHEAD) || !defined(THREADS) || !defined(HELD) ||   \
    !defined(RESIDENT) || !defined(KERNEL_NAME)
#error \
    "rmsnorm_ternary_matmul.cu needs X_T, GAMMA_F32, ALIGNED, INT8, TOKENS, SPREAD, SPLIT, AHEAD, THREADS, HELD, RESIDENT and KERNEL_NAME"
#endif

// Nothing is __restrict__: loads of the read-only path may move over the wait for earlier kernels, in both directions.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
    KERNEL_NAME(const X_T* x,                    // [N, K]
                const void* gamma,               // [K]
                const uint4* w,                  // [M, C] packed chunks, C = ceil(K / 64)
                const float* scale,              // [M], or one with scale_stride 0
                int scale_stride,                //
                const X_T* residual,             // [N, M], or null; may be y itself
                void* y,                         // [N, M]
                int y_dtype,                     // 0 float16, 1 bfloat16, 2 float32
                int ffn,                         // ffn.cuh: 0, or the activation of an FFN
                int M, int K, int N, float eps,  //
                int slice_steps) {               // tuning.ProductLaunch
  using Shape = ProductShape<X_T, true, GAMMA_F32, ALIGNED, INT8, TOKENS, SPREAD, SPLIT, AHEAD, THREADS, HELD>;
  ternary_product<Shape>(x, gamma, w, scale, scale_stride, residual, y, y_dtype, ffn, M, K, N, eps, slice_steps);
}
