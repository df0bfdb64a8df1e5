#include "attend/attention.h"

#include <algorithm>
#include <cmath>

#include "base/simd.h"

namespace sparq {

void Noted::weigh(const float* peaks_of_heads, int n) const {
  for (int h = 0; h < n_heads; ++h) {
    float* const row = logits + h * stride;
    const Vec peak = set1(peaks[h] = peaks_of_heads[h]);
    std::fill(row + n, row + round_up((size_t)n, W), -INFINITY);
    Vec sum = zero();
    for (int i = 0; i < n; i += W) {
      const Vec x = exp2_negative(sub(load(row + i), peak));
      store(row + i, x);
      sum = add(sum, x);
    }
    totals[h] = reduce_add(sum);
  }
}

void fetch_attention(const Sequence& sequence, int first, int n) {
  const Pages& pages = *sequence.pages;
  for (int token = first; token < first + n; token += 16)
    prefetch_l2(sequence.page(token / pages.block_size) + pages.attention + token % pages.block_size * sizeof(float));
}

void add_attention(const Sequence& sequence, int first, int n, const float* weights, size_t stride, int n_heads,
                   const float* factors) {
  const Pages& pages = *sequence.pages;
  for (int done = 0, run; done < n; done += run) {
    const int block = (first + done) / pages.block_size, slot = (first + done) % pages.block_size;
    run = std::min(n - done, pages.block_size - slot);
    float* const attention = (float*)(sequence.page(block) + pages.attention) + slot;
    for (int i = 0; i < run; i += W) {
      Vec mean = zero();
      for (int h = 0; h < n_heads; ++h) mean = fma(load(weights + h * stride + done + i), set1(factors[h]), mean);
      const Vec before = load(attention + i), after = add(before, mean);
      // Slots after the last token keep their bytes.
      store(attention + i, run - i < W ? select((1u << (run - i)) - 1, after, before) : after);
    }
  }
}

}  // namespace sparq
