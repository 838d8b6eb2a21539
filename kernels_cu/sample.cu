// Ends a step: token[b] = the next token of sequence b, drawn from its logits after repetition penalty, temperature,
// top_k, top_p and min_p, in this order. edgellm_cupy/reference/sampling.py is the same in a few lines of NumPy, token
// for token.
//
// Meaning: a token's distance is how many octaves (factors of two) its probability lies below the largest one, in fixed
// point; its mass is 2^-distance as an integer. Both are defined operation by operation, so that every sum is the same
// in any order and on any machine. Sorted by (distance, index), each filter keeps a prefix of the tokens, and a random
// number below the prefix's mass falls on one of them. So all that is ever asked is: at which sorted token does the
// running count, or the running mass, pass a target?
//
// How it is answered without sorting V tokens, by one block a sequence:
//   1. The largest logit; on the way the largest of each thread's tokens. At least half the threads' number of tokens
//      lie at or above the median of those, and about 0.7 times as many as there are threads when the large ones lie
//      anywhere.
//   2. Those are appended to a list in shared memory, and the masses of all tokens are added up (not with top_k alone,
//      which needs no total). The list is sorted and summed, one token a thread: a target within it costs one vote.
//      That ends it for any top_k up to half the threads, and wherever a few hundred tokens carry the mass: two passes
//      over the logits.
//   3. Else (flat distributions, a large top_k): histograms of counts and masses, a bin a thread, of ever narrower
//      ranges of (distance, index) around the target, until the range fits the list.
//
// Bound: the instructions of the passes on one multiprocessor, four a cycle: for 32 logits about 8 in the first pass,
// 12 in the second and 30 more for their masses (read off the machine code, not measured), beside 128 bytes from L2. A
// histogram costs the conflicts of its shared atomics in addition. The first one's range is that of the logits present,
// so that flat distributions spread over the bins too; logits that lie in one dense cluster far below the largest meet
// in one bin, once, and are apart in the next.
//
// Macros: THREADS (a power of two), KERNEL_NAME.
#include "elements.cuh"
#include "ptx.cuh"

#if !defined(THREADS) || !defined(KERNEL_NAME)
#error "sample.cu needs THREADS and KERNEL_NAME"
#endif

using Wide = unsigned long long;

constexpr int log2_of(int n) {
  return n > 1 ? 1 + log2_of(n / 2) : 0;
}
constexpr int kBinBits = log2_of(THREADS);
static_assert(THREADS == 1 << kBinBits && THREADS >= 32,
              "a sorting network of one token a thread needs a power of two");

// 2^-26 octaves are the unit of distances. Beyond 40 octaves the mass is zero: such tokens are as good as not there.
constexpr int kFractionBits = 26, kMassBits = 40;
constexpr unsigned kFarthest = unsigned(kMassBits) << kFractionBits;
constexpr float kLargest = 3.402823466e38f;

// floor(2^40 * 2^-distance), within 1e-7: a polynomial for 2^-fraction in units of 2^-31, exact at both ends, so that
// the mass never grows with the distance.
__device__ __forceinline__ Wide mass_of(unsigned distance) {
  const unsigned f = distance << (32 - kFractionBits);
  unsigned p = 2017903u;
  p = 19743523u - __umulhi(p, f);
  p = 118729907u - __umulhi(p, f);
  p = 515776670u - __umulhi(p, f);
  p = 1488514207u - __umulhi(p, f);
  p = 2147483648u - __umulhi(p, f);
  return (Wide(p) << (kMassBits - 31)) >> (distance >> kFractionBits);
}

// One sequence's logits, as they are after the penalty.
struct Row {
  const float* logits;        // [V]
  const unsigned char* seen;  // [V]
  float penalty, inverse;     // and 1 / penalty
  int V;
  bool aligned;  // four elements of either can be loaded at once

