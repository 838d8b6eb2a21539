// Block 0 waits for a flag that block 1 sets, but nothing makes both run at once (not launched cooperatively).
extern "C" __global__ void KERNEL_NAME(const float* x, float* y, unsigned* flag, int n) {
  if (blockIdx.x == 0) {
#if FAULT
    while (emu::load(flag) == 0u) __nanosleep(20);
#endif
    for (int i = threadIdx.x; i < n; i += blockDim.x) y[i] = x[i];
  } else if (threadIdx.x == 0) {
    emu::store(flag, 1u);
  }
}
