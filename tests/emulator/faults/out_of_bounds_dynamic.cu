// Dynamic shared memory was requested for n floats, but a block of more threads writes it whole.
extern "C" __global__ void KERNEL_NAME(const float* x, float* y, int n) {
  float* s = emu::dynamic_shared_as<float>();
  const int i = threadIdx.x;
#if !FAULT
  if (i < n)
#endif
    s[i] = x[min(i, n - 1)];
  __syncthreads();
  if (i < n) y[i] = s[n - 1 - i];
}
