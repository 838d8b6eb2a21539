// What the lanes of a warp do together: each lane leaves its operands and waits; the last one does the work for
// all. A lane that is missing (it left, waits elsewhere, or came with another mask) is a fault.
#pragma once
#include <cmath>

#include "barriers.hpp"

namespace emu {

inline const char* name_of(Collective c) {
  static const char* const names[] = {"nothing",     "__syncwarp()",   "a shuffle", "a vote",
                                      "a reduction", "__match_*_sync", "mma.sync",  "ldmatrix"};
  return names[int(c)];
}

// Waits for all lanes of `mask`; `resolve(Warp&)` runs once, when all are there, and sets each lane's `value`.
template <class Resolve>
uint64_t together(uint64_t pc, Collective what, unsigned mask, uint64_t value, uint64_t parameter, Resolve resolve) {
  Fiber* me = launch->current;
  Warp& warp = *me->warp;
  me->pc = pc;
  if (!(mask >> me->lane & 1))
    raise("missing-lane", me, pc, "lane %u calls %s with mask %#x, which lacks it", me->lane, name_of(what), mask);
  if (const unsigned gone = mask & (warp.exited | ~warp.exists))
    raise("missing-lane", me, pc, "%s with mask %#x, of which lanes %#x have left or never were", name_of(what), mask,
          gone);
  if (const unsigned others = warp.waiting & mask) {
    const Fiber* other = warp.lanes[__builtin_ctz(others)];
    if (other->collective != what || other->mask != mask)
      raise("missing-lane", me, pc, "%s with mask %#x, while thread %s waits in %s with mask %#x", name_of(what), mask,
            name_of(other).c_str(), name_of(other->collective), other->mask);
  }
  me->collective = what;
  me->mask = mask;
  me->value = value;
  me->parameter = parameter;
  warp.waiting |= 1u << me->lane;
  if ((warp.waiting & mask) != mask) {
    me->state = State::collective;
    run_next(me);
    return me->value;
  }
  resolve(warp);
  warp.waiting &= ~mask;
  for (unsigned lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1 && warp.lanes[lane] != me) wake(warp.lanes[lane]);
  maybe_step_aside();
  return me->value;
}

// Calls f(lane's thread) for each lane of a mask.
template <class F>
void each(Warp& warp, unsigned mask, F f) {
  for (unsigned rest = mask; rest; rest &= rest - 1) f(*warp.lanes[__builtin_ctz(rest)]);
}

void sync_warp(unsigned mask) {
  together(EMU_CALLER, Collective::sync_warp, mask, 0, 0, [](Warp& warp) { warp.tick(); });
}

uint64_t shuffle(unsigned mask, uint64_t bits, unsigned source_lane) {
  const uint64_t pc = EMU_CALLER;
  return together(pc, Collective::shuffle, mask, bits, source_lane, [=](Warp& warp) {
    uint64_t values[32];
    for (unsigned i = 0; i < 32; ++i) values[i] = warp.lanes[i] ? warp.lanes[i]->value : 0;
    each(warp, mask, [&](Fiber& f) {
      if (!(mask >> f.parameter & 1))
        raise("missing-lane", &f, pc, "a shuffle reads lane %u, which is not in its mask %#x", unsigned(f.parameter),
              mask);
      f.value = values[f.parameter];
    });
  });
}

unsigned ballot(unsigned mask, bool predicate) {
  return unsigned(together(EMU_CALLER, Collective::ballot, mask, predicate, 0, [=](Warp& warp) {
    unsigned votes = 0;
    each(warp, mask, [&](const Fiber& f) { votes |= unsigned(f.value) << f.lane; });
    each(warp, mask, [&](Fiber& f) { f.value = votes; });
  }));
}

unsigned reduce(unsigned mask, unsigned value, Reduction operation) {
  return unsigned(together(EMU_CALLER, Collective::reduce, mask, value, uint64_t(operation), [=](Warp& warp) {
    unsigned result = unsigned(warp.lanes[__builtin_ctz(mask)]->value);
    each(warp, mask & (mask - 1), [&](const Fiber& f) {
      const unsigned v = unsigned(f.value);
      switch (operation) {
        case Reduction::add:
          result += v;
          break;
        case Reduction::min_s:
          result = int(v) < int(result) ? v : result;
          break;
        case Reduction::max_s:
          result = int(v) > int(result) ? v : result;
          break;
        case Reduction::min_u:
          result = v < result ? v : result;
          break;
        case Reduction::max_u:
          result = v > result ? v : result;
          break;
        case Reduction::and_:
          result &= v;
          break;
        case Reduction::or_:
          result |= v;
          break;
        case Reduction::xor_:
          result ^= v;
          break;
      }
    });
    each(warp, mask, [&](Fiber& f) { f.value = result; });
  }));
}

unsigned match_any(unsigned mask, uint64_t bits) {
  return unsigned(together(EMU_CALLER, Collective::match, mask, bits, 0, [=](Warp& warp) {
    uint64_t values[32];
    each(warp, mask, [&](const Fiber& f) { values[f.lane] = f.value; });
    each(warp, mask, [&](Fiber& f) {
      f.value = 0;
      for (unsigned i = 0; i < 32; ++i)
        if (mask >> i & 1 && values[i] == values[f.lane]) f.value |= 1u << i;
    });
  }));
}

unsigned active_mask() { return launch->current->warp->exists & ~launch->current->warp->exited; }

// ---- tensor cores ----

inline double element(Mma type, bool is_a, uint32_t word, int i) {
  switch (type) {
    case Mma::f16: {
      const unsigned h = word >> (16 * i) & 0xffff, exponent = h >> 10 & 31, mantissa = h & 1023;
      const double magnitude = exponent == 31 ? (mantissa ? NAN : INFINITY)
                               : exponent     ? std::ldexp(1024.0 + mantissa, int(exponent) - 25)
                                              : std::ldexp(double(mantissa), -24);
      return h & 0x8000 ? -magnitude : magnitude;
    }
    case Mma::bf16: {
      const uint32_t bits = (word >> (16 * i) & 0xffff) << 16;
      float f;
      memcpy(&f, &bits, sizeof f);
      return f;
    }
    default: {
      const bool is_signed = type == Mma::s8 || (is_a ? type == Mma::s8u8 : type == Mma::u8s8);
      const unsigned byte = word >> (8 * i) & 255;
      return is_signed ? double(int8_t(byte)) : double(byte);
    }
  }
}

struct MmaOperands {
  void* d;
  const uint32_t *a, *b;
  const void* c;
};

// D = A B + C with A [M, K] by rows, B [K, 8] by columns. A register of a lane holds P = 4 / element bytes
// neighbours in K; lane 4g + t has row g (and g + 8) of A and D, column g of B, and columns 2t, 2t + 1 of D.
// Floats: products and sums in double, rounded once to float32 (a GPU adds with less: not bit-exact).
inline void multiply(Warp& warp, Mma type, int a_registers, int b_registers) {
  const bool floating = type == Mma::f16 || type == Mma::bf16;
  const int per_register = floating ? 2 : 4;
  const int rows = a_registers == 1 ? 8 : 16, depth = 4 * per_register * b_registers;
  double a[16][64], b[64][8];
  each(warp, ~0u, [&](const Fiber& f) {
    const auto& operands = *reinterpret_cast<const MmaOperands*>(f.value);
    const int g = int(f.lane) / 4, t = int(f.lane) % 4;
    for (int i = 0; i < per_register; ++i) {
      for (int r = 0; r < a_registers; ++r) {
        const int row = rows == 16 ? g + 8 * (r & 1) : g, chunk = rows == 16 ? r >> 1 : r;
        a[row][(4 * chunk + t) * per_register + i] = element(type, true, operands.a[r], i);
      }
      for (int r = 0; r < b_registers; ++r)
        b[(4 * r + t) * per_register + i][g] = element(type, false, operands.b[r], i);
    }
  });
  each(warp, ~0u, [&](const Fiber& f) {
    const auto& operands = *reinterpret_cast<const MmaOperands*>(f.value);
    for (int i = 0; i < rows / 4; ++i) {
      const int row = int(f.lane) / 4 + 8 * (i >> 1), column = int(f.lane) % 4 * 2 + (i & 1);
      double sum = 0;
      for (int k = 0; k < depth; ++k) sum += a[row][k] * b[k][column];
      if (floating) {
        static_cast<float*>(operands.d)[i] = float(sum + static_cast<const float*>(operands.c)[i]);
      } else {
        const uint32_t c = uint32_t(static_cast<const int32_t*>(operands.c)[i]);
        static_cast<int32_t*>(operands.d)[i] = int32_t(c + uint32_t(int64_t(sum)));  // wraps
      }
    }
  });
}

void mma(Mma type, void* d, const uint32_t* a, int a_registers, const uint32_t* b, int b_registers, const void* c) {
  const MmaOperands operands{d, a, b, c};
  const uint64_t shape = uint64_t(type) << 16 | unsigned(a_registers) << 8 | unsigned(b_registers);
  together(EMU_CALLER, Collective::mma, ~0u, uint64_t(&operands), shape,
           [=](Warp& warp) { multiply(warp, type, a_registers, b_registers); });
}

struct MatrixRow {
  uint32_t* registers;
  const char* row;
};

void load_matrix(uint32_t* registers, int count, bool transposed, const void* row) {
  const uint64_t pc = EMU_CALLER;
  const MatrixRow mine{registers, static_cast<const char*>(row)};
  together(pc, Collective::ldmatrix, ~0u, uint64_t(&mine), uint64_t(count), [=](Warp& warp) {
    uint16_t matrix[4][8][8];
    for (int lane = 0; lane < 8 * count; ++lane) {
      const Fiber& f = *warp.lanes[lane];
      const char* address = reinterpret_cast<const MatrixRow*>(f.value)->row;
      if (uintptr_t(address) % 16) {
        launch->fault->address = uint64_t(address);
        raise("misaligned", &f, pc, "ldmatrix needs rows at multiples of 16 bytes");
      }
      check_memory(&f, pc, address, 16, Access::read);
      memcpy(matrix[lane / 8][lane % 8], address, 16);
    }
    each(warp, ~0u, [&](const Fiber& f) {
      const unsigned g = f.lane / 4, t = f.lane % 4 * 2;
      for (int j = 0; j < count; ++j) {
        const uint32_t low = transposed ? matrix[j][t][g] : matrix[j][g][t];
        const uint32_t high = transposed ? matrix[j][t + 1][g] : matrix[j][g][t + 1];
        reinterpret_cast<const MatrixRow*>(f.value)->registers[j] = low | high << 16;
      }
    });
  });
}

// ---- asynchronous copies ----

// From here until the wait, the destination counts as not written: reading it early is a fault, and a copy over
// what others may still read is a race.
void async_copy(void* shared, const void* global, int bytes, int source_bytes) {
  Fiber* me = launch->current;
  me->pc = EMU_CALLER;
  require_alignment(shared, unsigned(bytes), "cp.async", me->pc);
  require_alignment(global, unsigned(bytes), "cp.async", me->pc);
  if (source_bytes < 0 || source_bytes > bytes)
    raise("out-of-bounds", me, me->pc, "cp.async of %d source bytes into %d", source_bytes, bytes);
  if (source_bytes) check_memory(me, me->pc, global, size_t(source_bytes), Access::read);
  check_memory(me, me->pc, shared, size_t(bytes), Access::write);
  const size_t in_static = uintptr_t(shared) - launch->configuration.static_begin;
  const size_t offset = in_static < launch->configuration.static_bytes ? memory.offset(me->block->window) + in_static
                                                                       : memory.offset(shared);
  if (offset >= kArenaBytes || !(memory.shadow[offset] & kShared))
    raise("out-of-bounds", me, me->pc, "cp.async to memory that is not shared");
  for (int i = 0; i < bytes; ++i) memory.shadow[offset + size_t(i)] &= uint8_t(~kInitialised);
  memset(shared, 0xcb, size_t(bytes));
  me->open_copies.push_back({static_cast<char*>(shared), static_cast<const char*>(global), bytes, source_bytes});
}

void async_commit() {
  Fiber* me = launch->current;
  me->committed_copies.push_back(std::move(me->open_copies));
  me->open_copies.clear();
}

inline void finish(Fiber* me, const std::vector<AsyncCopy>& copies) {
  for (const AsyncCopy& copy : copies) {
    check_memory(me, me->pc, copy.to, size_t(copy.bytes), Access::write);
    memcpy(copy.to, copy.from, size_t(copy.source_bytes));
    memset(copy.to + copy.source_bytes, 0, size_t(copy.bytes - copy.source_bytes));
  }
}

static void finish_all_but(size_t pending, Fiber* me) {
  auto& groups = me->committed_copies;
  for (; groups.size() > pending; groups.erase(groups.begin())) finish(me, groups.front());
}

void async_wait_group(int pending_groups_allowed) {
  launch->current->pc = EMU_CALLER;
  finish_all_but(size_t(pending_groups_allowed), launch->current);
}

void async_wait_all() {
  launch->current->pc = EMU_CALLER;
  async_commit();
  finish_all_but(0, launch->current);
}

}  // namespace emu
