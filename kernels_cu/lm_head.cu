// The output head: logits[n, v] = scale[v] * sum_h values[v, h] * rmsnorm(x)[n, h] in float32, and of each token the largest.
//
// best[n] = the largest logit and its index as one 64-bit key that atomicMax can order: the float's bits made monotone in the
// upper half, the inverted index in the lower, so that among equals the lowest index wins (next_token.cu reads and clears it).
//
// Partition of work
//   grid    x: a persistent row of blocks over the rows of the head, y: TOKENS tokens
//   block   normalises its tokens for itself, as the products do, into shared memory
//   LANES lanes to a row, a 16-byte vector to a lane, AHEAD of them in flight: each register is loaded again once it has
//           been used, on into the next row. LANES * 16 bytes are whole cache lines, which is what the loads in flight count
//           in; AHEAD divides a row's vectors where it can.
//
// The head does not depend on earlier kernels: its first loads are issued before the wait for them.
//
// Arithmetic. Float rows: float32. int8 rows: exact integers; the token is written in four 8-bit digits of a fixed-point number
// relative to its largest element (an error of at most 2^-29 of that; fragments.cuh), so that one dp4a takes four weights
// as they are, where floats need three instructions to make each weight one: 75 instead of 105 us for 128256 x 2560 on an H200.
//
// A token lies in shared memory as 16-byte pieces, piece p (four floats, or sixteen digits) of vector c at index p * pitch + c,
// so that the lanes' reads (consecutive c, one p) meet no bank conflict.
//
// Bound: reading the head once for each TOKENS tokens.
//
// Macros: W_T (signed char, __half, __nv_bfloat16, float), X_T (float, __half, __nv_bfloat16), TOKENS, LANES, AHEAD, THREADS,
// KERNEL_NAME.
#include "fragments.cuh"
#include "token_scale.cuh"

#if !defined(W_T) || !defined(X_T) || !defined(TOKENS) || !defined(LANES) || !defined(AHEAD) || !defined(THREADS) || \
    !defined(KERNEL_NAME)
#error "lm_head.cu needs W_T, X_T, TOKENS, LANES, AHEAD, THREADS and KERNEL_NAME"
#endif

__device__ __forceinline__ unsigned long long logit_key(float logit, unsigned index) {
  const unsigned bits = unsigned(__float_as_int(logit + 0.f));  // -0 and 0 are equals
  const unsigned ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return (unsigned long long)ordered << 32 | ~index;
}

__device__ __forceinline__ unsigned word_of(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// How a row's vectors of 16 bytes meet a token. Float rows: kPieces times four elements.
template <typename W>
struct Row {
  static constexpr int kPieces = 4 / sizeof(W), kElements = 4 * kPieces;
  float sum = 0.f;

  static __device__ __forceinline__ float4 piece(const uint4& v, int p) {
    if constexpr (sizeof(W) == sizeof(float)) {
      return unpack(Quad<W>{v});
    } else {
      return unpack(Quad<W>{make_uint2(word_of(v, 2 * p), word_of(v, 2 * p + 1))});
    }
  }
  __device__ __forceinline__ void add(const uint4& weights, const uint4* token, int pitch) {
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      const float4 w = piece(weights, p), v = unpack(Quad<float>{token[p * pitch]});
      sum = fmaf(w.w, v.w, fmaf(w.z, v.z, fmaf(w.y, v.y, fmaf(w.x, v.x, sum))));
    }
  }
  __device__ __forceinline__ float total() const { return sum; }
  // Four elements k = 4 i .. of the token, (x g pre), go to its pieces; what it has to be multiplied with later comes back.
  static __device__ __forceinline__ void stage(uint4* token, int pitch, int i, float4 v, const TokenScale& s) {
    v = v * (s.dequant * s.factor);
    *reinterpret_cast<float4*>(token + i % kPieces * pitch + i / kPieces) = v;
  }
  static __device__ __forceinline__ float unit(const TokenScale&) { return 1.f; }
};
template <>
struct Row<signed char> {
  static constexpr int kPieces = 4, kElements = 16;  // a piece is a digit of sixteen elements
  int sums[4] = {};

  __device__ __forceinline__ void add(const uint4& weights, const uint4* token, int pitch) {
#pragma unroll
    for (int d = 0; d < 4; ++d) {
      const uint4 digits = token[d * pitch];
#pragma unroll
      for (int w = 0; w < 4; ++w) sums[d] = __dp4a(int(word_of(weights, w)), int(word_of(digits, w)), sums[d]);
    }
  }
  __device__ __forceinline__ float total() const {
    float total = 0.f;
#pragma unroll
    for (int d = 3; d >= 0; --d) total = fmaf(float(sums[d]), digit_weight(d), total);
    return total;
  }
  static __device__ __forceinline__ void stage(uint4* token, int pitch, int i, float4 v, const TokenScale& s) {
    unsigned digits[4];
    digits4(digits, v * s.factor);
#pragma unroll
    for (int d = 0; d < 4; ++d) reinterpret_cast<unsigned*>(token + d * pitch + i / 4)[i % 4] = digits[d];
  }
  static __device__ __forceinline__ float unit(const TokenScale& s) { return s.dequant * kDigitUnit; }
};

