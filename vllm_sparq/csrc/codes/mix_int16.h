// Rows of codes times numbers that are rounded to 16 bits (int16_weights.h): where the CPU does not multiply bf16, and
// for codes of 8 bits where it does.
#pragma once

#include "base/tile.h"
#include "codes/attend_codes.h"
#include "codes/int16_weights.h"

namespace sparq {

// Whether the codes of each plane in each unit of a row belong to one group.
inline bool can_mix_int16(const CodeShape& shape) {
  const int row = shape.row_bytes();
  if (shape.dtype == DType::fp32 || shape.n_groups() > MIX_GROUPS || row % 2 != 0 || row < LEAST_ROW) return false;
  for (int plane = 0; plane < shape.n; plane += row)
    for (int byte = 0; byte < row; byte += UNIT)
      if ((plane + byte) / shape.group != (plane + std::min(byte + UNIT, row) - 1) / shape.group) return false;
  return true;
}

// Weights of one group; heads would lie multiples of 4 kB apart without the rest.
constexpr int GROUP_WORDS = SUM_ROWS + 16;

// Scales of a few rows, group by group.
struct RowScales {
  alignas(64) float steps[MIX_GROUPS][SUM_ROWS], mids[MIX_GROUPS][SUM_ROWS];
  GroupScales of[MIX_GROUPS];

  template <class T>
  void take(const CodeShape& shape, const CodeRows& rows, int first, int n, float middle) {
    alignas(64) int32_t turned[MIX_GROUPS * SUM_ROWS];
    const int n_groups = shape.n_groups(), n_padded = (int)round_up((size_t)n, 2 * W);
    turn(shape, rows.scales + first, n, n_padded, turned);
    for (int g = 0; g < n_groups; ++g) {
      for (int i = 0; i < n_padded; i += W) {
        const Words both = load_words(turned + g * SUM_ROWS + i);
        const Vec step = low_half<T>(both);
        store(steps[g] + i, step);
        store(mids[g] + i, fma(set1(middle), step, shape.has_zero ? high_half<T>(both) : zero()));
      }
      of[g] = GroupScales::of(steps[g], mids[g], n_padded);
    }
  }

 private:
  // [n_groups, SUM_ROWS] dwords: step and zero, or step and nothing.
  static void turn(const CodeShape& shape, const uint8_t* const* scales, int n, int n_padded, int32_t* to) {
    const int n_groups = shape.n_groups();
    int i = 0;
    Words quad[4];
    for (; shape.has_zero && n_groups == 4 && i + W <= n; i += W) {
      turn_over(scales + i, 0, quad);
      for (int g = 0; g < 4; ++g) store_words(to + g * SUM_ROWS + i, quad[g]);
    }
    for (; shape.has_zero && n_groups == 2 && i < n; ++i) {
      int32_t two[2];
      memcpy(two, scales[i], 8);
      to[i] = two[0], to[SUM_ROWS + i] = two[1];
    }
    for (; i < n; ++i)
      for (int g = 0; g < n_groups; ++g) {
        uint32_t both = 0;
        memcpy(&both, scales[i] + (shape.has_zero ? 4 : 2) * g, shape.has_zero ? 4 : 2);
        to[g * SUM_ROWS + i] = (int32_t)both;
      }
    for (int g = 0; g < n_groups; ++g) std::fill(to + g * SUM_ROWS + n, to + g * SUM_ROWS + n_padded, 0);
  }
};

// The same for HH heads and n rows whose scales are at hand.
template <class C, int HH>
void mix_heads_int16(const CodeShape& shape, const RowScales& scales, const uint8_t* const* codes, int n,
                     const float* x, int x_stride, float* out, int out_stride, Ahead& ahead, int share) {
  alignas(64) int16_t words[HH][MIX_GROUPS][GROUP_WORDS];
  GroupWeights folded[HH][MIX_GROUPS];
  HeadNumbers numbers;
  const int row_bytes = shape.row_bytes(), n_groups = shape.n_groups();
  for (int h = 0; h < HH; ++h) {
    numbers.take(x + (size_t)h * x_stride, n);
    for (int g = 0; g < n_groups; ++g)
      folded[h][g] = GroupWeights::of(numbers, scales.of[g], n, C::middle, words[h][g]);
  }
  const PointedRows pairs{codes};
  for (int byte = 0; byte < row_bytes; byte += UNIT) {
    const WordUnit unit = WordUnit::at(byte, row_bytes);
    int group[C::planes];
    PairWeights<C::planes, MIX_GROUPS * GROUP_WORDS / 2> weights;
    for (int p = 0; p < C::planes; ++p) {
      group[p] = (p * row_bytes + byte) / shape.group;
      weights.of_plane[p] = (const int32_t*)words[0][group[p]];
    }
    sum_unit<C, HH>(pairs, (n + 1) / 2, unit, weights, ahead, share, [&](int p, int h, Vec low, Vec high) {
      const GroupWeights& by = folded[h][group[p]];
      put_unit<true>(unit, low, high, by.unit, by.base, out + (size_t)h * out_stride + p * row_bytes);
    });
  }
}

template <class C, class T>
void mix_int16(const CodeShape& shape, const CodeRows& rows, const float* x, int x_stride, int n_heads, float* out,
               int out_stride, Ahead& ahead) {
  constexpr int MOST_HEADS = 5;  // at a time: four, and in a ranking also their sum
  RowScales scales;
  int n_steps = 0;
  few_at_a_time<MOST_HEADS>(n_heads,
                            [&](int, auto heads) { n_steps += n_shares<C, heads>(shape.row_bytes(), rows.n); });
  const int share = ahead.share(n_steps);
  for (int first = 0; first < rows.n; first += SUM_ROWS) {
    const int n = std::min(SUM_ROWS, rows.n - first);
    scales.take<T>(shape, rows, first, n, C::middle);
    few_at_a_time<MOST_HEADS>(n_heads, [&](int h, auto heads) {
      mix_heads_int16<C, heads>(shape, scales, rows.codes + first, n, x + (size_t)h * x_stride + first, x_stride,
                                out + (size_t)h * out_stride, out_stride, ahead, share);
    });
  }
}

}  // namespace sparq
