// Causal grouped-query attention of a prompt's tokens over the KV cache, on the tensor cores, without ever holding an
// N x N matrix (FlashAttention, Dao 2022): tiles of keys pass by, and each query keeps a running maximum and sum. Keys
// and values of these tokens are in the cache already, and their queries are rotated (rope_append.cu).
//
// Partition of work
//   rows     the queries that share a key/value head, token by token, the group's heads of a token side by side. So the
//            rows of a tile need the same keys but for the last few, and few tokens fill a tile:
//
//                row    0      1      2      3      4      5          with a group of 3
//                     t0 h0  t0 h1  t0 h2  t1 h0  t1 h1  t1 h2
//
//   grid     x: sequence and key/value head, y: tile of kRows rows, the last one first: it sees the most keys, and the
//            longest blocks are to start first
//   block    walks over its keys in tiles of KEYS, first the product with the keys, then that with their values
//   warp     ROW_TILES * 16 rows, with all keys of a tile and all features: nothing of a row crosses warps. The
//            accumulators of the first product are, as they lie, A operands of the second.
//
// Shared memory holds the queries, and a ring of `slots` tiles. A step waits for its own tile and asks for the one
// slots - 1 steps on, whose place the step before has just left:
//
//     step      0    1    2    3   ..          a row of a tile: 16-byte pieces of 8 features, and one piece of nothing,
//     tile     K0   V0   K1   V1   ..          which makes their number odd: the same piece of eight rows, one load of
//     slot      0    1    2    0   ..          matrices, lies in eight different banks
//
// float16 and bfloat16 tiles are copied by cp.async. int8 ones are loaded into registers, and stored when the step is
// over, as X_T: digit times scale, rounded.
//
// Arithmetic: products of X_T, float32 sums; maxima, weights and their sums in float32; weights are rounded to X_T for
// the second product. A row's largest weight is 2^15 instead of 1, so that float16 keeps small ones; it cancels. What
// the cache holds behind the last key that a block sees is not read: zeros stand for it.
//
// Bound: the tensor cores; with ROW_TILES 1 as much the operands' way from shared memory, as each feeds two
// instructions only, with ROW_TILES 2 four. Short prompts: latency.
//
// Macros: X_T (__half, __nv_bfloat16), KV_T (X_T or signed char), HEAD_DIM (even, at most 256), ROW_TILES, KEYS (a
// multiple of 16), THREADS, KERNEL_NAME.
#include "elements.cuh"
#include "ptx.cuh"

#if !defined(X_T) || !defined(KV_T) || !defined(HEAD_DIM) || !defined(ROW_TILES) || !defined(KEYS) || \
    !defined(THREADS) || !defined(KERNEL_NAME)
#error "attention_prefill.cu needs X_T, KV_T, HEAD_DIM, ROW_TILES, KEYS, THREADS and KERNEL_NAME"
#endif

constexpr float kLargestWeight = 15.f;  // its logarithm: 2^15 is the largest power of two in float16

template <typename X_, typename KV_, int kHeadDim_, int kRowTiles_, int kKeys_, int kThreads_>
struct PrefillShape {
  using X = X_;
  using KV = KV_;
  static constexpr int kHeadDim = kHeadDim_, kRowTiles = kRowTiles_, kKeys = kKeys_, kThreads = kThreads_;
  static constexpr int kDim = (kHeadDim + 15) / 16 * 16;  // with the zeros that fill up the last instruction
  static constexpr int kWarpRows = 16 * kRowTiles, kRows = kWarpRows * (kThreads / 32);
  static constexpr int kKeyTiles = kKeys / 8, kDimTiles = kDim / 8;  // columns of 8 of the two products
  static constexpr int kPieces = kDim / 8;                           // of 16 bytes, of a row in shared memory
  static constexpr int kLoadElements = 16 / sizeof(KV);              // that a thread loads of the cache at once
  static constexpr int kCached = (kHeadDim + kLoadElements - 1) / kLoadElements * kLoadElements;  // of a row there
  static constexpr int kPitch = kPieces + 1;
  static constexpr bool kHoldQueries = kRowTiles == 1 && kDim <= 128;  // in registers, where there is room
  static_assert(kHeadDim % 2 == 0 && kHeadDim <= 256, "features are stored in pairs; more have no registers");
  static_assert(kKeys % 16 == 0, "the second product takes 16 keys at a time");
  static_assert(sizeof(X) == 2, "operands of the tensor cores have 16 bits");
};

