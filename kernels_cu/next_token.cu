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
                unsigned char* seen,       // [B, V] 1: the token is in the context; the next one's is set
                int* length,               // [B]
                int B, int V, int count) {
  wait_for_previous_kernels();
  let_next_kernel_start();
  for (int b = threadIdx.x; b < B; b += THREADS) {
    if (best != nullptr) {
      const int next = int(~unsigned(best[b]));
      token[b] = next;
      seen[(long long)b * V + next] = 1;
      best[b] = 0ull;
    }
    length[b] += count;
  }
}
