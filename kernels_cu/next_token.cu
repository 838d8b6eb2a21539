// Ends a greedy step: the tokens go where the next step's embedding reads them, and each sequence is `count` positions longer.
// One block.
//
// Macros: THREADS, KERNEL_NAME.
#include "ptx.cuh"

#if !defined(THREADS) || !defined(KERNEL_NAME)
#error "next_token.cu needs THREADS and KERNEL_NAME"
#endif

extern "C" __global__ void __launch_bounds__(THREADS)
    KERNEL_NAME(unsigned long long* best,  // [B] keys of lm_head.cu, cleared here; null: no head was computed
                int* token,                // [B]
                int* length,               // [B]
                int B, int count) {
  wait_for_previous_kernels();
  let_next_kernel_start();
  for (int b = threadIdx.x; b < B; b += THREADS) {
    if (best != nullptr) {
      token[b] = int(~unsigned(best[b]));
      best[b] = 0ull;
    }
    length[b] += count;
  }
}
