// The scan of a ranking copy with weights of 16 bits, two channels per instruction, where the model's type has no more
// than 16 bits either: codes/int16_weights.h says by how much the weights (query times step) are off.
#pragma once

#include "codes/int16_weights.h"
#include "rank/scan.h"

namespace sparq {

constexpr int SCAN_PAIRS = SUM_ROWS / 2 + 8;  // between the weights of two rows: not a power of two

// The weights of the rows of scores, of one page.
struct ScanWeights {
  const int16_t* words;  // [n_rows, 2 SCAN_PAIRS]
  const GroupWeights* rows;
};

inline bool can_scan_int16(int r, int row_bytes) {
  return r <= SUM_ROWS && row_bytes >= LEAST_ROW && row_bytes % 2 == 0;
}

// Copies the chosen rows of a ranking copy, pair by pair, words beside each other: see `stage_rows`. The second row of
// an odd last pair is the first one again, with weight 0. 64 bytes after the last pair may be overwritten.
inline void stage_word_pairs(const uint8_t* copy, const int32_t* row_offsets, int r, int row_bytes, uint8_t* to) {
  for (int i = 0; i < r; i += 2, to += 2 * row_bytes) {
    const uint8_t *even = copy + row_offsets[i], *odd = copy + row_offsets[std::min(i + 1, r - 1)];
    for (int byte = 0; byte < row_bytes; byte += UNIT) {
      const WordUnit unit = WordUnit::at(byte, row_bytes);
      store_words(to + 2 * unit.byte, load_pairs(even + unit.byte, odd + unit.byte, unit.n_bytes));
    }
  }
}

// The chosen rows of the next page, a few at a time.
struct RowsAhead {
  const Scan& scan;
  int next;

  explicit RowsAhead(const Scan& of) : scan(of), next(of.ahead != nullptr ? 0 : of.r) {}
  SPARQ_INLINE void step(int n) {
    for (const int stop = std::min(next + n, scan.r); next < stop; ++next) scan.prefetch_row(next);
  }
};

// scores[h][slot] of a page, from staged pairs.
template <class C, int HH>
void scan_heads_int16(const Scan& scan, const ScanWeights& weights, float* scores, int stride) {
  const int n_pairs = (scan.r + 1) / 2, n_shares_of_page = n_shares<C, HH>(scan.row_bytes, scan.r);
  const StagedRows rows{scan.rows, 2 * scan.row_bytes};
  PairWeights<C::planes, SCAN_PAIRS> pairs;
  for (auto& plane : pairs.of_plane) plane = (const int32_t*)weights.words;
  RowsAhead ahead(scan);
  const int share = (scan.r + n_shares_of_page - 1) / n_shares_of_page;
  for (int byte = 0; byte < scan.row_bytes; byte += UNIT) {
    const WordUnit unit = WordUnit::at(byte, scan.row_bytes);
    sum_unit<C, HH>(rows, n_pairs, unit, pairs, ahead, share, [&](int p, int h, Vec low, Vec high) {
      const GroupWeights& by = weights.rows[h];
      put_unit<false>(unit, low, high, by.unit, by.base, scores + (size_t)h * stride + p * scan.row_bytes);
    });
  }
  ahead.step(scan.r);
}

}  // namespace sparq