  __device__ __forceinline__ float penalised(float logit) const {
    return __fmul_rn(logit, logit > 0.f ? inverse : penalty);
  }
  __device__ __forceinline__ unsigned seen4(int v) const {
    if (aligned) return *reinterpret_cast<const unsigned*>(seen + v);
    unsigned marks = 0u;
#pragma unroll 1  // rare: keep it small
    for (int i = 0; i < 4 && v + i < V; ++i) marks |= unsigned(seen[v + i]) << 8 * i;
    return marks;
  }
  // Calls f(index, logit) for this thread's tokens, and perhaps for NaN beyond the end.
  template <int kUnroll = 1, typename F>
  __device__ __forceinline__ void each(F f) const {
#pragma unroll kUnroll
    for (int v = 4 * threadIdx.x; v < V; v += 4 * THREADS) {
      float4 l = load4_or_zero(logits, v, V, aligned);
      if (penalty != 1.f) {
        const unsigned marks = seen4(v);
        if (marks) {
          if (marks & 0x000000ffu) l.x = penalised(l.x);
          if (marks & 0x0000ff00u) l.y = penalised(l.y);
          if (marks & 0x00ff0000u) l.z = penalised(l.z);
          if (marks & 0xff000000u) l.w = penalised(l.w);
        }
      }
      if (!aligned) {
        const float nan = __int_as_float(0x7fffffff);
        if (v + 1 >= V) l.y = nan;
        if (v + 2 >= V) l.z = nan;
        if (v + 3 >= V) l.w = nan;
      }
      f(unsigned(v), l.x);
      f(unsigned(v) + 1u, l.y);
      f(unsigned(v) + 2u, l.z);
      f(unsigned(v) + 3u, l.w);
    }
  }
};

// From logits to distances, and to the integer (distance, index) by which tokens are sorted.
struct Scale {
  float top, octaves;  // the largest logit; units of distance that a difference of one makes
  int index_bits;

  __device__ __forceinline__ unsigned distance(float logit) const {
    // fminf takes NaN for infinity: as far as can be. Two infinite logits are equals.
    const float below = logit == top ? 0.f : fminf(__fsub_rn(top, logit), infinity());
    return __float2uint_rn(__fmul_rn(below, octaves));  // saturates
  }
  __device__ __forceinline__ Wide key(unsigned distance, unsigned index) const {
    return Wide(distance) << index_bits | index;
  }
  __device__ __forceinline__ unsigned distance_of(Wide key) const { return unsigned(key >> index_bits); }
  __device__ __forceinline__ unsigned index_of(Wide key) const { return unsigned(key) & ((1u << index_bits) - 1u); }
  // The last key that a token at this distance can have.
  __device__ __forceinline__ Wide last_key(unsigned distance) const {
    return ((Wide(distance) + 1ull) << index_bits) - 1ull;
  }
};

// How many tokens, and their masses' sum.
struct Amount {
  unsigned count;
  Wide mass;
};
enum class By { count, mass };

__device__ __forceinline__ Amount operator+(Amount a, Amount b) {
  return {a.count + b.count, a.mass + b.mass};
}
__device__ __forceinline__ Wide get(Amount a, By by) {
  return by == By::count ? a.count : a.mass;
}

__device__ __forceinline__ Wide broadcast(Wide value, int from) {
  __shared__ Wide cell;
  __syncthreads();  // the last one was read
  if (threadIdx.x == from) cell = value;
  __syncthreads();
  return cell;
}
__device__ __forceinline__ Amount broadcast(Amount a, int from) {
  return {unsigned(broadcast(Wide(a.count), from)), broadcast(a.mass, from)};
}

// The sum over this thread and all before it.
__device__ __forceinline__ Amount running_sum(Amount a) {
  __shared__ Amount warps[THREADS / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const Amount before = {__shfl_up_sync(0xffffffffu, a.count, d), __shfl_up_sync(0xffffffffu, a.mass, d)};
    if (lane >= d) a = a + before;
  }
  __syncthreads();
  if (lane == 31) warps[warp] = a;
  __syncthreads();
  for (int w = 0; w < warp; ++w) a = a + warps[w];
  return a;
}
__device__ __forceinline__ Wide block_sum(Wide mass) {
  return broadcast(running_sum({0u, mass}).mass, THREADS - 1);
}

