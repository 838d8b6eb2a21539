// The warps disagree about how many of them meet.
extern "C" __global__ void KERNEL_NAME(const float* x, float* y, int n) {
  const int i = threadIdx.x;
  emu::barrier_sync(3, FAULT && i < 32 ? 64 : 128);
  if (i < n) y[i] = x[i];
}
