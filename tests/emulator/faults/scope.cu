// A counter of the whole grid is changed with block scope.
extern "C" __global__ void KERNEL_NAME(const float* x, float* y, unsigned* counter, int n) {
#if FAULT
  if (threadIdx.x == 0) atomicAdd_block(counter, 1u);
#else
  if (threadIdx.x == 0) atomicAdd(counter, 1u);
#endif
  for (int i = threadIdx.x; i < n; i += blockDim.x) y[i] = x[i];
}