__device__ __forceinline__ void multiply(float (&sums)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, __half) {
  mma_f16(sums, a, b0, b1);
}
__device__ __forceinline__ void multiply(float (&sums)[4], const unsigned (&a)[4], unsigned b0, unsigned b1,
                                         __nv_bfloat16) {
  mma_bf16(sums, a, b0, b1);
}

__device__ __forceinline__ unsigned pack(float low, float high, __half) {
  const __half2 v = __floats2half2_rn(low, high);
  return reinterpret_cast<const unsigned&>(v);
}
__device__ __forceinline__ unsigned pack(float low, float high, __nv_bfloat16) {
  const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const unsigned&>(v);
}

// ---- tiles ----------------------------------------------------------------------------------------------------------

// What a thread copies of a tile: load number `load` of a row's kLoads, of `row` and of every kStep-th row after it.
template <typename S, int kLoads>
struct TileThreads {
  static constexpr int kStep = S::kThreads / kLoads, kRows = (S::kKeys + kStep - 1) / kStep;
  const int row, load;
  __device__ __forceinline__ TileThreads() : row(threadIdx.x / kLoads), load(threadIdx.x % kLoads) {}
  __device__ __forceinline__ bool has(int j) const {  // row + j * kStep is one of the tile, and this thread's
    return (S::kThreads % kLoads == 0 || row < kStep) && (S::kKeys % kStep == 0 || row + j * kStep < S::kKeys);
  }
};

// Copying a tile, in two halves: what asks for the data, and what remains when the step is over. The cache has the
// first `exist` rows, the others are zeros.
template <typename S, typename KV>
struct TileCopy {
  TileThreads<S, S::kPieces> mine;

  __device__ __forceinline__ void begin(uint4* tile, const KV* rows, const float*, int exist) {
    const KV* const from = rows + mine.row * S::kCached + mine.load * 8;
    uint4* const to = tile + mine.row * S::kPitch + mine.load;
    const int left = mine.load * 8 < S::kCached ? exist - mine.row : 0;
#pragma unroll
    for (int j = 0; j < mine.kRows; ++j) {
      const int row = j * mine.kStep;
      if (mine.has(j)) copy_async16(to + row * S::kPitch, from + row * S::kCached, row < left);
    }
  }
  __device__ __forceinline__ void finish(uint4*) {}
};

// Four digits, lowest first.
template <typename X>
__device__ __forceinline__ uint2 scaled_digits(unsigned digits, float scale) {
  const float4 v = bytes_to_floats(digits) * scale;
  return make_uint2(pack(v.x, v.y, X()), pack(v.z, v.w, X()));
}

template <typename S>
struct TileCopy<S, signed char> {
  using Threads = TileThreads<S, S::kDim / 16>;
  Threads mine;
  uint4 digits[Threads::kRows];
  float scale[Threads::kRows];

  __device__ __forceinline__ void begin(uint4*, const signed char* rows, const float* scales, int exist) {
    const signed char* const from = rows + mine.row * S::kCached + mine.load * 16;
#pragma unroll
    for (int j = 0; j < mine.kRows; ++j) {
      const int row = j * mine.kStep;
      const bool valid = mine.has(j) && mine.row + row < exist;
      digits[j] = valid ? *reinterpret_cast<const uint4*>(from + row * S::kCached) : make_uint4(0u, 0u, 0u, 0u);
      scale[j] = valid ? scales[mine.row + row] : 0.f;
    }
  }
  __device__ __forceinline__ void finish(uint4* tile) {
    uint4* const to = tile + mine.row * S::kPitch + mine.load * 2;
#pragma unroll
    for (int j = 0; j < mine.kRows; ++j) {
      if (mine.has(j)) {
        const uint2 a = scaled_digits<typename S::X>(digits[j].x, scale[j]),
                    b = scaled_digits<typename S::X>(digits[j].y, scale[j]),
                    c = scaled_digits<typename S::X>(digits[j].z, scale[j]),
                    d = scaled_digits<typename S::X>(digits[j].w, scale[j]);
        to[j * mine.kStep * S::kPitch] = make_uint4(a.x, a.y, b.x, b.y);
        to[j * mine.kStep * S::kPitch + 1] = make_uint4(c.x, c.y, d.x, d.y);
      }
    }
  }
};

// The keys or the values of one head in the cache.
template <typename KV>
struct CachedRows {
  const KV* rows;       // [max_len, kCached]
  const float* scales;  // [max_len]; null unless int8
};

