// Vectors of Arm's Advanced SIMD (NEON), as every 64-bit Arm CPU has it: 8 floats, or 8 pairs of 16-bit numbers, in two
// registers each. There are 32 of 16 bytes, so kernels find room for as many sums as on AVX2. avx512.h says what the
// functions mean.
#pragma once

#include <arm_neon.h>

#include <array>
#include <cstring>

#include "base/paged.h"

namespace sparq {

#define SPARQ_INLINE inline __attribute__((always_inline))

struct Vec {
  float32x4_t low, high;
};
constexpr int W = 8;

SPARQ_INLINE Vec set1(float x) { return {vdupq_n_f32(x), vdupq_n_f32(x)}; }
SPARQ_INLINE Vec zero() { return set1(0.0f); }
SPARQ_INLINE Vec load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }
SPARQ_INLINE void store(float* p, Vec v) { vst1q_f32(p, v.low), vst1q_f32(p + 4, v.high); }
SPARQ_INLINE Vec add(Vec a, Vec b) { return {vaddq_f32(a.low, b.low), vaddq_f32(a.high, b.high)}; }
SPARQ_INLINE Vec sub(Vec a, Vec b) { return {vsubq_f32(a.low, b.low), vsubq_f32(a.high, b.high)}; }
SPARQ_INLINE Vec mul(Vec a, Vec b) { return {vmulq_f32(a.low, b.low), vmulq_f32(a.high, b.high)}; }
SPARQ_INLINE Vec div(Vec a, Vec b) { return {vdivq_f32(a.low, b.low), vdivq_f32(a.high, b.high)}; }
SPARQ_INLINE Vec fma(Vec a, Vec b, Vec c) {
  return {vfmaq_f32(c.low, a.low, b.low), vfmaq_f32(c.high, a.high, b.high)};
}
// Not FMAX and FMIN, which return NaN where either is.
SPARQ_INLINE float32x4_t larger(float32x4_t a, float32x4_t b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
SPARQ_INLINE float32x4_t smaller(float32x4_t a, float32x4_t b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
SPARQ_INLINE Vec max(Vec a, Vec b) { return {larger(a.low, b.low), larger(a.high, b.high)}; }
SPARQ_INLINE Vec min(Vec a, Vec b) { return {smaller(a.low, b.low), smaller(a.high, b.high)}; }
SPARQ_INLINE Vec round_even(Vec a) { return {vrndnq_f32(a.low), vrndnq_f32(a.high)}; }
SPARQ_INLINE float reduce_add(Vec a) { return vaddvq_f32(vaddq_f32(a.low, a.high)); }
SPARQ_INLINE float reduce_max(Vec a) {
  float32x4_t x = larger(a.low, a.high);
  x = larger(x, vextq_f32(x, x, 2));
  return vgetq_lane_f32(larger(x, vextq_f32(x, x, 1)), 0);
}

// Lanes, all bits set or none, to one bit each, and back.
struct Lanes {
  uint32x4_t low, high;
};
SPARQ_INLINE Lanes bit_of_lane() { return {uint32x4_t{1, 2, 4, 8}, uint32x4_t{16, 32, 64, 128}}; }
SPARQ_INLINE unsigned to_bits(Lanes x) {
  const Lanes bit = bit_of_lane();
  return vaddvq_u32(vorrq_u32(vandq_u32(x.low, bit.low), vandq_u32(x.high, bit.high)));
}
SPARQ_INLINE Lanes to_lanes(unsigned bits) {
  const Lanes bit = bit_of_lane();
  return {vtstq_u32(vdupq_n_u32(bits), bit.low), vtstq_u32(vdupq_n_u32(bits), bit.high)};
}
SPARQ_INLINE Vec select(Lanes on, Vec a, Vec b) {
  return {vbslq_f32(on.low, a.low, b.low), vbslq_f32(on.high, a.high, b.high)};
}
SPARQ_INLINE Lanes lanes_greater(Vec a, Vec b) { return {vcgtq_f32(a.low, b.low), vcgtq_f32(a.high, b.high)}; }
SPARQ_INLINE unsigned greater(Vec a, Vec b) { return to_bits(lanes_greater(a, b)); }
SPARQ_INLINE unsigned equal(Vec a, Vec b) { return to_bits({vceqq_f32(a.low, b.low), vceqq_f32(a.high, b.high)}); }
SPARQ_INLINE Vec select(unsigned bits, Vec a, Vec b) { return select(to_lanes(bits), a, b); }

// Numbers of the set bits first: lanes of each of 256 choices, a byte each.
constexpr auto FRONT_ORDER = [] {
  std::array<std::array<uint8_t, 8>, 256> order{};
  for (int bits = 0; bits < 256; ++bits)
    for (int lane = 0, n = 0; lane < 8; ++lane)
      if (bits >> lane & 1) order[bits][n++] = (uint8_t)lane;
  return order;
}();
SPARQ_INLINE Vec compress(unsigned bits, Vec a) {
  const uint8x16_t lanes = vcombine_u8(vld1_u8(FRONT_ORDER[bits].data()), vdup_n_u8(0));
  const uint8x16x2_t table{{vreinterpretq_u8_f32(a.low), vreinterpretq_u8_f32(a.high)}};
  const uint8x16_t low{0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3}, high = vaddq_u8(low, vdupq_n_u8(4));
  const uint8x16_t byte{0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3};
  const auto part = [&](uint8x16_t which) __attribute__((always_inline)) {
    const uint8x16_t at = vorrq_u8(vshlq_n_u8(vqtbl1q_u8(lanes, which), 2), byte);
    return vreinterpretq_f32_u8(vqtbl2q_u8(table, at));
  };
  return {part(low), part(high)};
}
SPARQ_INLINE void store_numbers(int32_t* to, int first, unsigned bits) {
  const int32x4_t from = vdupq_n_s32(first);
  const int16x8_t lanes = vreinterpretq_s16_u16(vmovl_u8(vld1_u8(FRONT_ORDER[bits].data())));
  vst1q_s32(to, vaddw_s16(from, vget_low_s16(lanes))), vst1q_s32(to + 4, vaddw_high_s16(from, lanes));
}
// Less one a lane.
struct GreaterCount {
  uint32x4_t low = vdupq_n_u32(0), high = vdupq_n_u32(0);
  SPARQ_INLINE void add(Vec a, Vec than) {
    const Lanes on = lanes_greater(a, than);
    low = vaddq_u32(low, on.low), high = vaddq_u32(high, on.high);
  }
  SPARQ_INLINE int sum() const { return -(int)vaddvq_u32(vaddq_u32(low, high)); }
};

SPARQ_INLINE Vec widen_bf16(uint16x8_t x) {
  return {vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(x), 16)), vreinterpretq_f32_u32(vshll_high_n_u16(x, 16))};
}
SPARQ_INLINE Vec widen_fp16(uint16x8_t x) {
  const float16x8_t half = vreinterpretq_f16_u16(x);
  return {vcvt_f32_f16(vget_low_f16(half)), vcvt_high_f32_f16(half)};
}
SPARQ_INLINE uint16x8_t to_fp16(Vec v) { return vreinterpretq_u16_f16(vcvt_high_f16_f32(vcvt_f16_f32(v.low), v.high)); }
SPARQ_INLINE Vec load(const fp16* p) { return widen_fp16(vld1q_u16(&p->bits)); }
SPARQ_INLINE Vec load(const bf16* p) { return widen_bf16(vld1q_u16(&p->bits)); }
SPARQ_INLINE void store(fp16* p, Vec v) { vst1q_u16(&p->bits, to_fp16(v)); }
// The nearest number of fp16 may be on the wrong side; then its neighbour is wanted. Bits of a number grow away from
// zero.
SPARQ_INLINE uint16x8_t narrow(Lanes x) { return vcombine_u16(vmovn_u32(x.low), vmovn_u32(x.high)); }
SPARQ_INLINE void store_up(fp16* p, Vec v) {
  const uint16x8_t nearest = to_fp16(v), below = narrow(lanes_greater(v, widen_fp16(nearest)));
  const uint16x8_t negative = vcltzq_s16(vreinterpretq_s16_u16(nearest));
  const uint16x8_t step = vorrq_u16(negative, vdupq_n_u16(1));  // 1 or -1
  vst1q_u16(&p->bits, vaddq_u16(nearest, vandq_u16(below, step)));
}
SPARQ_INLINE void store_down(fp16* p, Vec v) {
  store_up(p, {vnegq_f32(v.low), vnegq_f32(v.high)});
  vst1q_u16(&p->bits, veorq_u16(vld1q_u16(&p->bits), vdupq_n_u16(0x8000)));
}
SPARQ_INLINE void store(bf16* p, Vec v) {
  const auto part = [](float32x4_t x) __attribute__((always_inline)) {
    const uint32x4_t bits = vreinterpretq_u32_f32(x), odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t even = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    return vbslq_u32(vceqq_f32(x, x), even, vdupq_n_u32(0x7fc00000));
  };
  vst1q_u16(&p->bits, vshrn_high_n_u32(vshrn_n_u32(part(v.low), 16), part(v.high), 16));
}
SPARQ_INLINE void store_upper(bf16* p, Vec v) {
  const uint32x4_t low = vreinterpretq_u32_f32(v.low), high = vreinterpretq_u32_f32(v.high);
  vst1q_u16(&p->bits, vshrn_high_n_u32(vshrn_n_u32(low, 16), high, 16));
}
SPARQ_INLINE Vec up_to_bf16(Vec x) {
  const auto part = [](float32x4_t y) __attribute__((always_inline)) {
    const uint32x4_t up = vaddq_u32(vreinterpretq_u32_f32(y), vdupq_n_u32(0xffff));
    return vreinterpretq_f32_u32(vandq_u32(up, vdupq_n_u32(0xffff0000)));
  };
  return {part(x.low), part(x.high)};
}

