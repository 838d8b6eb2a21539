// The lower half of a warp reads a lane of the upper half, which does not take part.
extern "C" __global__ void KERNEL_NAME(const float* x, float* y, int n) {
  const int i = threadIdx.x;
  float v = x[min(i, n - 1)];
  if (i % 32 < 16) v = __shfl_sync(0x0000ffffu, v, FAULT ? 20 : 10);
  if (i < n) y[i] = v;
}