// The smallest and the largest of all threads' values, in every thread.
__device__ __forceinline__ float2 block_range(float low, float high) {
  __shared__ float2 warps[THREADS / 32];
#pragma unroll
  for (int d = 16; d; d /= 2) {
    low = fminf(low, __shfl_xor_sync(0xffffffffu, low, d));
    high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, d));
  }
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = make_float2(low, high);
  __syncthreads();
  for (int w = 0; w < THREADS / 32; ++w) {
    low = fminf(low, warps[w].x);
    high = fmaxf(high, warps[w].y);
  }
  return make_float2(low, high);
}

// The median of all threads' values, bit by bit: the largest number below which fewer than half of them lie.
__device__ __forceinline__ unsigned block_median(unsigned value) {
  unsigned median = 0u;
  for (unsigned bit = 0x80000000u; bit; bit >>= 1) {
    if (__syncthreads_count(value < (median | bit)) < THREADS / 2) median |= bit;
  }
  return median;
}

// The next token of one sequence. Its members that differ from thread to thread are called `my`.
struct Sampler {
  Row row;
  Scale scale;
  unsigned span;  // the largest distance of a token that has any mass

  Wide my_key;           // the list, sorted: of this thread's token; those that have none come last
  Amount list_before;    // all tokens before the list's first
  Amount my_through;     // all tokens up to and including this thread's of the list
  bool list_is_all;      // no other token has any mass
  bool histogram_ready;  // of the whole range

  // The list becomes the tokens of keys low .. high, of which `before` lie before them; empty when they do not fit.
  // Adds the masses of all tokens to *total and those of at least `least` to *likely, where asked for.
  __device__ __forceinline__ void gather(Wide low, Wide high, Amount before, bool summing = false, Wide least = 0ull,
                                         Wide* total = nullptr, Wide* likely = nullptr) {
    __shared__ Wide list[THREADS];
    __shared__ int length;
    const unsigned nearest = scale.distance_of(low), farthest = scale.distance_of(high);
    __syncthreads();
    if (threadIdx.x == 0) length = 0;
    __syncthreads();
    row.each([&](unsigned index, float logit) {
      const unsigned distance = scale.distance(logit);
      if (distance - nearest <= farthest - nearest) {  // rules out nearly all
        const Wide key = scale.key(distance, index);
        if (low <= key && key <= high) {
          const int slot = atomicAdd(&length, 1);
          if (slot < THREADS) list[slot] = key;
        }
      }
      if (summing) {
        const Wide mass = mass_of(distance);
        *total += mass;
        if (mass >= least) *likely += mass;
      }
    });
    __syncthreads();
    const int n = length <= THREADS ? length : 0;
    my_key = threadIdx.x < n ? list[threadIdx.x] : ~0ull;
    // A bitonic sorting network (Batcher 1968) over the first power of two that holds them.
    for (int size = 2; size < 2 * n; size *= 2) {
      for (int stride = size / 2; stride; stride /= 2) {
        Wide other;
        if (stride < 32) {
          other = __shfl_xor_sync(0xffffffffu, my_key, stride);
        } else {
          __syncthreads();
          list[threadIdx.x] = my_key;
          __syncthreads();
          other = list[threadIdx.x ^ stride];
        }
        const bool ascending = !(threadIdx.x & size), first = !(threadIdx.x & stride);
        my_key = ascending == first ? min(my_key, other) : max(my_key, other);
      }
    }
    Amount mine = {0u, 0ull};
    if (threadIdx.x < n) mine = {1u, mass_of(scale.distance_of(my_key))};
    list_before = before;
    my_through = before + running_sum(mine);
    list_is_all = n != 0 && low == 0ull && high >= scale.last_key(span);
  }

