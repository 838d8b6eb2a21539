// Divides by a count that is zero for small n.
extern "C" __global__ void KERNEL_NAME(const float* x, float* y, int n) {
  const int groups = n / 1000 + (FAULT ? 0 : 1);
  const int i = threadIdx.x;
  if (i < n) y[i] = x[i] + float(i / groups);
}
