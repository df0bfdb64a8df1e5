// The tokens of a list, a tile at a time: where their codes lie.
#pragma once

#include "codes/attend_codes.h"

namespace sparq {

constexpr int LIST_TILE = 128;  // tokens of a list at a time

// Arrays of pointers to rows.
struct RowPointers {
  const uint8_t** codes;
  const uint8_t** scales;
  int n = 0;
  const uint8_t* page = nullptr;  // whose rows they are, if those of one

  static RowPointers in(Arena& arena, int capacity) {
    return {arena.take<const uint8_t*>(capacity + 1), arena.take<const uint8_t*>(capacity + 1)};
  }

  void push(const Codes& where, const uint8_t* from, int row) {
    codes[n] = from + where.codes + row * where.code_stride;
    scales[n++] = from + where.scales + row * where.scale_stride;
  }
  CodeRows rows() const {
    codes[n] = codes[n - 1];  // room: see `in`
    return {codes, scales, n};
  }

  // The first n rows of a page: always those of the same part, and as many.
  CodeRows all(const Codes& where, const CodeShape& shape, const uint8_t* from, int count) {
    if (page == nullptr) {
      for (int row = 0; row < count; ++row) push(where, from, row);
    } else {
      const int64_t apart = from - page;
      for (int row = 0; row < count; ++row) codes[row] += apart, scales[row] += apart;
    }
    page = from;
    const bool dense = where.scale_stride == shape.scale_bytes();
    return {codes, scales, n, dense ? from + where.scales : nullptr};
  }
};

// A tile of a list.
struct ListTile {
  const uint8_t* page[LIST_TILE];
  int slot[LIST_TILE];
  int n = 0;

  void take(const Sequence& sequence, const int32_t* tokens, int count) {
    n = std::min(count, LIST_TILE);
    const auto block_size = (unsigned)sequence.pages->block_size;
    for (int i = 0; i < n; ++i) {
      const auto token = (unsigned)tokens[i], block = token / block_size;
      page[i] = sequence.page((int)block), slot[i] = (int)(token - block * block_size);
    }
  }
  void push(const Codes& where, RowPointers& rows) const {
    rows.n = 0;
    for (int i = 0; i < n; ++i) rows.push(where, page[i], slot[i]);
  }
  // How many tokens from i on are of one page.
  int run(int i) const {
    int stop = i + 1;
    while (stop < n && page[stop] == page[i]) ++stop;
    return stop - i;
  }
  void prefetch(const Pages& pages, const CodeKernels& kernels) const {
    if (!pages.channel_keys) prefetch_rows(pages.key, kernels.key);
    prefetch_rows(pages.value, kernels.value);
  }

 private:
  void prefetch_rows(const Codes& where, const CodeShape& shape) const {
    const int code_bytes = shape.row_bytes(), scale_bytes = shape.scale_bytes();
    for (int i = 0; i < n; ++i) {
      const uint8_t* const codes = page[i] + where.codes + slot[i] * where.code_stride;
      const uint8_t* const scales = page[i] + where.scales + slot[i] * where.scale_stride;
      for (int byte = 0; byte < code_bytes; byte += 64) prefetch_l2(codes + byte);
      prefetch_l2(codes + code_bytes - 1);
      prefetch_l2(scales), prefetch_l2(scales + scale_bytes - 1);
    }
  }
};

}  // namespace sparq
