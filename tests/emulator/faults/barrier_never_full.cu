// Two warps wait at a named barrier made for three.
extern "C" __global__ void KERNEL_NAME(const float* x, float* y, int n) {
  __shared__ float s[64];
  const int i = threadIdx.x;
  if (i < 64) {
    s[i] = x[i];
    emu::barrier_sync(1, FAULT ? 96 : 64);
    y[i] = s[63 - i];
  } else if (i < n) {
    y[i] = x[i];
  }
  __syncthreads();
}
