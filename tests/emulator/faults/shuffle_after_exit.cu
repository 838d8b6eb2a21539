// Lanes beyond n are gone when the last warp reduces.
extern "C" __global__ void KERNEL_NAME(const float* x, float* y, int n) {
  const int i = threadIdx.x;
#if FAULT
  if (i >= n) return;
#endif
  float v = i < n ? x[i] : 0.0f;
  for (int d = 16; d; d >>= 1) v += __shfl_down_sync(0xffffffffu, v, d);
  if (i < n) y[i] = v;
}
