// Tokens of quantized pages as rows of numbers.
#pragma once

#include "base/scratch.h"
#include "base/transpose.h"
#include "codes/code_rows.h"

namespace sparq {

// Decodes K or V of one KV head, sixteen tokens at a time. T is the type of the scales. Where `fused`, fp32 is rounded
// once per element and not twice, as vllm_sparq/ops/codec.py does; of 16-bit scales every product is exact.
template <class T, bool fused = true>
class CodedTokens {
 public:
  static constexpr int TOKENS = 16;

  CodedTokens(const Pages& pages, Arena& arena)
      : pages_(pages),
        d_(pages.head_size),
        steps_(arena.take<float>(d_ + W)),
        zeros_(arena.take<float>(d_ + W)),
        codes_(arena.take<uint8_t>(TOKENS * d_)),
        channels_(arena.take<uint8_t>(channel_codes(pages))) {}

  // Rows [16, D] of the slots from `slot` (a multiple of 16) on, in fp32 or rounded to another type.
  template <class R>
  void keys(const uint8_t* page, int slot, R* to) {
    if (pages_.channel_keys) return channel_keys(page, slot, to);
    token_rows(CodeShape::keys(pages_), pages_.key, page, slot, to);
  }

  template <class R>
  void values(const uint8_t* page, int slot, R* to) {
    token_rows(CodeShape::values(pages_), pages_.value, page, slot, to);
  }

 private:
  static size_t channel_codes(const Pages& pages) {
    return pages.channel_keys ? (size_t)pages.head_size * pages.block_size : 0;
  }

  // Codes are channels of a token, and so are groups.
  template <class R>
  void token_rows(const CodeShape& shape, const Codes& part, const uint8_t* page, int slot, R* to) {
    for (int i = slot; i < slot + TOKENS; ++i, to += d_) {
      const uint8_t* codes = page + part.codes + i * part.code_stride;
      const T* numbers = (const T*)(page + part.scales + i * part.scale_stride);
      for (int group = 0; group < d_; group += shape.group) {
        fill(steps_ + group, shape.group, *numbers++);
        if (shape.has_zero) fill(zeros_ + group, shape.group, *numbers++);
      }
      if (!shape.has_zero) {
        for (int c = 0; c < d_; c += W) store(to + c, mul(load(steps_ + c), load_bytes<true>(codes + c)));
      } else {
        unpack(shape, codes, codes_);
        scale_codes(codes_, to);
      }
    }
  }

  // Codes are tokens of a channel, and so are groups. A page is unpacked once, for all its tokens.
  template <class R>
  void channel_keys(const uint8_t* page, int slot, R* to) {
    const int n = pages_.block_size;
    const CodeShape shape = CodeShape::keys(pages_);
    if (page != unpacked_) {
      for (int c = 0; c < d_; ++c)
        unpack(shape, page + pages_.key.codes + c * pages_.key.code_stride, channels_ + (size_t)c * n);
      unpacked_ = page;
    }
    transpose<1>(channels_ + slot, n, d_, TOKENS, codes_, d_);
    int group = -1;
    for (int i = 0; i < TOKENS; ++i, to += d_) {
      if (group != (slot + i) / shape.group) channel_scales(page, group = (slot + i) / shape.group);
      scale_codes(codes_ + (size_t)i * d_, to);
    }
  }

  void channel_scales(const uint8_t* page, int group) {
    const uint8_t* at = page + pages_.key.scales + 2 * sizeof(T) * group;
    for (int c = 0; c < d_; ++c, at += pages_.key.scale_stride) {
      steps_[c] = to_float(((const T*)at)[0]);
      zeros_[c] = to_float(((const T*)at)[1]);
    }
  }

  // n copies of a number, and up to W - 8 more.
  static void fill(float* to, int n, T number) {
    const Vec x = set1(to_float(number));
    for (int i = 0; i < n; i += W) store(to + i, x);
  }

  // to [n] = the packed codes of a row, one per byte.
  static void unpack(const CodeShape& shape, const uint8_t* __restrict packed, uint8_t* __restrict to) {
    const int n = shape.row_bytes(), mask = (1 << shape.bits) - 1;
    for (int shift = 0; shift < 8; shift += shape.bits, to += n) {
      int i = 0;
      for (; i + 16 <= n; i += 16) store_16_bytes(to + i, cut_bytes(load_16_bytes(packed + i), shift, mask));
      for (; i < n; ++i) to[i] = (uint8_t)(packed[i] >> shift & mask);
    }
  }

  template <class R>
  void scale_codes(const uint8_t* codes, R* to) const {
    for (int c = 0; c < d_; c += W) {
      const Vec code = load_bytes<false>(codes + c);
      if constexpr (fused) {
        store(to + c, fma(load(steps_ + c), code, load(zeros_ + c)));
      } else {
        store(to + c, add(rounded(mul(load(steps_ + c), code)), load(zeros_ + c)));
      }
    }
  }

  const Pages& pages_;
  const int d_;
  float *steps_, *zeros_;
  uint8_t *codes_, *channels_;
  const uint8_t* unpacked_ = nullptr;
};

}  // namespace sparq
