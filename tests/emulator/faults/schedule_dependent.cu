// Each block stores its number into the same element: who is last wins.
extern "C" __global__ void KERNEL_NAME(const float* x, float* y, int n) {
  const int i = threadIdx.x;
  if (i < n) y[i] = x[i];
#if FAULT
  if (i == 0) y[0] = float(blockIdx.x);
#endif
}
