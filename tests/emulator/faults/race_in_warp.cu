// Lanes of one warp hand values over through shared memory without __syncwarp().
extern "C" __global__ void KERNEL_NAME(const float* x, float* y, int n) {
  __shared__ float s[128];
  const int i = threadIdx.x;
  s[i] = 0.0f;
  __syncwarp();
  s[i] = x[min(i, n - 1)];
#if !FAULT
  __syncwarp();
#endif
  if (i < n) y[i] = s[i ^ 1];
}
