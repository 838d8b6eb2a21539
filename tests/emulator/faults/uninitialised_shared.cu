// Only the first half of a shared array is filled, and a later element is read.
extern "C" __global__ void KERNEL_NAME(const float* x, float* y, int n) {
  __shared__ float s[128];
  const int i = threadIdx.x;
#if FAULT
  if (i < 64) s[i] = x[min(i, n - 1)];
#else
  s[i] = x[min(i, n - 1)];
#endif
  __syncthreads();
  if (i < n) y[i] = s[n - 1 - i];
}
