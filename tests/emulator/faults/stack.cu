// Recursion without an end.
__device__ __noinline__ float deeper(const float* x, int n) {
  volatile float local[64];
  local[n & 63] = x[0];
  return n == 0 ? local[0] : deeper(x, n - 1) + local[n & 63];
}
extern "C" __global__ void KERNEL_NAME(const float* x, float* y, int n) {
  const float v = deeper(x, FAULT ? 1 << 20 : 3);
  for (int i = threadIdx.x; i < n; i += blockDim.x) y[i] = v;
}
