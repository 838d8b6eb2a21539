// A shared scalar that only some other branch would have set.
extern "C" __global__ void KERNEL_NAME(const float* x, float* y, int n) {
  __shared__ float total;
#if FAULT
  if (threadIdx.x == 0 && n < 0) total = x[0];
#else
  if (threadIdx.x == 0) total = x[0];
#endif
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += blockDim.x) y[i] = total;
}
