// The sum of V over a full block.
#pragma once

#include "codes/coded_tokens.h"

namespace sparq {

// sum[d] += V[slot][d] over n rows (an even number), `stride` elements apart, in fp32.
template <class T>
void add_rows(const T* values, int64_t stride, int n, int d, float* sum) {
  for (int c = 0; c < d; c += W) {
    Vec even = load(sum + c), odd = zero();  // two chains, since each waits for its own sum
    const T* row = values + c;
    for (int slot = 0; slot < n; slot += 2, row += 2 * stride) {
      even = add(even, load(row));
      odd = add(odd, load(row + stride));
    }
    store(sum + c, add(even, odd));
  }
}

// sum[d] = the sum of V over all N tokens of a page, as the page stores them.
inline void sum_values(const Pages& pages, const uint8_t* page, float* sum) {
  const int d = pages.head_size, n = pages.block_size;
  for (int c = 0; c < d; c += W) store(sum + c, zero());
  with_dtype(pages.dtype, [&](auto type) {
    using T = decltype(type);
    if (!pages.quantized()) return add_rows((const T*)(page + pages.records) + d, 2 * (int64_t)d, n, d, sum);
    thread_local Scratch scratch;
    constexpr int TOKENS = CodedTokens<T>::TOKENS;
    Arena arena = scratch.arena();
    CodedTokens<T> tokens(pages, arena);
    float* const rows = arena.take<float>(TOKENS * d);
    for (int slot = 0; slot < n; slot += TOKENS) {
      tokens.values(page, slot, rows);
      add_rows(rows, d, TOKENS, d, sum);
    }
  });
}

}  // namespace sparq
