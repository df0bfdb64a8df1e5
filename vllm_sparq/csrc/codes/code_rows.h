// Rows of codes of quantized pages: tokens of K or V, or channels of K where it is channel-major.
#pragma once

#include <algorithm>

#include "base/paged.h"
#include "base/scratch.h"
#include "base/simd.h"

namespace sparq {

// What rows of one kind have in common.
struct CodeShape {
  int n;  // codes of a row
  int bits;
  int group;
  bool has_zero;   // scales are step and zero, else steps alone and the codes are signed
  bool midpoints;  // codes stand for the middles of equal cells of a range, else the outermost for its ends
  DType dtype;     // of the scales

  int row_bytes() const { return n * bits / 8; }
  int n_groups() const { return n / group; }
  int n_planes() const { return 8 / bits; }  // codes of a byte, which are row_bytes() apart
  int scale_bytes() const { return n_groups() * (has_zero ? 2 : 1) * (dtype == DType::fp32 ? 4 : 2); }

  static CodeShape of(const Pages& pages, const Codes& part, int n) {
    return {n, part.bits, part.group, part.has_zero != 0, part.midpoints != 0, pages.dtype};
  }
  static CodeShape keys(const Pages& pages) {
    return of(pages, pages.key, pages.channel_keys ? pages.block_size : pages.head_size);
  }
  static CodeShape values(const Pages& pages) { return of(pages, pages.value, pages.head_size); }
};

constexpr int MIX_GROUPS = 16;  // groups of a row at most, where rows are mixed by anything but fp32

// n rows, anywhere in memory. Codes are read in pairs of rows: if n is odd there is one more pointer, to any row.
struct CodeRows {
  const uint8_t* const* codes;
  const uint8_t* const* scales;
  int n;
  const uint8_t* all_scales = nullptr;  // not null: the scales of all rows, one row after the other
};

// Memory that is wanted soon, to be prefetched bit by bit between other work.
class Ahead {
 public:
  Ahead() = default;
  Ahead(const uint8_t* from, int64_t n_bytes) : next_(from), end_(from + n_bytes) {}

  // One of `n_steps` shares.
  SPARQ_INLINE void step(int share) {
    for (const uint8_t* stop = std::min(next_ + share, end_); next_ < stop; next_ += 64) prefetch_l2(next_);
  }
  // Bytes of a step, if there are n of them.
  int share(int n) const { return (int)round_up((size_t)(end_ - next_ + n - 1) / n, 64); }

 private:
  const uint8_t* next_ = nullptr;
  const uint8_t* end_ = nullptr;
};

}  // namespace sparq
