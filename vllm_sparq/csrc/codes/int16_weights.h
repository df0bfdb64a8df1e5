// Weights of codes as whole numbers of 16 bits: a number of a head, such as a probability, times the step of a row.
// They are multiples of a unit: the largest number times the largest step / 32767, of up to SUM_ROWS rows. A sum over
// codes less the middle of their range is off by at most half a unit a row; zeros are added in fp32.
#pragma once

#include <algorithm>

#include "base/scratch.h"
#include "codes/sum_words.h"

namespace sparq {

SPARQ_INLINE Vec magnitude(Vec x) { return max(x, sub(zero(), x)); }

// Steps of up to SUM_ROWS rows as fractions of the largest, and zero + middle step; zeros up to a multiple of 2 W.
struct GroupScales {
  const float *fractions, *mids;
  float largest;

  // The same of steps that lie in `steps`, which become the fractions.
  static GroupScales of(float* steps, const float* mids, int n) {
    Vec most = zero();
    for (int i = 0; i < n; i += W) most = max(load(steps + i), most);
    const float largest = reduce_max(most);
    const Vec factor = set1(largest > LEAST ? 1.0f / largest : 0.0f);
    for (int i = 0; i < n; i += W) store(steps + i, mul(load(steps + i), factor));
    return {steps, mids, largest};
  }
};

// What one head's numbers become: each is the largest times `fractions` / 32767.
struct HeadNumbers {
  alignas(64) float numbers[SUM_ROWS], fractions[SUM_ROWS];
  float largest;

  // n of them, then zeros.
  void take(const float* x, int n) {
    const int n_padded = (int)round_up((size_t)n, 2 * W);
    std::copy_n(x, n, numbers), std::fill(numbers + n, numbers + n_padded, 0.0f);
    Vec most = zero();
    for (int i = 0; i < n_padded; i += W) most = max(magnitude(load(numbers + i)), most);
    largest = reduce_max(most);
    const Vec factor = set1(largest > LEAST ? 32767.0f / largest : 0.0f);
    for (int i = 0; i < n_padded; i += W) store(fractions + i, mul(load(numbers + i), factor));
  }
};

// The weights of one head, of one group of rows' codes: a sum is unit times that over words, plus base.
struct GroupWeights {
  float unit, base;

  // Words of n numbers times the steps. What is not finite makes the base NaN, and so all sums.
  static GroupWeights of(const HeadNumbers& x, const GroupScales& scales, int n, float middle, int16_t* words) {
    Vec base = zero(), other = zero();
    Words total = zero_words();
    for (int i = 0; i < n; i += 2 * W) {
      const Vec low = mul(load(x.fractions + i), load(scales.fractions + i));
      const Vec high = mul(load(x.fractions + i + W), load(scales.fractions + i + W));
      base = fma(load(x.numbers + i), load(scales.mids + i), base);
      other = fma(load(x.numbers + i + W), load(scales.mids + i + W), other);
      const Words both = to_words(low, high);
      store_words(words + i, both);
      total = add_products(total, both, set_word(1));
    }
    const float unit = x.largest * scales.largest / 32767.0f;
    const Vec rest = mul(pairs_to_float(total), set1(unit * middle));
    return {unit, reduce_add(sub(add(base, other), rest))};
  }
};

}  // namespace sparq
