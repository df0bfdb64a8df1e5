// Sums of V over the slots of a page.
#pragma once

#include "simd.h"

namespace sparq {

// sum[d] += V[slot][d] over the first n slots, in fp32.
template <class T>
void add_values(const Pages& pages, const uint8_t* page, int n, float* sum) {
  const int d = pages.head_size;
  const T* values = (const T*)(page + pages.records) + d;
  for (int c = 0; c < d; c += W) {
    Vec total = load(sum + c);
    for (int slot = 0; slot < n; ++slot) total = add(total, load(values + (int64_t)slot * 2 * d + c));
    store(sum + c, total);
  }
}

inline void add_values(const Pages& pages, const uint8_t* page, int n, float* sum) {
  with_dtype(pages.dtype, [&](auto type) { add_values<decltype(type)>(pages, page, n, sum); });
}

}  // namespace sparq
