// One step of the softmax of flash attention: the logits of a few tokens become weights, below a maximum that only
// rises.
#pragma once

#include <algorithm>
#include <cmath>

#include "base/simd.h"

namespace sparq {

SPARQ_INLINE void scale_row(float* acc, int d, float factor) {
  for (int c = 0; c < d; c += W) store(acc + c, mul(load(acc + c), set1(factor)));
}

// The weights of a tile in the type that V is multiplied with. Their sum is over what was stored, so that weights that
// were rounded to bf16 still add up to one.
SPARQ_INLINE Vec store_weights(float* to, Vec p) {
  store(to, p);
  return p;
}
SPARQ_INLINE Vec store_weights(bf16* to, Vec p) {
  store(to, p);
  return load(to);
}

// logits [n_padded] -> weights 2^(scale * logit - peak), which may take their place; returns their sum. Tokens from n
// on get weight 0.
template <class Weight>
float softmax_tile(float* logits, int n, int n_padded, float scale, float* peak, float* rescale, Weight* weights) {
  for (int t = n; t < n_padded; ++t) logits[t] = -INFINITY;
  Vec highest = set1(-INFINITY);
  for (int t = 0; t < n_padded; t += W) {
    const Vec x = mul(load(logits + t), set1(scale));
    store(logits + t, x);
    highest = max(highest, x);
  }
  const float now = std::max(*peak, reduce_max(highest));
  *rescale = *peak == now ? 1.0f : std::exp2(*peak - now);
  *peak = now;
  Vec sum = zero();
  for (int t = 0; t < n_padded; t += W)
    sum = add(sum, store_weights(weights + t, exp2_negative(sub(load(logits + t), set1(now)))));
  return reduce_add(sum);
}

}  // namespace sparq