// The ring. A step is next(), its product with tile(), done(); keys and values alternate.
template <typename S>
struct Ring {
  using KV = typename S::KV;
  static constexpr int kTilePieces = S::kKeys * S::kPitch;
  uint4* const first;
  const CachedRows<KV> keys, values;
  const int end, slots;  // keys to be read
  int coming = 0;        // number of the tile that is asked for next
  int now, left;         // slots of this step and of the one before
  TileCopy<S, KV> copy;

  __device__ __forceinline__ Ring(uint4* first, CachedRows<KV> keys, CachedRows<KV> values, int end, int slots)
      : first(first), keys(keys), values(values), end(end), slots(slots), now(slots - 1) {
    for (left = 0; left < slots - 1; ++left) {
      begin();
      done();
    }
  }
  __device__ __forceinline__ const uint4* tile() const { return first + now * kTilePieces; }
  // Until the next step's tile, and what was copied before it, is there for everyone.
  __device__ __forceinline__ void wait() const {
    if (slots == 2) {
      wait_for_copies<0>();
    } else if (slots == 3) {
      wait_for_copies<1>();
    } else {
      wait_for_copies<2>();
    }
    __syncthreads();
  }
  __device__ __forceinline__ void next() {
    wait();
    left = now;
    begin();
    now = now + 1 == slots ? 0 : now + 1;
  }
  __device__ __forceinline__ void done() {
    if ((coming - 1) / 2 * S::kKeys < end) copy.finish(first + left * kTilePieces);
  }

 private:
  __device__ __forceinline__ void begin() {
    const int key0 = coming / 2 * S::kKeys;
    if (key0 < end) {
      const bool is_values = coming % 2;
      copy.begin(first + left * kTilePieces, (is_values ? values.rows : keys.rows) + (long long)key0 * S::kCached,
                 (is_values ? values.scales : keys.scales) + key0, end - key0);
    }
    commit_copies();
    ++coming;
  }
};

// The block's queries to shared memory; rows of no token and features beyond the head's are zeros.
template <typename S>
__device__ __forceinline__ void copy_queries(uint4* to, const typename S::X* q, int q_pitch, int row0, int rows,
                                             int group) {
  for (int i = threadIdx.x; i < S::kRows * S::kPieces; i += S::kThreads) {
    const int row = i / S::kPieces, piece = i % S::kPieces, n = row0 + row;
    const typename S::X* const from = q + (long long)(n / group) * q_pitch + n % group * S::kHeadDim + piece * 8;
    if constexpr (S::kHeadDim % 8 == 0) {
      copy_async16(to + row * S::kPitch + piece, from, n < rows && piece * 8 < S::kHeadDim);
    } else {  // heads begin at multiples of 4 bytes only
      unsigned pairs[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const bool valid = n < rows && piece * 8 + 2 * j < S::kHeadDim;
        pairs[j] = valid ? *reinterpret_cast<const unsigned*>(from + 2 * j) : 0u;
      }
      to[row * S::kPitch + piece] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    }
  }
}

// ---- products -------------------------------------------------------------------------------------------------------

// A operand of 16 rows x 16 features from feature 16 k on. `rows` begins with a multiple of 8 rows.
template <typename S>
__device__ __forceinline__ void load_queries(unsigned (&a)[4], const uint4* rows, int row0, int k) {
  const int lane = threadIdx.x % 32;
  load_matrices(a, rows + (row0 + lane % 16) * S::kPitch + 2 * k + lane / 16);
}

// scores = queries keys^T, for this warp's rows.
template <typename S>
__device__ __forceinline__ void multiply_keys(float (&scores)[S::kRowTiles][S::kKeyTiles][4], const uint4* keys,
                                              const uint4* queries,
                                              const unsigned (&held)[S::kHoldQueries ? S::kDim / 16 : 1][4]) {
  const int lane = threadIdx.x % 32, row0 = threadIdx.x / 32 * S::kWarpRows;
  constexpr int kUnroll = S::kHoldQueries ? S::kDim / 16 : 2;
#pragma unroll kUnroll
  for (int k = 0; k < S::kDim / 16; ++k) {
    unsigned a[S::kRowTiles][4];
#pragma unroll
    for (int r = 0; r < S::kRowTiles; ++r) {
      if constexpr (S::kHoldQueries) {
#pragma unroll
        for (int i = 0; i < 4; ++i) a[r][i] = held[k][i];
      } else {
        load_queries<S>(a[r], queries, row0 + 16 * r, k);
      }
    }
#pragma unroll
    for (int c = 0; c < S::kKeyTiles; c += 2) {  // matrices: keys 0-7 and 8-15, of each features 0-7 and 8-15
      unsigned b[4];
      load_matrices(b, keys + (8 * c + lane / 16 * 8 + lane % 8) * S::kPitch + 2 * k + lane / 8 % 2);
#pragma unroll
      for (int r = 0; r < S::kRowTiles; ++r) {
        multiply(scores[r][c], a[r], b[0], b[1], typename S::X());
        multiply(scores[r][c + 1], a[r], b[2], b[3], typename S::X());
      }
    }
  }
}

