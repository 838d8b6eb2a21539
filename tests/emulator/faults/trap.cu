// A device-side assertion fails.
extern "C" __global__ void KERNEL_NAME(const float* x, float* y, int n) {
  assert(n == (FAULT ? 0 : n));
  for (int i = threadIdx.x; i < n; i += blockDim.x) y[i] = x[i];
}