template <typename W, typename X, int kTokens, int kLanes, int kAhead, int kThreads>
__device__ __forceinline__ void lm_head(const X* x, long long x_pitch, const float* gamma, const uint4* values,
                                        const float* scale, float* logits, unsigned long long* best, int V, int H,
                                        int N, float eps) {
  constexpr int kPieces = Row<W>::kPieces, kRows = kThreads / kLanes;  // rows of a block at a time
  uint4* const tokens = dynamic_shared<uint4>();
  __shared__ unsigned long long warp_best[kTokens][kThreads / 32];
  const int vectors = (H + Row<W>::kElements - 1) / Row<W>::kElements, turns = (vectors + kLanes - 1) / kLanes;
  const int pitch = turns * kLanes, lane = threadIdx.x % kLanes, n0 = blockIdx.y * kTokens;
  const int rows_a_step = gridDim.x * kRows;
  int row = blockIdx.x * kRows + threadIdx.x / kLanes;

  uint4 held[kAhead];
  auto load = [&](int a, int at_row, int turn) {
    const int c = turn * kLanes + lane;
    const bool exists = at_row < V && c < vectors;
    held[a] = exists ? load_once(values + (long long)at_row * vectors + c) : make_uint4(0u, 0u, 0u, 0u);
  };
#pragma unroll
  for (int a = 0; a < kAhead; ++a) load(a, row, a);
  const TokenLength length(H);
  wait_for_previous_kernels();
  let_next_kernel_start();

  const Gamma<X> norm(gamma, true, H);
  float units[kTokens];
#pragma unroll 1
  for (int t = 0; t < kTokens; ++t) {
    const X* token = n0 + t < N ? x + (n0 + t) * x_pitch : nullptr;
    const bool aligned = H % 4 == 0 && rows_aligned(token, 4);
    Held<X, 0> none;
    const TokenScale s = token_scale<true, false, 1, kThreads>(none, token, norm, length, eps, aligned);
#pragma unroll
    for (int u = 0; u < kTokens; ++u) {
      if (u == t) units[u] = Row<W>::unit(s);
    }
    for (int i = threadIdx.x; i < pitch * Row<W>::kElements / 4; i += kThreads) {
      float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
      if (token != nullptr && 4 * i < H) {
        v = (load4_or_zero(token, 4 * i, H, aligned) * s.pre) * norm.at(4 * i, H);
      }
      Row<W>::stage(tokens + t * kPieces * pitch, pitch, i, v, s);
    }
    __syncthreads();  // the reduction's shared memory is free again
  }

  unsigned long long key[kTokens] = {};
#pragma unroll 1
  for (int first = blockIdx.x * kRows; first < V; first += rows_a_step, row += rows_a_step) {
    Row<W> sums[kTokens];
#pragma unroll 1
    for (int turn = 0; turn < turns; turn += kAhead) {
      const bool ends = turn + kAhead >= turns;
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        if (turn + a < turns) {
#pragma unroll
          for (int t = 0; t < kTokens; ++t) {
            sums[t].add(held[a], tokens + t * kPieces * pitch + (turn + a) * kLanes + lane, pitch);
          }
        }
        load(a, ends ? row + rows_a_step : row, ends ? a : turn + kAhead + a);
      }
    }
    const float row_scale = scale == nullptr || row >= V ? 1.f : scale[row];
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      float logit = sums[t].total();
#pragma unroll
      for (int d = kLanes / 2; d; d /= 2) logit += __shfl_xor_sync(0xffffffffu, logit, d);
      logit = logit * units[t] * row_scale;
      if (row < V && n0 + t < N) {
        if (lane == 0) logits[(long long)(n0 + t) * V + row] = logit;
        key[t] = max(key[t], logit_key(logit, row));
      }
    }
  }
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
#pragma unroll
    for (int d = 16; d >= kLanes; d /= 2) key[t] = max(key[t], __shfl_xor_sync(0xffffffffu, key[t], d));
    if (threadIdx.x % 32 == 0) warp_best[t][threadIdx.x / 32] = key[t];
  }
  __syncthreads();
  if (best != nullptr && threadIdx.x < kTokens && n0 + threadIdx.x < N) {
    unsigned long long largest = 0ull;
#pragma unroll
    for (int w = 0; w < kThreads / 32; ++w) largest = max(largest, warp_best[threadIdx.x][w]);
    atomicMax(best + n0 + threadIdx.x, largest);
  }
}

// So many blocks a multiprocessor, and registers accordingly: left alone, ptxas aims lower and spills.
extern "C" __global__ void __launch_bounds__(THREADS, TOKENS > 1 ? 1 : 2)
    KERNEL_NAME(const X_T* x,              // [N, x_pitch], H of each row used
                long long x_pitch,         // elements: the last token of each sequence of several
                const float* gamma,        // [H]: the final norm
                const uint4* values,       // W_T [V, vectors * 16 bytes], zero beyond H
                const float* scale,        // [V], or null
                float* logits,             // [N, V]
                unsigned long long* best,  // [N], zero before the launch; null: not wanted
                int V, int H, int N, float eps) {
  lm_head<W_T, X_T, TOKENS, LANES, AHEAD, THREADS>(x, x_pitch, gamma, values, scale, logits, best, V, H, N, eps);
}
