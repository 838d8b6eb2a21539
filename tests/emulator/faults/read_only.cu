// Writes through a parameter that the signature promises not to change.
extern "C" __global__ void KERNEL_NAME(const float* x, float* y, int n) {
  const int i = threadIdx.x;
  if (i >= n) return;
  y[i] = x[i];
#if FAULT
  const_cast<float*>(x)[i] = 0.0f;
#endif
}
