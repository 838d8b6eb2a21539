// Reads what cp.async has not delivered yet.
extern "C" __global__ void KERNEL_NAME(const float* x, float* y, int n) {
  __shared__ __align__(16) float s[128];
  const int i = threadIdx.x;
  emu::cp_async<4>(s + i, x + min(i, n - 1));
  emu::cp_async_commit();
#if !FAULT
  emu::cp_async_wait_group<0>();
#endif
  __syncthreads();
  if (i < n) y[i] = s[n - 1 - i];
}
