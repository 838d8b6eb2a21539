// A stencil without its left edge: thread 0 reads x[-1].
extern "C" __global__ void KERNEL_NAME(const float* x, float* y, int n) {
  const int i = threadIdx.x;
  if (i >= n) return;
#if FAULT
  y[i] = x[i] - x[i - 1];
#else
  y[i] = i ? x[i] - x[i - 1] : x[i];
#endif
}
