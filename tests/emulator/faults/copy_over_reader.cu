// The second copy into a buffer starts while other warps may still read the first.
extern "C" __global__ void KERNEL_NAME(const float* x, float* y, int n) {
  __shared__ __align__(16) float s[128];
  const int i = threadIdx.x;
  float v = 0.0f;
  for (int round = 0; round < 2; ++round) {
    emu::cp_async<4>(s + i, x + min(i, n - 1));
    emu::cp_async_commit();
    emu::cp_async_wait_group<0>();
    __syncthreads();
    v += s[127 - i];
#if !FAULT
    __syncthreads();
#endif
  }
  if (i < n) y[i] = v;
}
