// Sums over rows of codes times 16-bit weights, two rows at a time: the inner loop of P V, of q K where K is
// channel-major, and of SparQ's scan, wherever codes are multiplied as whole numbers.
#pragma once

#include <algorithm>

#include "base/words.h"
#include "codes/code_rows.h"

namespace sparq {

constexpr int SUM_ROWS = 128;   // at most: sums of 128 products of 7 and 15 bits fit into 32
constexpr int UNIT = 2 * W;     // bytes of a row that fill a vector, beside those of the next row
constexpr int AHEAD_PAIRS = 4;  // between requests for memory that is wanted next

// Pairs of rows anywhere in memory.
struct PointedRows {
  const uint8_t* const* codes;

  SPARQ_INLINE Words load(int pair, int byte, int n_bytes) const {
    return load_pairs(codes[2 * pair] + byte, codes[2 * pair + 1] + byte, n_bytes);
  }
};

// Pairs of rows whose words have been put beside each other.
struct StagedRows {
  const uint8_t* words;
  int pair_bytes;

  SPARQ_INLINE Words load(int pair, int byte, int) const { return load_words(words + pair * pair_bytes + 2 * byte); }
};

// A few bytes of all rows, of which those from `first` on are new: in a row that is no multiple of UNIT the last unit
// reaches back, or is short.
struct WordUnit {
  int byte, n_bytes, first;

  static WordUnit at(int byte, int row_bytes) {
    const int from = LEAST_ROW < UNIT ? byte : std::min(byte, row_bytes - UNIT);
    return {from, std::min(UNIT, row_bytes - from), byte - from};
  }
};

// Pairs of weights of each plane, those of the heads STRIDE pairs apart.
template <int planes, int STRIDE>
struct PairWeights {
  static constexpr int stride = STRIDE;
  const int32_t* of_plane[planes];
};

// Sums of PP planes from plane p0 on: [PP][codes in low bytes, in high ones][HH].
template <class C, int HH, int PP, int p0, int STRIDE>
struct WordSums {
  Words sum[PP][2][HH];

  SPARQ_INLINE WordSums() {
#pragma GCC unroll 32
    for (int i = 0; i < PP * 2 * HH; ++i) (&sum[0][0][0])[i] = zero_words();
  }

  template <int p = 0>
  SPARQ_INLINE void add(Words words, const int32_t* const* weights, int pair) {
    const Words low = C::template take<p0 + p, 0>(words), high = C::template take<p0 + p, 1>(words);
#pragma GCC unroll 5
    for (int h = 0; h < HH; ++h) {
      const auto weight = set_pair(weights[p0 + p][h * STRIDE + pair]);
      sum[p][0][h] = in_this_order(add_products(sum[p][0][h], low, weight));
      sum[p][1][h] = in_this_order(add_products(sum[p][1][h], high, weight));
    }
    if constexpr (p + 1 < PP) add<p + 1>(words, weights, pair);
  }
};

// Calls put(plane, head, low, high) with the sums of a unit over n_pairs pairs of rows: those of its first W codes in a
// plane, and of the W after.
template <class C, int HH, int PP, int p0, class Rows, class Weights, class Fetch, class Put>
void sum_planes(const Rows& rows, int n_pairs, const WordUnit& unit, const Weights& weights, Fetch& ahead, int share,
                Put&& put) {
  WordSums<C, HH, PP, p0, Weights::stride> sums;
  int pair = 0;
  for (; pair + AHEAD_PAIRS <= n_pairs; pair += AHEAD_PAIRS) {
    ahead.step(share);
#pragma GCC unroll 4
    for (int i = 0; i < AHEAD_PAIRS; ++i)
      sums.add(rows.load(pair + i, unit.byte, unit.n_bytes), weights.of_plane, pair + i);
  }
  for (; pair < n_pairs; ++pair) sums.add(rows.load(pair, unit.byte, unit.n_bytes), weights.of_plane, pair);
#pragma GCC unroll 4
  for (int p = 0; p < PP; ++p)
#pragma GCC unroll 5
    for (int h = 0; h < HH; ++h) {
      Vec low, high;
      in_turn(pairs_to_float(sums.sum[p][0][h]), pairs_to_float(sums.sum[p][1][h]), &low, &high);
      put(p0 + p, h, low, high);
    }
}

// How many planes one pass takes: as many as registers hold sums of.
template <class C, int HH>
constexpr int planes_at_once() {
  constexpr int room = (W == 16 ? 20 : 10) / (2 * HH);
  return room >= C::planes ? C::planes : room >= 2 ? 2 : 1;
}

// The same for all planes, a few at once.
template <class C, int HH, int p0 = 0, class Rows, class Weights, class Fetch, class Put>
void sum_unit(const Rows& rows, int n_pairs, const WordUnit& unit, const Weights& weights, Fetch& ahead, int share,
              Put&& put) {
  constexpr int PP = planes_at_once<C, HH>();
  sum_planes<C, HH, PP, p0>(rows, n_pairs, unit, weights, ahead, share, put);
  if constexpr (p0 + PP < C::planes) sum_unit<C, HH, p0 + PP>(rows, n_pairs, unit, weights, ahead, share, put);
}

// How often `sum_unit` prefetches a share, over all units of n rows.
template <class C, int HH>
int n_shares(int row_bytes, int n) {
  const int passes = (row_bytes + UNIT - 1) / UNIT * (C::planes / planes_at_once<C, HH>());
  return std::max(1, passes * (n / (2 * AHEAD_PAIRS)));
}

// What sums of a unit become in a row of a plane: factor x + base, added to what is there or in its place.
template <bool ADD>
SPARQ_INLINE void put_unit(const WordUnit& unit, Vec low, Vec high, float factor, float base, float* row) {
  const Vec by = set1(factor), more = set1(base);
  low = fma(low, by, more), high = fma(high, by, more);
  float* const to = row + unit.byte;
  if (unit.first == 0 && unit.n_bytes == UNIT) {
    store(to, ADD ? add(load(to), low) : low);
    store(to + W, ADD ? add(load(to + W), high) : high);
    return;
  }
  alignas(64) float codes[2 * W];
  store(codes, low), store(codes + W, high);
  for (int i = unit.first; i < unit.n_bytes; ++i) to[i] = ADD ? to[i] + codes[i] : codes[i];
}

}  // namespace sparq
