// Four floats at once from an address that is a multiple of 4 bytes only.
extern "C" __global__ void KERNEL_NAME(const float* x, float* y, int n) {
#if FAULT
  const float* from = x + 1;
#else
  const float* from = x + 4;
#endif
  const float4 v = *reinterpret_cast<const float4*>(from);
  for (int i = threadIdx.x; i < n; i += blockDim.x) y[i] = v.x + v.y + v.z + v.w;
}