// output += weights values.
template <typename S>
__device__ __forceinline__ void multiply_values(float (&output)[S::kRowTiles][S::kDimTiles][4],
                                                const float (&weights)[S::kRowTiles][S::kKeyTiles][4],
                                                const uint4* values) {
  using X = typename S::X;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < S::kKeys / 16; ++k) {
    unsigned a[S::kRowTiles][4];
#pragma unroll
    for (int r = 0; r < S::kRowTiles; ++r) {
      const float (&low)[4] = weights[r][2 * k], (&high)[4] = weights[r][2 * k + 1];
      a[r][0] = pack(low[0], low[1], X());
      a[r][1] = pack(low[2], low[3], X());
      a[r][2] = pack(high[0], high[1], X());
      a[r][3] = pack(high[2], high[3], X());
    }
#pragma unroll
    for (int c = 0; c < S::kDimTiles; c += 2) {  // matrices: features 0-7 and 8-15, of each keys 0-7 and 8-15
      unsigned b[4];
      load_matrices_transposed(b, values + (16 * k + lane % 16) * S::kPitch + c + lane / 16);
#pragma unroll
      for (int r = 0; r < S::kRowTiles; ++r) {
        multiply(output[r][c], a[r], b[0], b[1], X());
        multiply(output[r][c + 1], a[r], b[2], b[3], X());
      }
    }
  }
}

// ---- softmax --------------------------------------------------------------------------------------------------------

// Of the rows that a lane has a share of: two a row tile, g and g + 8. `sum` is of this lane's columns until the end.
template <typename S>
struct Softmax {
  float top[S::kRowTiles][2], sum[S::kRowTiles][2];  // the largest score; of the weights

  // The weights of this tile in place of its scores; what was summed before shrinks as the maximum grows, which is not
  // -inf after the first tile: every row sees key 0. Scores are scaled after the maximum is subtracted, not in one fma
  // with it, so that the largest weight is 2^15 exactly, however large the scores are.
  __device__ __forceinline__ void weigh(float (&scores)[S::kRowTiles][S::kKeyTiles][4],
                                        float (&output)[S::kRowTiles][S::kDimTiles][4], float log2_scale) {
#pragma unroll
    for (int r = 0; r < S::kRowTiles; ++r) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float largest = top[r][h];
#pragma unroll
        for (int c = 0; c < S::kKeyTiles; ++c) {
          largest = fmaxf(largest, fmaxf(scores[r][c][2 * h], scores[r][c][2 * h + 1]));
        }
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
        const float shrink = exp2f((top[r][h] - largest) * log2_scale);
        top[r][h] = largest;
        sum[r][h] *= shrink;
#pragma unroll
        for (int c = 0; c < S::kDimTiles; ++c) {
          output[r][c][2 * h] *= shrink;
          output[r][c][2 * h + 1] *= shrink;
        }
#pragma unroll
        for (int c = 0; c < S::kKeyTiles; ++c) {
#pragma unroll
          for (int i = 2 * h; i < 2 * h + 2; ++i) {
            const float weight = exp2f(fmaf(scores[r][c][i] - largest, log2_scale, kLargestWeight));
            scores[r][c][i] = weight;
            sum[r][h] += weight;
          }
        }
      }
    }
  }
};

// Row n sees keys up to that of its own token, n / group. `own`: the first of the lane's rows; `key`: the tile's first
// key, counted from the call's first token on.
template <typename S>
__device__ __forceinline__ void hide_later_keys(float (&scores)[S::kRowTiles][S::kKeyTiles][4], int own, int key,
                                                int group) {
  const int column = threadIdx.x % 4 * 2;
#pragma unroll
  for (int c = 0; c < S::kKeyTiles; ++c) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int first_row = (key + column + 8 * c + i % 2) * group;  // that sees this key
#pragma unroll
      for (int r = 0; r < S::kRowTiles; ++r) {
        if (own + 16 * r + i / 2 * 8 < first_row) scores[r][c][i] = -infinity();
      }
    }
  }
}