  // Of the bins of 2^shift keys from `low` to `high`, the tokens up to and including those of this thread's bin.
  __device__ __forceinline__ Amount histogram(Wide low, Wide high, int shift) const {
    // Shared memory adds 32 bits at once, not 64: a carry is seen in the old value, and the order does not matter.
    __shared__ unsigned counts[THREADS], low_words[THREADS], high_words[THREADS];
    const int t = threadIdx.x;
    __syncthreads();
    counts[t] = low_words[t] = high_words[t] = 0u;
    __syncthreads();
    row.each([&](unsigned index, float logit) {
      const unsigned distance = scale.distance(logit);
      const Wide key = scale.key(distance, index);
      if (key < low || key > high) return;
      const unsigned bin = unsigned((key - low) >> shift);
      const Wide mass = mass_of(distance);
      const unsigned old = atomicAdd(low_words + bin, unsigned(mass));
      const unsigned carried = unsigned(mass >> 32) + (old > ~unsigned(mass));
      if (carried) atomicAdd(high_words + bin, carried);
      atomicAdd(counts + bin, 1u);
    });
    __syncthreads();
    return running_sum({counts[t], Wide(high_words[t]) << 32 | low_words[t]});
  }

  // Makes the list hold the token at which the running count or mass passes `target`. Where none does, it returns false
  // and *total is all mass.
  __device__ __forceinline__ bool narrow(By by, Wide target, Wide* total) {
    Wide low = 0ull, high = scale.last_key(span);
    int shift = 64 - __clzll((long long)high) - kBinBits;  // above 0: a smaller range would fit the list
    __shared__ Amount whole[THREADS];  // of the whole range, kept for the next target; each thread reads its own
    Amount before = {0u, 0ull};
    for (bool first = true;; first = false) {
      Amount through;
      if (first && histogram_ready) {
        through = whole[threadIdx.x];
      } else {
        through = before + histogram(low, high, shift);
        if (first) whole[threadIdx.x] = through;
        histogram_ready = true;
      }
      const int bin = __syncthreads_count(get(through, by) <= target);
      if (bin == THREADS) {
        *total = broadcast(through.mass, THREADS - 1);
        return false;
      }
      const unsigned count_after = broadcast(through, bin).count;
      if (bin) before = broadcast(through, bin - 1);
      low += Wide(bin) << shift;
      high = min(high, low + (1ull << shift) - 1ull);
      if (count_after - before.count <= THREADS) break;
      shift -= kBinBits;
    }
    gather(low, high, before);
    return true;
  }

  // The sorted token at which the running count or mass passes `target`: its index, and the mass up to and including
  // it. Where none does: all mass.
  struct Found {
    unsigned index;
    Wide mass;
  };
  __device__ __forceinline__ Found find(By by, Wide target) {
    for (;;) {
      const int slot = __syncthreads_count(get(my_through, by) <= target);
      if (slot < THREADS && get(list_before, by) <= target) {
        return {scale.index_of(broadcast(my_key, slot)), broadcast(my_through.mass, slot)};
      }
      if (list_is_all) return {0u, broadcast(my_through.mass, THREADS - 1)};
      Wide total;
      if (!narrow(by, target, &total)) return {0u, total};
    }
  }
};

// 64 random bits of a counter and a key: Philox4x32-10 (Salmon et al. 2011, doi:10.1145/2063384.2063405).
__device__ __forceinline__ Wide random_bits(uint4 c, unsigned key0, unsigned key1) {
  for (int i = 0; i < 10; ++i) {
    const unsigned low0 = 0xd2511f53u * c.x, high0 = __umulhi(0xd2511f53u, c.x);
    const unsigned low1 = 0xcd9e8d57u * c.z, high1 = __umulhi(0xcd9e8d57u, c.z);
    c = make_uint4(high1 ^ c.y ^ key0, low1, high0 ^ c.w ^ key1, low0);
    key0 += 0x9e3779b9u;
    key1 += 0xbb67ae85u;
  }
  return Wide(c.y) << 32 | c.x;
}

