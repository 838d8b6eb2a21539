// A block of a cluster leaves while the other still reads its shared memory.
extern "C" __global__ void KERNEL_NAME(const float* x, float* y, int n) {
  __shared__ float s[128];
  const int i = threadIdx.x;
  s[i] = x[min(i, n - 1)] + float(emu::cluster_rank());
  emu::cluster_sync();
  if (emu::cluster_rank() == 0) {
    __syncthreads();
    if (i < n) y[i] = emu::map_shared_rank(s, 1)[i];
  }
#if !FAULT
  emu::cluster_sync();
#endif
}
