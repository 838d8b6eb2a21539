// Half of a warp shuffles with the mask of the whole warp.
extern "C" __global__ void KERNEL_NAME(const float* x, float* y, int n) {
  const int i = threadIdx.x;
  float v = x[min(i, n - 1)];
#if FAULT
  if (i % 32 < 16)
#endif
    v += __shfl_xor_sync(0xffffffffu, v, 1);
  __syncthreads();
  if (i < n) y[i] = v;
}
