// One instruction family a specialisation (CASE), to compare with NumPy.
#include <cuda_fp16.h>
#include <cuda_bf16.h>
#include <cuda/std/cstdint>

#if CASE == 0  // matrices [16, K] x [K, 8] of 16-bit floats, K = 16 or 8
extern "C" __global__ void KERNEL_NAME(const X_T* a, const X_T* b, const float* c, float* d) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4 * 2;
  const auto pair = [](const X_T* low, const X_T* high) {
    return uint32_t(reinterpret_cast<const uint16_t&>(*low)) | uint32_t(reinterpret_cast<const uint16_t&>(*high)) << 16;
  };
  uint32_t ra[K / 4], rb[K / 8];
  for (int r = 0; r < K / 4; ++r) {
    const X_T* at = a + (g + 8 * (r & 1)) * K + t + 8 * (r >> 1);
    ra[r] = pair(at, at + 1);
  }
  for (int r = 0; r < K / 8; ++r) rb[r] = pair(b + (t + 8 * r) * 8 + g, b + (t + 1 + 8 * r) * 8 + g);
  float rc[4], rd[4];
  for (int i = 0; i < 4; ++i) rc[i] = c[(g + 8 * (i >> 1)) * 8 + t + (i & 1)];
  emu::MMA(rd, ra, rb, rc);
  for (int i = 0; i < 4; ++i) d[(g + 8 * (i >> 1)) * 8 + t + (i & 1)] = rd[i];
}

#elif CASE == 1  // int8 matrices [M, K] x [K, 8]^T (B by columns): m16n8k32, m16n8k16, m8n8k16
extern "C" __global__ void KERNEL_NAME(const uint32_t* a, const uint32_t* b, const int* c, int* d) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4, row_words = K / 4;
  constexpr int A = M / 8 * (K / 16), B = K / 16, D = M / 4;
  uint32_t ra[A], rb[B];
  for (int r = 0; r < A; ++r) {
    const int row = M == 16 ? g + 8 * (r & 1) : g, chunk = M == 16 ? r >> 1 : r;
    ra[r] = a[row * row_words + 4 * chunk + t];
  }
  for (int r = 0; r < B; ++r) rb[r] = b[g * row_words + 4 * r + t];
  int rc[D], rd[D];
  for (int i = 0; i < D; ++i) rc[i] = c[(g + 8 * (i >> 1)) * 8 + 2 * t + (i & 1)];
  emu::MMA(rd, ra, rb, rc, emu::Mma::TYPE);
  for (int i = 0; i < D; ++i) d[(g + 8 * (i >> 1)) * 8 + 2 * t + (i & 1)] = rd[i];
}

#elif CASE == 2  // ldmatrix: out[matrix][lane] as two 16-bit values
extern "C" __global__ void KERNEL_NAME(const uint16_t* x, uint32_t* out) {
  __shared__ __align__(16) uint16_t s[COUNT * 64];
  for (int i = threadIdx.x; i < COUNT * 64; i += 32) s[i] = x[i];
  __syncthreads();
  uint32_t r[COUNT];
  emu::ldmatrix<COUNT, TRANSPOSED>(r, s + threadIdx.x % (8 * COUNT) * 8);
  for (int j = 0; j < COUNT; ++j) out[j * 32 + threadIdx.x] = r[j];
}

#elif CASE == 3  // a pipeline of cp.async: y = sum over stages; the source's odd tail is filled with zeros
extern "C" __global__ void KERNEL_NAME(const float* x, float* y, int n) {
  float* s = emu::dynamic_shared_as<float>();  // [2][4 * threads]
  const int width = 4 * blockDim.x, stages = (n + width - 1) / width, at = 4 * threadIdx.x;
  const auto start = [&](int stage) {
    const int from = stage * width + at, valid = max(0, min(4, n - from));
    if (stage < stages) emu::cp_async<16>(s + stage % 2 * width + at, x + (valid ? from : 0), 4 * valid);
    emu::cp_async_commit();
  };
  float sum = 0.0f;
  start(0);
  for (int stage = 0; stage < stages; ++stage) {
    start(stage + 1);
    emu::cp_async_wait_group<1>();
    __syncthreads();
    const int other = (threadIdx.x + 1) % blockDim.x * 4;
    for (int i = 0; i < 4; ++i) sum += s[stage % 2 * width + other + i];
    __syncthreads();
  }
  y[threadIdx.x] = sum;
}

#elif CASE == 4  // producer and consumer warps on named barriers, one of them only arriving
extern "C" __global__ void KERNEL_NAME(const int* x, int* y, int rounds) {
  __shared__ int box[32];
  const int lane = threadIdx.x % 32;
  constexpr int full = 1, empty = 2;
  if (threadIdx.x < 32) {
    for (int i = 0; i < rounds; ++i) {
      if (i) emu::barrier_sync(empty, 64);
      box[lane] = x[i * 32 + lane];
      emu::barrier_arrive(full, 64);
    }
  } else {
    int sum = 0;
    for (int i = 0; i < rounds; ++i) {
      emu::barrier_sync(full, 64);
      sum += box[31 - lane];
      if (i + 1 < rounds) emu::barrier_arrive(empty, 64);
    }
    y[lane] = sum;
  }
}

