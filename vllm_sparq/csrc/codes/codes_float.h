// Rows of codes on any instruction set, in any shape and type: four or sixteen of them become fp32 in L1, and are then
// used as rows of fp32.
#pragma once

#include "base/tile.h"
#include "codes/attend_codes.h"

namespace sparq {

// to [n] = zero + step * code of one row.
template <class T>
void decode_row(const CodeShape& shape, const uint8_t* codes, const uint8_t* scales, float* to) {
  const int n_bytes = shape.row_bytes(), mask = (1 << shape.bits) - 1, flip = shape.has_zero ? 0 : 128;
  for (int plane = 0; plane < shape.n_planes(); ++plane) {
    const int shift = plane * shape.bits;
    float* part = to + plane * n_bytes;
    for (int i = 0; i < n_bytes; ++i) part[i] = (float)((((codes[i] >> shift) & mask) ^ flip) - flip);
  }
  const T* numbers = (const T*)scales;
  for (int group = 0; group < shape.n_groups(); ++group, to += shape.group) {
    const float step = to_float(*numbers++), zero = shape.has_zero ? to_float(*numbers++) : 0.0f;
    for (int i = 0; i < shape.group; ++i) to[i] = zero + step * to[i];
  }
}

// Fp32 copies of a few rows, the last one repeated.
template <class T, int count>
struct DecodedRows {
  const uint8_t* at[count];

  DecodedRows(const CodeShape& shape, const CodeRows& rows, int first, float* memory) {
    for (int i = 0; i < count; ++i) {
      if (first + i < rows.n)
        decode_row<T>(shape, rows.codes[first + i], rows.scales[first + i], memory + (size_t)i * shape.n);
      at[i] = (const uint8_t*)(memory + (size_t)std::min(i, rows.n - 1 - first) * shape.n);
    }
  }
  const float* row(int i) const { return (const float*)at[i]; }
};

inline float* decode_memory(const CodeShape& shape, int n_rows) {
  thread_local Scratch scratch;
  return scratch.arena().take<float>((size_t)n_rows * shape.n);
}

template <class T>
void dot_float(const CodeShape& shape, const CodesQuery& query, int n_heads, const CodeRows& rows, float* logits,
               int stride, Ahead& ahead) {
  float* const memory = decode_memory(shape, 16);
  const int share = ahead.share((rows.n + 15) / 16);
  for (int t = 0; t < rows.n; t += 16) {
    const DecodedRows<T, 16> keys(shape, rows, t, memory);
    ahead.step(share);
    for (int h = 0; h < n_heads; ++h)
      dot_tile<FloatMac<float>, float, 1, 0>(query.whole + (size_t)h * query.stride, shape.n, keys.at, 16, nullptr,
                                             logits + (size_t)h * stride + t, stride);
  }
}

template <class T>
void mix_float(const CodeShape& shape, const CodeRows& rows, const float* x, int x_stride, int n_heads, float* out,
               int out_stride, Ahead& ahead) {
  float* const memory = decode_memory(shape, 4);
  const int share = ahead.share((rows.n + 3) / 4);
  for (int first = 0; first < rows.n; first += 4) {
    const DecodedRows<T, 4> four(shape, rows, first, memory);
    ahead.step(share);
    for (int h = 0; h < n_heads; ++h) {
      Vec weight[4];
      for (int i = 0; i < 4; ++i) weight[i] = set1(first + i < rows.n ? x[(size_t)h * x_stride + first + i] : 0.0f);
      float* to = out + (size_t)h * out_stride;
      for (int c = 0; c < shape.n; c += W) {
        const Vec even = fma(weight[0], load(four.row(0) + c), mul(weight[1], load(four.row(1) + c)));
        const Vec odd = fma(weight[2], load(four.row(2) + c), mul(weight[3], load(four.row(3) + c)));
        store(to + c, add(load(to + c), add(even, odd)));
      }
    }
  }
}

}  // namespace sparq
