// Byte, word and dword matrices turned over, 16 bytes of a row at a time.
#pragma once

#include <cstdint>
#include <cstring>

#include "base/simd.h"

namespace sparq {

// to[c][r] = from[r][c] for a square of 16 / bytes elements of `bytes` each; strides in bytes.
template <int bytes>
inline void transpose_square(const uint8_t* from, int64_t from_stride, uint8_t* to, int64_t to_stride) {
  constexpr int n = 16 / bytes;
  Bytes x[n], y[n];
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) x[i] = load_16_bytes(from + i * from_stride);
    // Rows i and i + n/2 are interleaved: log2(n) such steps turn the square over.
#pragma GCC unroll 4
  for (int step = 1; step < n; step *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < n / 2; ++i) interleave<bytes>(x[i], x[i + n / 2], y[2 * i], y[2 * i + 1]);
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) x[i] = y[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) store_16_bytes(to + i * to_stride, x[i]);
}

// to [columns, rows] = the transpose of from [rows, columns]; both sizes are multiples of 16 / bytes.
template <int bytes>
inline void transpose(const uint8_t* from, int64_t from_stride, int rows, int columns, uint8_t* to, int64_t to_stride) {
  constexpr int n = 16 / bytes;
  for (int c = 0; c < columns; c += n)
    for (int r = 0; r < rows; r += n)
      transpose_square<bytes>(from + r * from_stride + c * bytes, from_stride, to + c * to_stride + r * bytes,
                              to_stride);
}

// The same for bytes and any number of rows: what is read of `from` are its rows rounded up to 16. Columns as above.
inline void transpose_bytes(const uint8_t* from, int64_t from_stride, int rows, int columns, uint8_t* to,
                            int64_t to_stride) {
  const int whole = rows / 16 * 16;
  transpose<1>(from, from_stride, whole, columns, to, to_stride);
  for (int c = 0; whole < rows && c < columns; c += 16) {
    uint8_t square[256];
    transpose_square<1>(from + whole * from_stride + c, from_stride, square, 16);
    for (int i = 0; i < 16; ++i) memcpy(to + (c + i) * to_stride + whole, square + 16 * i, rows - whole);
  }
}

}  // namespace sparq