template <typename S>
__device__ __forceinline__ void attend(const typename S::X* q, int q_pitch, CachedRows<typename S::KV> keys,
                                       CachedRows<typename S::KV> values, int length, int rows, int group,
                                       int out_pitch, float log2_scale, typename S::X* out, int slots) {
  uint4* const queries = dynamic_shared<uint4>();
  const int row0 = (gridDim.y - 1 - blockIdx.y) * S::kRows;
  const int own = row0 + threadIdx.x / 32 * S::kWarpRows + threadIdx.x % 32 / 4;  // first of the lane's rows
  const int end = length + (min(row0 + S::kRows, rows) - 1) / group + 1;
  const int seen_by_all = length + row0 / group + 1;

  copy_queries<S>(queries, q, q_pitch, row0, rows, group);
  Ring<S> ring(queries + S::kRows * S::kPitch, keys, values, end,
               slots);  // its first tile is of one group with the queries

  Softmax<S> softmax;
  float output[S::kRowTiles][S::kDimTiles][4] = {};
#pragma unroll
  for (int r = 0; r < S::kRowTiles; ++r) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      softmax.top[r][h] = -infinity();
      softmax.sum[r][h] = 0.f;
    }
  }
  unsigned held[S::kHoldQueries ? S::kDim / 16 : 1][4];
  if constexpr (S::kHoldQueries) {
    ring.wait();
#pragma unroll
    for (int k = 0; k < S::kDim / 16; ++k) load_queries<S>(held[k], queries, threadIdx.x / 32 * S::kWarpRows, k);
  }

  for (int key0 = 0; key0 < end; key0 += S::kKeys) {
    float scores[S::kRowTiles][S::kKeyTiles][4] = {};
    ring.next();
    multiply_keys<S>(scores, ring.tile(), queries, held);
    ring.done();
    if (key0 + S::kKeys > seen_by_all) hide_later_keys<S>(scores, own, key0 - length, group);
    softmax.weigh(scores, output, log2_scale);
    ring.next();
    multiply_values<S>(output, scores, ring.tile());
    ring.done();
  }

#pragma unroll
  for (int r = 0; r < S::kRowTiles; ++r) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float sum = softmax.sum[r][h];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      const float inverse = 1.f / sum;
      const int n = own + 16 * r + 8 * h;
      typename S::X* const to = out + (long long)(n / group) * out_pitch + n % group * S::kHeadDim;
#pragma unroll
      for (int c = 0; c < S::kDimTiles; ++c) {
        const int d = 8 * c + threadIdx.x % 4 * 2;
        if (n < rows && d < S::kHeadDim) {
          *reinterpret_cast<unsigned*>(to + d) =
              pack(output[r][c][2 * h] * inverse, output[r][c][2 * h + 1] * inverse, typename S::X());
        }
      }
    }
  }
}

// Two blocks a multiprocessor: with more registers than that leaves, nothing else would hide a block's barriers.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    KERNEL_NAME(const X_T* q,               // [B * S, q_pitch]: heads * HEAD_DIM rotated queries. 16-byte aligned, with
                                            // q_pitch a multiple of 8, if HEAD_DIM is one; else 4 bytes, even
                int q_pitch,                //
                const KV_T* keys,           // [B, kv_heads, max_len, Dp], this layer's; 16-byte aligned rows, zero from
                                            // HEAD_DIM on
                const KV_T* values,         // the same
                const float* key_scales,    // [B, kv_heads, max_len] of an int8 cache; else null
                const float* value_scales,  // the same
                const int* length,          // [B]: positions in the cache before this call's tokens
                int S,                      // tokens a sequence in this call: s sees keys 0 .. length[b] + s
                int heads, int kv_heads, int max_len,
                float softmax_scale,  // of the scores; positive
                X_T* out,             // [B * S, heads * HEAD_DIM]
                int slots) {          // tiles that shared memory holds: 2 to 4
  wait_for_previous_kernels();
  let_next_kernel_start();
  using Shape = PrefillShape<X_T, KV_T, HEAD_DIM, ROW_TILES, KEYS, THREADS>;
  const int b = blockIdx.x / kv_heads, kv = blockIdx.x % kv_heads, group = heads / kv_heads;
  const long long token0 = (long long)b * S, cached = (long long)blockIdx.x * max_len;
  const int first_head = kv * group * HEAD_DIM;
  attend<Shape>(q + token0 * q_pitch + first_head, q_pitch, {keys + cached * Shape::kCached, key_scales + cached},
                {values + cached * Shape::kCached, value_scales + cached}, length[b], S * group, group,
                heads * HEAD_DIM, softmax_scale * 1.44269504f, out + token0 * heads * HEAD_DIM + first_head, slots);
}
