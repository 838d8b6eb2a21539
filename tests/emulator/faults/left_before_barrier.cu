// Threads beyond n leave early, and the others wait for them.
extern "C" __global__ void KERNEL_NAME(const float* x, float* y, int n) {
  __shared__ float s[128];
  const int i = threadIdx.x;
#if FAULT
  if (i >= n) return;
#endif
  if (i < n) s[i] = x[i];
  __syncthreads();
  if (i < n) y[i] = s[n - 1 - i];
}
