// Every thread of the block stores, also those beyond n.
extern "C" __global__ void KERNEL_NAME(const float* x, float* y, int n) {
  const int i = threadIdx.x;
#if !FAULT
  if (i < n)
#endif
    y[i] = 2.0f * x[min(i, n - 1)];
}
