// The activation of the FFN: h = silu(gate) * up, or silu(up) where there is no gate. Elementwise, latency-bound.
//
// Macros: X_T (float, __half, __nv_bfloat16), GATED, THREADS, KERNEL_NAME.
#include "elements.cuh"
#include "ptx.cuh"

#if !defined(X_T) || !defined(GATED) || !defined(THREADS) || !defined(KERNEL_NAME)
#error "silu.cu needs X_T, GATED, THREADS and KERNEL_NAME"
#endif

extern "C" __global__ void __launch_bounds__(THREADS)
    KERNEL_NAME(const X_T* up,  // [N, 2 * I] with gate first when GATED, else [N, I]
                X_T* h,         // [N, I]
                int I) {        // grid: (blocks over I, N)
  let_next_kernel_start();
  wait_for_previous_kernels();
  const int i = blockIdx.x * THREADS + threadIdx.x;
  if (i >= I) return;
  const X_T* const row = up + (long long)blockIdx.y * I * (GATED ? 2 : 1);
  const float gate = to_float(row[i]);
  float v = gate / (1.f + expf(-gate));
  if (GATED) v *= to_float(row[I + i]);
  from_float(v, h + (long long)blockIdx.y * I + i);
}
