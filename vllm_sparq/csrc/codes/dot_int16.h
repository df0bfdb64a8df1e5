// Logits of tokens whose K is a row of codes, with the query rounded to 16 bits: W tokens are turned over, so that a
// lane is a token and a group's step and zero are applied to W logits at once, in fp32. An element of the query is off
// by at most 2^-16 of the largest of its group.
#pragma once

#include "base/tile.h"
#include "codes/attend_codes.h"
#include "codes/int16_weights.h"
#include "codes/turned.h"

namespace sparq {

constexpr int MOST_DOT_CHANNELS = 256;  // sums of so many products of 8 and 15 bits fit into 32

inline bool can_dot_int16(const CodeShape& shape) {
  return shape.dtype != DType::fp32 && shape.n <= MOST_DOT_CHANNELS && can_turn(shape);
}

// One group of a head as words: multiples of `unit`, which is NaN where an element is not finite.
struct QueryGroup {
  float unit, sum, lack;  // of the elements; of what the words lack of them

  // Of n elements; `words` has room for 2 W more.
  static QueryGroup of(const float* q, int n, uint16_t* words) {
    alignas(64) float x[MOST_DOT_CHANNELS + 2 * W];
    const int n_padded = (int)round_up((size_t)n, 2 * W);
    std::copy_n(q, n, x), std::fill(x + n, x + n_padded, 0.0f);
    Vec most = zero(), sum = zero(), spoilt = zero(), lack = zero();
    for (int i = 0; i < n_padded; i += W) {
      most = max(magnitude(load(x + i)), most);
      sum = add(load(x + i), sum), spoilt = fma(load(x + i), zero(), spoilt);
    }
    const float top = reduce_max(most), unit = top / 32767.0f + reduce_add(spoilt);
    const Vec per_unit = set1(top > LEAST ? 32767.0f / top : 0.0f), less = set1(-unit);
    for (int i = 0; i < n_padded; i += 2 * W) {
      const Vec low = round_even(mul(load(x + i), per_unit)), high = round_even(mul(load(x + i + W), per_unit));
      store_words(words + i, to_words(low, high));
      lack = add(lack, add(fma(low, less, load(x + i)), fma(high, less, load(x + i + W))));
    }
    return {unit, reduce_add(sum), reduce_add(lack)};
  }
};

inline void pair_query_int16(const CodeShape& key, const CodesQuery& query, int n_heads) {
  const float middle = key.has_zero ? (float)((1 << key.bits) - 1) * 0.5f : 0.0f;
  uint16_t words[MOST_DOT_CHANNELS + 2 * W];
  for (int h = 0; h < n_heads; ++h) {
    for (int g = 0; g < query.n_groups; ++g) {
      const int first = g * key.group, at = h * query.n_groups + g;
      const auto group = QueryGroup::of(query.whole + (size_t)h * query.stride + first, key.group, words + first);
      query.units[at] = group.unit, query.sums[at] = group.sum, query.rests[at] = middle * group.lack;
    }
    write_pairs(key, words, query.pairs + (size_t)h * query.n_pairs);
  }
}

// sums[h] = q . codes of one plane of a segment.
template <class C, int p, int HH>
SPARQ_INLINE void sum_plane(const Words* turned, const Segment& segment, const int32_t* pairs, int pair_stride,
                            Vec (&sums)[HH]) {
  constexpr int CHAINS = W == 16 ? 2 : 1;  // where products are summed at once, sums wait for sums
  Words sum[CHAINS][HH];
#pragma GCC unroll 8
  for (int i = 0; i < CHAINS * HH; ++i) (&sum[0][0])[i] = zero_words();
  const int32_t* at = pairs + segment.first * 4 + p;
  for (int k = segment.first; k < segment.last; ++k, at += 4) {
    const Words words = turned[k], low = C::template take<p, 0>(words), high = C::template take<p, 1>(words);
#pragma GCC unroll 4
    for (int h = 0; h < HH; ++h) {
      sum[0][h] = in_this_order(add_products(sum[0][h], low, set_pair(at[h * pair_stride])));
      sum[CHAINS - 1][h] = in_this_order(add_products(sum[CHAINS - 1][h], high, set_pair(at[h * pair_stride + 2])));
    }
  }
#pragma GCC unroll 4
  for (int h = 0; h < HH; ++h)
    sums[h] = pairs_to_float(CHAINS == 1 ? sum[0][h] : add_pairs(sum[0][h], sum[CHAINS - 1][h]));
}

// logits[h] of W rows that are turned over, for HH heads from h0 on.
template <class C, class T, int HH>
void dot_heads_int16(const TurnedRows<C::planes>& rows, bool has_zero, const CodesQuery& query, int h0, float* logits,
                     int stride) {
  const int n_groups = query.n_groups;
  const int32_t* const pairs = query.pairs + (size_t)h0 * query.n_pairs;
  const size_t first_group = (size_t)h0 * n_groups;
  const float *const of_groups = query.sums + first_group, *const rests = query.rests + first_group;
  const float* const units = query.units + first_group;
  Vec total[HH];
#pragma GCC unroll 4
  for (int h = 0; h < HH; ++h) total[h] = zero();
  for (int s = 0; s < rows.n_segments; ++s) {
    const auto add_plane = [&](auto plane) __attribute__((always_inline)) {
      constexpr int p = decltype(plane)::value;
      Vec sums[HH];
      sum_plane<C, p, HH>(rows.codes, rows.segments[s], pairs, query.n_pairs, sums);
      const int g = rows.segments[s].group[p];
      const Vec step = low_half<T>(rows.scales[g]);
#pragma GCC unroll 4
      for (int h = 0; h < HH; ++h) total[h] = fma(mul(step, set1(units[h * n_groups + g])), sums[h], total[h]);
    };
    add_plane(std::integral_constant<int, 0>{});
    if constexpr (C::planes == 2) add_plane(std::integral_constant<int, 1>{});
  }
  // Zeros go by group and not by segment: a group may be in both planes, or in several segments.
  for (int g = 0; g < (has_zero ? n_groups : 0); ++g) {
    const Vec step = low_half<T>(rows.scales[g]), low = high_half<T>(rows.scales[g]);
#pragma GCC unroll 4
    for (int h = 0; h < HH; ++h) {
      total[h] = fma(low, set1(of_groups[h * n_groups + g]), total[h]);
      total[h] = fma(step, set1(rests[h * n_groups + g]), total[h]);
    }
  }
#pragma GCC unroll 4
  for (int h = 0; h < HH; ++h) store(logits + (size_t)(h0 + h) * stride, total[h]);
}

template <class C, class T>
void dot_int16(const CodeShape& shape, const CodesQuery& query, int n_heads, const CodeRows& rows, float* logits,
               int stride, Ahead& ahead) {
  TurnedRows<C::planes> turned(shape);
  const int share = ahead.share((rows.n + W - 1) / W);
  for (int t = 0; t < rows.n; t += W) {
    turned.take(shape, rows, t);
    ahead.step(share);
    few_at_a_time<MAX_TILE_HEADS>(n_heads, [&](int h, auto heads) {
      dot_heads_int16<C, T, heads>(turned, shape.has_zero, query, h, logits + t, stride);
    });
  }
}

}  // namespace sparq
