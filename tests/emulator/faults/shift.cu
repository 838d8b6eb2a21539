// Moves a field of a 32-bit word by the width of the word.
extern "C" __global__ void KERNEL_NAME(const float* x, float* y, int n) {
  const int i = threadIdx.x;
  if (i < n) y[i] = float(__float_as_uint(x[i]) >> (i % (FAULT ? 33 : 32)));
}