SPARQ_INLINE Vec load(const int32_t* p) { return {vcvtq_f32_s32(vld1q_s32(p)), vcvtq_f32_s32(vld1q_s32(p + 4))}; }
SPARQ_INLINE Lanes lanes_above(const int32_t* p, int bar) {
  return {vcgtq_s32(vld1q_s32(p), vdupq_n_s32(bar)), vcgtq_s32(vld1q_s32(p + 4), vdupq_n_s32(bar))};
}
SPARQ_INLINE unsigned above(const int32_t* p, int bar) { return to_bits(lanes_above(p, bar)); }
SPARQ_INLINE Vec select_above(const int32_t* p, int bar, Vec a, Vec b) { return select(lanes_above(p, bar), a, b); }

SPARQ_INLINE Vec widen_bytes(uint8x8_t bytes) {
  const uint16x8_t x = vmovl_u8(bytes);
  return {vcvtq_f32_u32(vmovl_u16(vget_low_u16(x))), vcvtq_f32_u32(vmovl_high_u16(x))};
}
template <bool has_sign>
SPARQ_INLINE Vec load_bytes(const uint8_t* from) {
  if constexpr (!has_sign) return widen_bytes(vld1_u8(from));
  const int16x8_t x = vmovl_s8(vreinterpret_s8_u8(vld1_u8(from)));
  return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(x))), vcvtq_f32_s32(vmovl_high_s16(x))};
}
SPARQ_INLINE void load_nibbles(const uint8_t* from, Vec* low, Vec* high) {
  const uint8x8_t pair = vld1_u8(from);
  *low = widen_bytes(vand_u8(pair, vdup_n_u8(15))), *high = widen_bytes(vshr_n_u8(pair, 4));
}
SPARQ_INLINE void store_bytes(uint8_t* to, Vec x) {
  const int16x8_t words = vmovn_high_s32(vmovn_s32(vcvtq_s32_f32(x.low)), vcvtq_s32_f32(x.high));
  vst1_u8(to, vreinterpret_u8_s8(vmovn_s16(words)));
}

