// An index one past an array: what lies behind it may well be another variable.
extern "C" __global__ void KERNEL_NAME(const float* x, float* y, int n) {
  __shared__ float first[4], second[8];
  const int warp = threadIdx.x / 32;
  if (threadIdx.x % 32 == 0) first[warp + (FAULT ? 1 : 0)] = second[warp] = x[warp];
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += blockDim.x) y[i] = first[1] + second[1];
}
