// Rows of codes turned over, so that a lane is a token: W tokens at a time.
#pragma once

#include <algorithm>

#include "base/words.h"
#include "codes/code_rows.h"

namespace sparq {

constexpr int DOT_BYTES = 512;     // of a row at most
constexpr int MAX_DOT_PLANES = 2;  // of a byte

// Rows may be read up to the next 16 bytes; what follows K in a page are scales or V.
inline bool can_turn(const CodeShape& shape) { return shape.row_bytes() <= DOT_BYTES && shape.row_bytes() % 8 == 0; }

// Dwords first .. last of rows, whose codes belong to one group in each plane.
struct Segment {
  int first, last;
  int group[MAX_DOT_PLANES];  // of each plane
};

// Cuts rows into segments; returns how many.
template <int planes>
int cut_segments(const CodeShape& shape, Segment* to) {
  int n = 0;
  const int n_bytes = shape.row_bytes();
  for (int byte = 0, last; byte < n_bytes; byte = last, ++n) {
    last = n_bytes;
    for (int plane = 0; plane < planes; ++plane) {
      const int code = plane * n_bytes + byte;
      last = std::min(last, byte + shape.group - code % shape.group);
      to[n].group[plane] = code / shape.group;
    }
    to[n].first = byte / 4, to[n].last = last / 4;
  }
  return n;
}

// Scales of W rows, a lane each: to[g] = step and zero of group g, or step and anything where there is no zero.
SPARQ_INLINE void turn_scales_over(const CodeShape& shape, const uint8_t* const* rows, Words* to) {
  const int n_groups = shape.n_groups();
  if (shape.has_zero && n_groups > 1) {  // those of V follow, so whole quads may be read
    for (int g = 0; g < n_groups; g += 4) turn_over(rows, 4 * g, to + g);
    return;
  }
  alignas(64) int32_t only[W];
  const auto copy = [&](auto number, int g) {
    for (int i = 0; i < W; ++i)
      memcpy(&number, rows[i] + g * sizeof(number), sizeof(number)), only[i] = (int32_t)number;
    to[g] = load_words(only);
  };
  for (int g = 0; g < n_groups; ++g) {
    if (shape.has_zero)
      copy(uint32_t{}, g);
    else
      copy(uint16_t{}, g);
  }
}

// The pairs of CodesQuery::pairs of one head: word(code) of those codes that share a dword of a row.
template <class F>
void write_pairs(const CodeShape& key, F&& word, int32_t* to) {
  for (int byte = 0; byte < key.row_bytes(); byte += 4)
    for (int i = 0; i < 4; ++i) {
      const int code = code_at(key, byte, i);
      *to++ = (int32_t)((uint32_t)word(code) | (uint32_t)word(code + 2) << 16);
    }
}

// Codes and scales of W rows, the last one repeated.
struct LaneRows {
  const uint8_t *codes[W], *scales[W];

  LaneRows(const CodeRows& rows, int first) {
    for (int i = 0; i < W; ++i) {
      const int row = std::min(first + i, rows.n - 1);
      codes[i] = rows.codes[row], scales[i] = rows.scales[row];
    }
  }
};

}  // namespace sparq
