// Adds to an output that nobody set to zero.
extern "C" __global__ void KERNEL_NAME(const float* x, float* y, int n) {
  const int i = threadIdx.x;
  if (i >= n) return;
#if !FAULT
  y[i] = 0.0f;
#endif
  y[i] += x[i];
}