#elif CASE == 5  // a grid barrier: y = x / sum(x), each block one part
extern "C" __global__ void KERNEL_NAME(const float* x, float* partial, unsigned* arrived, float* y, int n) {
  __shared__ float sums[4];
  float sum = 0.0f;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) sum += x[i];
  for (int d = 16; d; d >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, d);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = sums[0] + sums[1] + sums[2] + sums[3];
    __threadfence();
    emu::atomic_add(arrived, 1u);
    while (emu::load(arrived) < gridDim.x) {
    }
  }
  __syncthreads();
  float total = 0.0f;
  for (unsigned b = 0; b < gridDim.x; ++b) total += partial[b];
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) y[i] = x[i] / total;
}

#elif CASE == 6  // a cluster adds up through distributed shared memory, static and dynamic
extern "C" __global__ void KERNEL_NAME(const int* x, int* y) {
  __shared__ int s[32];
  int* dynamic = emu::dynamic_shared_as<int>();
  const int i = threadIdx.x;
  s[i] = x[blockIdx.x * 32 + i];
  dynamic[i] = -s[i];
  emu::cluster_arrive();
  emu::cluster_wait();
  int sum = 0;
  for (unsigned r = 0; r < emu::cluster_size(); ++r)
    sum += 2 * emu::map_shared_rank(s, r)[31 - i] + emu::map_shared_rank(dynamic, r)[31 - i];
  y[blockIdx.x * 32 + i] = sum + 1000 * int(emu::cluster_rank());
  emu::cluster_sync();
}

#elif CASE == 7  // votes, reductions, matches, partial masks
extern "C" __global__ void KERNEL_NAME(const int* x, int* y) {
  const int lane = threadIdx.x, v = x[lane];
  int r[12] = {};
  r[0] = int(__ballot_sync(~0u, v > 0));
  r[1] = __reduce_add_sync(~0u, v);
  r[2] = __reduce_min_sync(~0u, v);
  r[3] = __reduce_max_sync(~0u, v);
  r[4] = int(__match_any_sync(~0u, v & 3));
  r[5] = __shfl_up_sync(~0u, v, 3);
  r[6] = __shfl_down_sync(~0u, v, 5, 16);
  r[7] = __shfl_sync(~0u, v, 9, 8);
  r[8] = __shfl_xor_sync(~0u, v, 31);
  if (lane < 8)
    r[9] = __reduce_add_sync(0xffu, v);
  else
    r[9] = __any_sync(0xffffff00u, v == 7) + 2 * __all_sync(0xffffff00u, v > -1000);
  r[10] = __syncthreads_count(v > 0);
  r[11] = int(__reduce_xor_sync(~0u, unsigned(v)));
  for (int i = 0; i < 12; ++i) y[i * 32 + lane] = r[i];
}

#elif CASE == 8  // conversions and 16-bit arithmetic
extern "C" __global__ void KERNEL_NAME(const float* x, __half* h, __nv_bfloat16* b, float* back, int* i, float* tiny,
                                       int n) {
  const int k = blockIdx.x * blockDim.x + threadIdx.x;
  if (k >= n) return;
  h[k] = __float2half_rn(x[k]);
  b[k] = __float2bfloat16_rn(x[k]);
  back[k] = __half2float(h[k]);
  i[k] = __float2int_rn(x[k]);
  tiny[k] = x[k] * 0.5f;
}

#elif CASE == 9  // bits and integers
extern "C" __global__ void KERNEL_NAME(const unsigned* x, unsigned* y, int n) {
  const int k = threadIdx.x;
  if (k >= n) return;
  const unsigned a = x[k], b = x[n - 1 - k];
  unsigned* r = y + k * 8;
  r[0] = __byte_perm(a, b, 0x4f21);
  r[1] = __funnelshift_l(a, b, 7);
  r[2] = unsigned(__dp4a(int(a), int(b), 5));
  r[3] = __dp4a(a, b, 5u);
  r[4] = unsigned(emu::dp4a<uint8_t, int8_t>(a, b, -3));
  r[5] = unsigned(__popc(a) + 100 * __clz(int(a)) + 10000 * __ffs(int(a)));
  r[6] = __umulhi(a, b);
  r[7] = __brev(a);
}

#elif CASE == 10  // an argmax with atomics: the larger value wins, then the smaller index
extern "C" __global__ void KERNEL_NAME(const float* x, unsigned long long* best, int n) {
  const int k = blockIdx.x * blockDim.x + threadIdx.x;
  if (k >= n) return;
  const unsigned bits = __float_as_uint(x[k]), ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  atomicMax(best, (unsigned long long)ordered << 32 | (0xffffffffu - unsigned(k)));
}
#endif
