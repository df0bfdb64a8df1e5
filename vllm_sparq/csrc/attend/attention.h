// The attention that tokens get, added to the `attention` of their slots: logits are kept as attention makes them, and
// become shares once the sums over the whole context are known.
#pragma once

#include "base/paged.h"
#include "base/scratch.h"

namespace sparq {

// The logits of one query group and a range of tokens, base 2.
struct Noted {
  float* logits;  // [n_heads, stride]; from `weigh` on 2^(logit - peak)
  float* peaks;   // [n_heads]
  float* totals;  // [n_heads], sums over the range
  int n_heads;
  size_t stride;

  static size_t stride_for(int n_tokens) { return round_up((size_t)n_tokens, 16) + 16; }
  static size_t n_floats(int n_heads, int n_tokens) {
    return n_heads * stride_for(n_tokens) + round_up(2 * n_heads, 16);
  }
  static Noted in(float* memory, int n_heads, int n_tokens) {
    const size_t stride = stride_for(n_tokens);
    float* const peaks = memory + n_heads * stride;
    return {memory, peaks, peaks + n_heads, n_heads, stride};
  }

  // Peaks and totals of n tokens. (The totals of attention itself will not do: they are sums of rounded weights.)
  void weigh(const float* peaks_of_heads, int n) const;
};

// Fetches the attention of tokens first .. first + n, into L2, before they are waited for: 2% of a dense read from
// memory.
void fetch_attention(const Sequence& sequence, int first, int n);

// Adds to the attention of tokens first .. first + n the mean over the heads of factors[h] weights[h][token].
void add_attention(const Sequence& sequence, int first, int n, const float* weights, size_t stride, int n_heads,
                   const float* factors);

}  // namespace sparq