extern "C" __global__ void __launch_bounds__(THREADS)
    KERNEL_NAME(const float* logits,        // [B, V]; NaN counts as -inf
                const unsigned char* seen,  // [B, V] 1: the token is in the context
                const float* numbers,       // [4] temperature, top_p, min_p, repetition_penalty
                const unsigned* integers,   // [3] top_k, seed's low and high half
                int* token,                 // [B] out
                int* length,                // [B] positions in the cache; `count` more afterwards
                int first,                  // number of the first of these sequences, for the random numbers
                int V, int count) {         // V <= 2^22, so that sums of masses fit; grid: B blocks
  wait_for_previous_kernels();
  let_next_kernel_start();
  const int b = blockIdx.x;
  const float temperature = numbers[0], top_p = numbers[1];
  unsigned top_k = integers[0];

  Sampler s;
  s.row = {logits + (long long)b * V,
           seen + (long long)b * V,
           numbers[3],
           __fdiv_rn(1.f, numbers[3]),
           V,
           rows_aligned(logits, V) && rows_aligned(seen, V)};
  float my_low = infinity(), my_high = -infinity();
  s.row.each<2>([&](unsigned, float logit) {  // NaN is passed over
    my_low = fminf(my_low, logit);
    my_high = fmaxf(my_high, logit);
  });
  const float2 range = block_range(my_low, my_high);

  // 2^26 / ln 2. Temperature 0 is the limit: nothing but the largest logits, and the first of them.
  s.scale = {range.y, temperature > 0.f ? __fdiv_rn(96817624.f, temperature) : kLargest, 32 - __clz(V - 1)};
  if (temperature == 0.f) top_k = 1u;
  s.span = min(s.scale.distance(range.x), kFarthest);
  unsigned chosen = 0u;  // where no logit is above -inf
  if (range.y > -infinity()) {
    // min_p: tokens of at least this mass; the largest is 2^40.
    const Wide least = __float2ull_rn(__fmul_rn(numbers[2], 1099511627776.f));
    const unsigned limit = min(block_median(s.scale.distance(my_high)), s.span);
    const bool summing = top_k == 0u || least != 0ull;
    Wide my_total = 0ull, my_likely = 0ull;
    s.histogram_ready = false;
    s.gather(0ull, s.scale.last_key(limit), {0u, 0ull}, summing, least, &my_total, &my_likely);
    const Wide likely = summing ? block_sum(my_likely) : ~0ull;

    // The mass of what the filters keep, all of them prefixes of the sorted tokens; then the draw from it. One loop, so
    // that `find` is there once.
    Wide kept = summing ? block_sum(my_total) : ~0ull;
    enum { kTopK, kTopP, kDraw };
#pragma unroll 1
    for (int stage = top_k ? kTopK : top_p < 1.f ? kTopP : kDraw; stage <= kDraw; ++stage) {
      Wide target = top_k - 1u;
      if (stage == kTopP) {
        if (top_p >= 1.f) continue;
        // Until floor(kept * top_p) is reached, in units of 2^-32 for top_p, and one token at least.
        const Wide share = __float2ull_rn(__fmul_rn(top_p, 4294967296.f));
        target = max(__umul64hi(kept << 1, share << 31), 1ull) - 1ull;
      } else if (stage == kDraw) {
        kept = min(kept, likely);
        const uint4 counter = make_uint4(unsigned(length[b] + count), unsigned(first + b), 0u, 0u);
        target = __umul64hi(random_bits(counter, integers[1], integers[2]), kept);
      }
      const Sampler::Found found = s.find(stage == kTopK ? By::count : By::mass, target);
      chosen = found.index;
      kept = found.mass;
    }
  }
  __syncthreads();  // everyone has read length
  if (threadIdx.x == 0) {
    token[b] = int(chosen);
    length[b] += count;
  }
}
