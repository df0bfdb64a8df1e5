// The rest of neon.h: 16-bit numbers, and matrices of bytes.
#pragma once

#include "base/isa/neon.h"

namespace sparq {

// W pairs, the first of each in one register and the second in another: a multiply-add into 32 bits takes half a
// register, so both of a pair are added to the same lane without being put beside each other. (In memory they are.)
// Sums of pairs are W numbers of 32 bits in their order.
struct Words {
  int16x8_t first, second;
};
// One pair for all lanes: an operand by element, which costs no register.
struct Pair {
  int16x4_t both;
};

SPARQ_INLINE Words zero_words() { return {vdupq_n_s16(0), vdupq_n_s16(0)}; }
SPARQ_INLINE Words load_words(const void* p) {
  const int16x8x2_t x = vld2q_s16((const int16_t*)p);
  return {x.val[0], x.val[1]};
}
SPARQ_INLINE void store_words(void* p, Words x) { vst2q_s16((int16_t*)p, int16x8x2_t{{x.first, x.second}}); }
SPARQ_INLINE Pair set_pair(int32_t pair) { return {vreinterpret_s16_s32(vdup_n_s32(pair))}; }
SPARQ_INLINE Words set_word(int x) { return {vdupq_n_s16((int16_t)x), vdupq_n_s16((int16_t)x)}; }
SPARQ_INLINE Words and_words(Words a, Words b) { return {vandq_s16(a.first, b.first), vandq_s16(a.second, b.second)}; }
SPARQ_INLINE int32x4_t as_sums(int16x8_t x) { return vreinterpretq_s32_s16(x); }
SPARQ_INLINE int16x8_t as_words(int32x4_t x) { return vreinterpretq_s16_s32(x); }
SPARQ_INLINE Words add_pairs(Words a, Words b) {
  return {as_words(vaddq_s32(as_sums(a.first), as_sums(b.first))),
          as_words(vaddq_s32(as_sums(a.second), as_sums(b.second)))};
}
template <int n>
SPARQ_INLINE Words shift_right(Words x) {
  const auto part = [](int16x8_t y) __attribute__((always_inline)) {
    return vreinterpretq_s16_u16(vshrq_n_u16(vreinterpretq_u16_s16(y), n));
  };
  return {part(x.first), part(x.second)};
}
SPARQ_INLINE Words signed_low(Words x) {
  return {vshrq_n_s16(vshlq_n_s16(x.first, 8), 8), vshrq_n_s16(vshlq_n_s16(x.second, 8), 8)};
}
SPARQ_INLINE Words signed_high(Words x) { return {vshrq_n_s16(x.first, 8), vshrq_n_s16(x.second, 8)}; }
SPARQ_INLINE Words add_products(Words sum, Words a, Words b) {
  int32x4_t low = as_sums(sum.first), high = as_sums(sum.second);
  low = vmlal_s16(low, vget_low_s16(a.first), vget_low_s16(b.first)), high = vmlal_high_s16(high, a.first, b.first);
  low = vmlal_s16(low, vget_low_s16(a.second), vget_low_s16(b.second)), high = vmlal_high_s16(high, a.second, b.second);
  return {as_words(low), as_words(high)};
}
SPARQ_INLINE Words add_products(Words sum, Words a, Pair b) {
  int32x4_t low = as_sums(sum.first), high = as_sums(sum.second);
  low = vmlal_lane_s16(low, vget_low_s16(a.first), b.both, 0), high = vmlal_high_lane_s16(high, a.first, b.both, 0);
  low = vmlal_lane_s16(low, vget_low_s16(a.second), b.both, 1), high = vmlal_high_lane_s16(high, a.second, b.both, 1);
  return {as_words(low), as_words(high)};
}
SPARQ_INLINE Vec pairs_to_float(Words x) { return {vcvtq_f32_s32(as_sums(x.first)), vcvtq_f32_s32(as_sums(x.second))}; }
SPARQ_INLINE Vec low_as_bf16(Words x) { return widen_bf16(vreinterpretq_u16_s16(x.first)); }
SPARQ_INLINE Vec high_as_bf16(Words x) { return widen_bf16(vreinterpretq_u16_s16(x.second)); }
SPARQ_INLINE Vec low_as_fp16(Words x) { return widen_fp16(vreinterpretq_u16_s16(x.first)); }
SPARQ_INLINE Vec high_as_fp16(Words x) { return widen_fp16(vreinterpretq_u16_s16(x.second)); }
SPARQ_INLINE Words to_words(Vec low, Vec high) {
  const auto narrow = [](Vec x) __attribute__((always_inline)) {
    return vqmovn_high_s32(vqmovn_s32(vcvtnq_s32_f32(x.low)), vcvtnq_s32_f32(x.high));
  };
  const int16x8_t a = narrow(low), b = narrow(high);
  return {vuzp1q_s16(a, b), vuzp2q_s16(a, b)};
}
SPARQ_INLINE void in_turn(Vec even, Vec odd, Vec* low, Vec* high) {
  *low = {vzip1q_f32(even.low, odd.low), vzip2q_f32(even.low, odd.low)};
  *high = {vzip1q_f32(even.high, odd.high), vzip2q_f32(even.high, odd.high)};
}
constexpr int LEAST_ROW = 2 * W;
SPARQ_INLINE Words load_pairs(const uint8_t* even, const uint8_t* odd, int) {
  return {vreinterpretq_s16_u8(vld1q_u8(even)), vreinterpretq_s16_u8(vld1q_u8(odd))};
}
SPARQ_INLINE void turn_over(const uint8_t* const* rows, int byte, Words* to) {
  int32x4_t x[8];  // dword i of rows 0 .. 3, then of rows 4 .. 7
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    int32x4_t a[4], b[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) a[i] = vreinterpretq_s32_u8(vld1q_u8(rows[4 * half + i] + byte));
    b[0] = vzip1q_s32(a[0], a[2]), b[1] = vzip2q_s32(a[0], a[2]);
    b[2] = vzip1q_s32(a[1], a[3]), b[3] = vzip2q_s32(a[1], a[3]);
    x[4 * half] = vzip1q_s32(b[0], b[2]), x[4 * half + 1] = vzip2q_s32(b[0], b[2]);
    x[4 * half + 2] = vzip1q_s32(b[1], b[3]), x[4 * half + 3] = vzip2q_s32(b[1], b[3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const int16x8_t low = as_words(x[i]), high = as_words(x[4 + i]);
    to[i] = {vuzp1q_s16(low, high), vuzp2q_s16(low, high)};
  }
}
SPARQ_INLINE void gather_pairs(const uint8_t* pairs, const int32_t* at, Vec* first, Vec* second) {
  alignas(16) int32_t both[W];
  for (int i = 0; i < W; ++i) memcpy(both + i, pairs + 4 * (int64_t)at[i], 4);
  const Words words = load_words(both);
  *first = low_as_fp16(words), *second = high_as_fp16(words);
}

SPARQ_INLINE Words in_this_order(Words x) {
  asm volatile("" : "+w"(x.first), "+w"(x.second));
  return x;
}
SPARQ_INLINE Vec rounded(Vec x) {
  asm("" : "+w"(x.low), "+w"(x.high));
  return x;
}

SPARQ_INLINE void copy_32_bytes(uint8_t* to, const uint8_t* from) {
  vst1q_u8(to, vld1q_u8(from)), vst1q_u8(to + 16, vld1q_u8(from + 16));
}

using Bytes = uint8x16_t;

SPARQ_INLINE Bytes load_16_bytes(const uint8_t* p) { return vld1q_u8(p); }
SPARQ_INLINE void store_16_bytes(uint8_t* p, Bytes x) { vst1q_u8(p, x); }
SPARQ_INLINE Bytes cut_bytes(Bytes x, int shift, int mask) {
  return vandq_u8(vshlq_u8(x, vdupq_n_s8((int8_t)-shift)), vdupq_n_u8((uint8_t)mask));
}
template <int bytes>
SPARQ_INLINE void interleave(Bytes a, Bytes b, Bytes& low, Bytes& high) {
  if constexpr (bytes == 1) {
    low = vzip1q_u8(a, b), high = vzip2q_u8(a, b);
  } else if constexpr (bytes == 2) {
    const uint16x8_t x = vreinterpretq_u16_u8(a), y = vreinterpretq_u16_u8(b);
    low = vreinterpretq_u8_u16(vzip1q_u16(x, y)), high = vreinterpretq_u8_u16(vzip2q_u16(x, y));
  } else {
    const uint32x4_t x = vreinterpretq_u32_u8(a), y = vreinterpretq_u32_u8(b);
    low = vreinterpretq_u8_u32(vzip1q_u32(x, y)), high = vreinterpretq_u8_u32(vzip2q_u32(x, y));
  }
}

SPARQ_INLINE void transpose_8x8(const float* from, ptrdiff_t from_stride, float* to, ptrdiff_t to_stride) {
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 8; j += 4) {
      float32x4_t a[4];
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) a[k] = vld1q_f32(from + (i + k) * from_stride + j);
      const float32x4_t even = vzip1q_f32(a[0], a[2]), odd = vzip1q_f32(a[1], a[3]);
      const float32x4_t even_high = vzip2q_f32(a[0], a[2]), odd_high = vzip2q_f32(a[1], a[3]);
      vst1q_f32(to + j * to_stride + i, vzip1q_f32(even, odd));
      vst1q_f32(to + (j + 1) * to_stride + i, vzip2q_f32(even, odd));
      vst1q_f32(to + (j + 2) * to_stride + i, vzip1q_f32(even_high, odd_high));
      vst1q_f32(to + (j + 3) * to_stride + i, vzip2q_f32(even_high, odd_high));
    }
}

}  // namespace sparq