SPARQ_INLINE Vec reduce_each(const Vec* a) {
  float32x4_t x[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) x[i] = vaddq_f32(a[i].low, a[i].high);
  return {vpaddq_f32(vpaddq_f32(x[0], x[1]), vpaddq_f32(x[2], x[3])),
          vpaddq_f32(vpaddq_f32(x[4], x[5]), vpaddq_f32(x[6], x[7]))};
}

SPARQ_INLINE void split(Vec x, Vec* whole, Vec* part) {
  x = max(set1(-160.0f), x);
  *whole = {vrndmq_f32(x.low), vrndmq_f32(x.high)}, *part = sub(x, *whole);
}
// In two factors, so that each is a normal number and the product underflows gradually.
SPARQ_INLINE Vec scale_by_power(Vec p, Vec n) {
  const auto part = [](float32x4_t x, float32x4_t power) __attribute__((always_inline)) {
    const int32x4_t whole = vcvtnq_s32_f32(power), half = vshrq_n_s32(whole, 1), bias = vdupq_n_s32(127);
    const int32x4_t rest = vsubq_s32(whole, half);
    x = vmulq_f32(x, vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(half, bias), 23)));
    return vmulq_f32(x, vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(rest, bias), 23)));
  };
  return {part(p.low, n.low), part(p.high, n.high)};
}

inline float to_float(fp16 x) {
  __fp16 y;
  memcpy(&y, &x, 2);
  return y;
}

SPARQ_INLINE void prefetch_l2(const void* p) { __builtin_prefetch(p, 0, 2); }

}  // namespace sparq
