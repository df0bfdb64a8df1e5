// Scores of a page from its ranking copy: for each chosen channel one row of codes times one weight per query head.
#pragma once

#include <algorithm>

#include "base/simd.h"

namespace sparq {

// How codes become floats: `vectors` vectors from a unit of a channel's row, which begins at code `from`, and the slot
// of each.

struct Int4Codes {
  static constexpr int vectors = 2;  // the low nibbles of bytes from.. are slots from.., the high ones N/2 later
  static SPARQ_INLINE int n_units(int n) { return (n / 2 + W - 1) / W; }
  // Where a row is no multiple of W the last unit reaches back, since slots after it are of high nibbles. (A row that
  // is shorter than W has one unit, whose high nibbles are stored last.)
  static SPARQ_INLINE int from(int u, int n) { return std::max(0, std::min(u * W, n / 2 - W)); }
  static SPARQ_INLINE int slot(int from, int v, int n) { return from + v * (n / 2); }
  static SPARQ_INLINE void expand(const uint8_t* row, int from, Vec* x) { load_nibbles(row + from, &x[0], &x[1]); }
};

struct Int8Codes {
  static constexpr int vectors = 1;
  static SPARQ_INLINE int n_units(int n) { return n / W; }
  static SPARQ_INLINE int from(int u, int) { return u * W; }
  static SPARQ_INLINE int slot(int from, int, int) { return from; }
  static SPARQ_INLINE void expand(const uint8_t* row, int from, Vec* x) { x[0] = load_bytes<false>(row + from); }
};

template <class T>
struct ModelCodes {
  static constexpr int vectors = 1;
  static SPARQ_INLINE int n_units(int n) { return n / W; }
  static SPARQ_INLINE int from(int u, int) { return u * W; }
  static SPARQ_INLINE int slot(int from, int, int) { return from; }
  static SPARQ_INLINE void expand(const uint8_t* row, int from, Vec* x) { x[0] = load((const T*)row + from); }
};

// The chosen rows of one page, and where those of the next page lie.
struct Scan {
  const uint8_t* rows;   // [r, row_bytes], staged in L1
  const uint8_t* ahead;  // ranking copy to prefetch from, or null
  const int32_t* row_offsets;
  int r;
  int row_bytes;
  int n;  // N

  SPARQ_INLINE void prefetch_row(int i) const {
    for (int byte = 0; byte < row_bytes; byte += 64) prefetch_l2(ahead + row_offsets[i] + byte);
  }
};

// Copies the chosen rows of a ranking copy next to each other. Loads that miss L1 wait behind prefetches under way, so
// they must not be mixed with those of the next page: scanning rows in place took 4.1 ns a token, from a staged copy
// 2.8 (int4, r = 32, one row of weights).
inline void stage_rows(const uint8_t* copy, const int32_t* row_offsets, int r, int row_bytes, uint8_t* to) {
  for (int i = 0; i < r; ++i, to += row_bytes) {
    const uint8_t* row = copy + row_offsets[i];
    int byte = 0;
    for (; byte + 32 <= row_bytes; byte += 32) copy_32_bytes(to + byte, row + byte);
    if (byte < row_bytes) memcpy(to + byte, row + byte, row_bytes - byte);
  }
}

// scores[h][slots of units u .. u + U] = bias[h] + sum over channels i of weights[h][i] code.
template <class Codes, int HH, int U>
SPARQ_INLINE void scan_units(const Scan& scan, int u, const float* weights, int weights_stride, const float* bias,
                             float* scores, int stride) {
  constexpr int V = Codes::vectors;
  Vec sum[HH][U * V];
#pragma GCC unroll 5
  for (int h = 0; h < HH; ++h)
#pragma GCC unroll 16
    for (int i = 0; i < U * V; ++i) sum[h][i] = set1(bias[h]);
  const bool prefetch = scan.ahead != nullptr && u == 0;
  for (int i = 0; i < scan.r; ++i) {
    const uint8_t* row = scan.rows + (size_t)i * scan.row_bytes;
    if (prefetch) scan.prefetch_row(i);
    Vec x[U * V];
#pragma GCC unroll 16
    for (int k = 0; k < U; ++k) Codes::expand(row, Codes::from(u + k, scan.n), x + k * V);
#pragma GCC unroll 5
    for (int h = 0; h < HH; ++h) {
      const Vec w = set1(weights[h * weights_stride + i]);
#pragma GCC unroll 16
      for (int k = 0; k < U * V; ++k) sum[h][k] = fma(w, x[k], sum[h][k]);
    }
  }
#pragma GCC unroll 2
  for (int v = 0; v < V; ++v)
#pragma GCC unroll 16
    for (int k = 0; k < U; ++k)
#pragma GCC unroll 5
      for (int h = 0; h < HH; ++h)
        store(scores + h * stride + Codes::slot(Codes::from(u + k, scan.n), v, scan.n), sum[h][k * V + v]);
}

template <class Codes, int HH>
void scan_heads(const Scan& scan, const float* weights, int weights_stride, const float* bias, float* scores,
                int stride) {
  constexpr int ACCUMULATORS = W == 16 ? 20 : 10;  // of 32 or 16 registers
  constexpr int U = std::min(W == 16 ? 8 : 4, ACCUMULATORS / (HH * Codes::vectors));
  const int n_units = Codes::n_units(scan.n);
  int u = 0;
  for (; u + U <= n_units; u += U) scan_units<Codes, HH, U>(scan, u, weights, weights_stride, bias, scores, stride);
  for (; u < n_units; ++u) scan_units<Codes, HH, 1>(scan, u, weights, weights_stride, bias, scores, stride);
}

}  // namespace sparq
