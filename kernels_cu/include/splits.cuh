// How attention divides a context among blocks: attention.cu and attention_combine.cu must agree.
#pragma once

constexpr int kKeysASplit = 64;  // fewer keys than this are not worth another block: KEYS_A_SPLIT of tuning/decoder.py

// Splits in use for a context of `keys`, of which the grid offers `splits`.
__device__ __forceinline__ int active_splits(int keys, int splits) {
  return min(splits, (keys + kKeysASplit - 1) / kKeysASplit);
}
