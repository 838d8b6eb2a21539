// The last element falls to nobody.
extern "C" __global__ void KERNEL_NAME(const float* x, float* y, int n) {
  const int i = threadIdx.x;
#if FAULT
  if (i < n - 1) y[i] = x[i];
#else
  if (i < n) y[i] = x[i];
#endif
}
