// What a product may do with its results before it stores them: the activation of an FFN.
#pragma once

// The `ffn` parameter of the products (FFN of edgellm_cupy/ops/enqueue.py): one of these, plus kGated. kGated: rows 2 i and
// 2 i + 1 of W are row i of gate and of up, and y [N, M / 2] is f(gate) * up.
// The squared ReLU leaves float16 easily; where an RMSNorm comes next, which takes any factor out, 2^-8 of it is stored.
constexpr int kNoFfn = 0, kSilu = 1, kSquaredRelu = 2, kSquaredReluScaled = 3, kGated = 4;

__device__ __forceinline__ float ffn_activation(float v, int ffn) {
  // The quick exponential is off by 2^-24 |v|, which matters where exp(-v) does not.
  const int kind = ffn % kGated;
  if (kind == kSilu) return __fdividef(v, 1.f + __expf(-v));
  const float r = v < 0.f ? 0.f : v;  // not fmaxf, which loses NaN
  return (kind == kSquaredReluScaled ? r * 0x1p-8f : r) * r;
}
