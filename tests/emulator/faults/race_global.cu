// The block's workspace in global memory needs its barrier just as shared memory does.
extern "C" __global__ void KERNEL_NAME(const float* x, float* y, float* workspace, int n) {
  const int i = threadIdx.x;
  workspace[i] = x[min(i, n - 1)];
#if !FAULT
  __syncthreads();
#endif
  if (i < n) y[i] = workspace[0];
}
