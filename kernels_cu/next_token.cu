// Ends a step: the greedy tokens go where the next step's embedding reads them, and the cache is `count` positions longer.
// One block.
//
// Macros: THREADS, KERNEL_NAME.
#include "ptx.cuh"

#if !defined(THREADS) || !defined(KERNEL_NAME)
#error "next_token.cu needs THREADS and KERNEL_NAME"
#endif

extern "C" __global__ void __launch_bounds__(THREADS)
    KERNEL_NAME(unsigned long long* best,  // [B] keys of argmax.cu, cleared here
                int* token,                // [B]
                int* length,               // [1]
                int B, int count) {
  let_next_kernel_start();
  wait_for_previous_kernels();
  for (int b = threadIdx.x; b < B; b += THREADS) {
    token[b] = int(~unsigned(best[b]));
    best[b] = 0ull;
  }
  if (threadIdx.x == 0) length[0] += count;
}
