// A loop that does not advance.
extern "C" __global__ void KERNEL_NAME(const float* x, float* y, int n) {
  for (int i = threadIdx.x; i < n; i += FAULT ? 0 : blockDim.x) y[i] = x[i] + y[i];
}
