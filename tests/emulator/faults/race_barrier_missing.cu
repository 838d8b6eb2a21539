// A block reversal without the barrier between its halves.
extern "C" __global__ void KERNEL_NAME(const float* x, float* y, int n) {
  __shared__ float s[128];
  const int i = threadIdx.x;
  s[i] = x[min(i, n - 1)];
  __syncthreads();
  const float v = s[127 - i];
#if !FAULT
  __syncthreads();
#endif
  s[i] = v;
  __syncthreads();
  if (i < n) y[i] = s[i];
}
