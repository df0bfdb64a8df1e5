// Tokens of channel-major K, one at a time: a token is a column of its page, whose rows are channels. For the few
// tokens that a list takes of a page; for more of them all rows are multiplied at once.
#pragma once

#include "base/tile.h"
#include "base/words.h"
#include "codes/code_rows.h"

namespace sparq {

// Where the code of a token lies in each row, and the scales of its group.
struct Column {
  int byte, shift, group;

  static Column of(const CodeShape& shape, int slot) {
    return {slot % shape.row_bytes(), slot / shape.row_bytes() * shape.bits, slot / shape.group};
  }
};

// to [D] = K of the token in a slot, in fp32.
template <class T>
void decode_column(const Pages& pages, const uint8_t* page, int slot, float* to) {
  constexpr int AT_ONCE = 64;  // channels
  const CodeShape shape = CodeShape::keys(pages);
  const Column column = Column::of(shape, slot);
  const int mask = (1 << shape.bits) - 1;
  const uint8_t* code = page + pages.key.codes + column.byte;
  const uint8_t* scale = page + pages.key.scales + column.group * 2 * sizeof(T);
  for (int first = 0; first < pages.head_size; first += AT_ONCE) {
    const int n = std::min(AT_ONCE, pages.head_size - first);
    alignas(64) uint8_t codes[AT_ONCE];
    alignas(64) T scales[AT_ONCE][2];
    for (int c = 0; c < n; ++c, code += pages.key.code_stride, scale += pages.key.scale_stride) {
      codes[c] = (uint8_t)(*code >> column.shift & mask);
      memcpy(scales[c], scale, sizeof(scales[c]));
    }
    for (int c = 0; c < n; c += W) {
      Vec step, low;
      if constexpr (sizeof(T) == 2) {
        const Words both = load_words(scales[c]);
        step = low_half<T>(both), low = high_half<T>(both);
      } else {
        alignas(64) float steps[W], lows[W];
        for (int i = 0; i < W; ++i) steps[i] = scales[c + i][0], lows[i] = scales[c + i][1];
        step = load(steps), low = load(lows);
      }
      store(to + first + c, fma(step, load_bytes<false>(codes + c), low));
    }
  }
}

// The lines that `decode_column` reads.
inline void prefetch_column(const Pages& pages, const CodeShape& shape, const uint8_t* page, int slot) {
  const Column column = Column::of(shape, slot);
  const uint8_t* code = page + pages.key.codes + column.byte;
  for (int c = 0; c < pages.head_size; ++c, code += pages.key.code_stride) prefetch_l2(code);
  const int64_t scale_bytes = pages.head_size * pages.key.scale_stride;
  for (int64_t byte = 0; byte < scale_bytes; byte += 64) prefetch_l2(page + pages.key.scales + byte);
}

// Collects tokens as rows of fp32 and makes their logits, sixteen at a time.
class KeyColumns {
 public:
  static constexpr int AT_ONCE = 16;

  // Rows [AT_ONCE, D] in `memory`.
  KeyColumns(float* memory, const Group& group, float* logits, int stride)
      : group_(group), logits_(logits), stride_(stride) {
    for (int i = 0; i < AT_ONCE; ++i) rows_[i] = (const uint8_t*)(memory + (size_t)i * group.head_size);
  }

  // Where K of the token goes whose logits become number `at` of each head.
  float* next(int at) {
    if (n_ == AT_ONCE) flush();
    at_[n_] = at;
    return (float*)rows_[n_++];
  }
  void flush() {
    const int n_padded = (n_ + W - 1) / W * W;
    for (int h = 0; h < group_.n_heads; ++h) {
      alignas(64) float logits[AT_ONCE];
      dot_tile<FloatMac<float>, float, 1, 0>(group_.codes.whole + (size_t)h * group_.codes.stride, group_.head_size,
                                             rows_, n_padded, nullptr, logits, AT_ONCE);
      for (int i = 0; i < n_; ++i) logits_[(size_t)h * stride_ + at_[i]] = logits[i];
    }
    n_ = 0;
  }

 private:
  const Group& group_;
  float* logits_;
  int stride_;
  const uint8_t* rows_[AT_ONCE];
  int at_[AT_ONCE];
  int n_ = 0;
};

}  // namespace sparq
