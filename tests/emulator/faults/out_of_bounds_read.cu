// The loop's bound includes n: the last thread reads one element too many.
extern "C" __global__ void KERNEL_NAME(const float* x, float* y, int n) {
#if FAULT
  for (int i = threadIdx.x; i <= n; i += blockDim.x) {
#else
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
#endif
    const float v = x[i];
    if (i < n)
      y[i] = v > 0.0f ? v : 0.0f;
    else if (v == 12345.0f)
      y[0] = v;
  }
}
