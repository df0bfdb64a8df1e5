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
    if (shape.has_zero) copy(uint32_t{}, g);
    else copy(uint16_t{}, g);
  }
}

// Words 0 2 1 3 of four.
inline uint64_t middle_swapped(const uint16_t* words) {
  uint64_t x;
  memcpy(&x, words, 8);
  return (x & 0xffff00000000ffff) | (x >> 16 & 0xffff0000) | (x & 0xffff0000) << 16;
}

// The pairs of CodesQuery::pairs of one head, whose channels are `words`: beside each other are those whose codes share
// a dword of a row, in the order in which its nibbles are taken. Nibble i of both words of the dword at byte `byte`
// belongs to channels c and c + 2, where c = byte + i / 2, in the plane of odd nibbles if i is odd. (Int8: two nibbles
// to a code.)
inline void write_pairs(const CodeShape& key, const uint16_t* words, int32_t* to) {
  const uint16_t* const odd = words + (key.bits == 4 ? key.row_bytes() : 0);
  for (int byte = 0; byte < key.row_bytes(); byte += 4) {
    const uint64_t a = middle_swapped(words + byte), b = middle_swapped(odd + byte);
    const uint64_t pairs[2] = {(a & 0xffffffff) | b << 32, a >> 32 | b >> 32 << 32};
    memcpy(to + byte, pairs, sizeof(pairs));
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

// W rows turned over.
template <int planes>
struct TurnedRows {
  alignas(64) Words codes[DOT_BYTES / 4];
  alignas(64) Words scales[DOT_BYTES / 4];  // step and zero of each group, or step and anything where there is no zero
  Segment segments[DOT_BYTES / 4];
  int n_segments;

  explicit TurnedRows(const CodeShape& shape) : n_segments(cut_segments<planes>(shape, segments)) {}

  SPARQ_INLINE void take(const CodeShape& shape, const CodeRows& rows, int first) {
    const LaneRows lanes(rows, first);
    turn_scales_over(shape, lanes.scales, scales);
    for (int byte = 0; byte < shape.row_bytes(); byte += 16) turn_over(lanes.codes, byte, codes + byte / 4);
  }
};

}  // namespace sparq
