// Reads the other block's shared memory before it is known to be written.
extern "C" __global__ void KERNEL_NAME(const float* x, float* y, int n) {
  __shared__ float s[128];
  const int i = threadIdx.x;
  s[i] = x[min(i, n - 1)];
#if !FAULT
  emu::cluster_sync();
#else
  __syncthreads();
#endif
  if (emu::cluster_rank() == 1 && i < n) y[i] = emu::map_shared_rank(s, 0)[n - 1 - i];
  emu::cluster_sync();
}
