// Groups always run down the columns of a matrix, W columns at a time, so that nothing is reduced across lanes and any
// group size will do: tokens of a channel in channel-major K, and channels of a token in a block that was turned over.
#include "codes/encode.h"

#include <cmath>

#include "base/scratch.h"
#include "base/transpose.h"
#include "codes/code_rows.h"

namespace sparq {
namespace {

// The smallest number of type T that is not below x >= 0.
template <class T>
SPARQ_INLINE Vec not_below(Vec x);

template <>
SPARQ_INLINE Vec not_below<float>(Vec x) {
  return x;
}

template <>
SPARQ_INLINE Vec not_below<fp16>(Vec x) {
  fp16 bits[W];
  store_up(bits, x);
  return load(bits);
}

template <>
SPARQ_INLINE Vec not_below<bf16>(Vec x) {
  return up_to_bf16(x);
}

// The number of type T nearest to x.
template <class T>
SPARQ_INLINE Vec nearest(Vec x) {
  T numbers[W];
  store(numbers, x);
  return load(numbers);
}

// Numbers that the type can hold.
template <class T>
SPARQ_INLINE void store_exact(T* to, Vec x) {
  store(to, x);
}

SPARQ_INLINE void store_exact(bf16* to, Vec x) { store_upper(to, x); }

// Step and zero of W groups; a group that is not `whole` has an infinite element, or a NaN, or too wide a range.
struct Scale {
  Vec step, zero;
  unsigned whole;
};

template <class T, bool has_zero>
SPARQ_INLINE Scale find_scale(const T* x, int64_t stride, int group, float top, bool midpoints) {
  Vec low = set1(INFINITY), high = set1(-INFINITY), spoilt = zero();
  for (int i = 0; i < group; ++i) {
    const Vec v = load(x + i * stride);
    low = min(v, low), high = max(v, high);
    spoilt = fma(v, zero(), spoilt);  // NaN from the first element on that is not finite
  }
  Scale scale{zero(), low, 0};
  if (has_zero) {
    scale.step = not_below<T>(div(sub(high, low), set1(midpoints ? top + 1 : top)));
    if (midpoints) scale.zero = nearest<T>(fma(scale.step, set1(0.5f), low));
  } else {
    const Vec largest = max(sub(zero(), low), high);
    scale.step = select(equal(low, high), largest, not_below<T>(div(largest, set1(top))));
    scale.zero = zero();
  }
  scale.whole = equal(spoilt, zero()) & greater(set1(INFINITY), scale.step);
  return scale;
}

// W groups: columns of x, rows `stride` apart; codes one per byte.
template <class T, bool has_zero>
void encode_groups(const CodeShape& shape, const T* x, int64_t stride, uint8_t* codes, T* steps, T* zeros) {
  const float top = has_zero ? (float)((1 << shape.bits) - 1) : 127.0f;
  const int group = shape.group;
  const Scale scale = find_scale<T, has_zero>(x, stride, group, top, shape.midpoints);
  const unsigned has_codes = scale.whole & greater(scale.step, zero());
  const Vec least = has_zero ? zero() : set1(-top);
  for (int i = 0; i < group; ++i) {
    const Vec y = round_even(div(sub(load(x + i * stride), scale.zero), scale.step));
    store_bytes(codes + i * stride, select(has_codes, min(max(y, least), set1(top)), zero()));
  }
  store_exact(steps, select(scale.whole, scale.step, set1(NAN)));
  if (has_zero) store_exact(zeros, select(scale.whole, scale.zero, set1(NAN)));
}

template <class T>
void encode_columns(const CodeShape& shape, const T* x, int columns, uint8_t* codes, T* steps, T* zeros) {
  for (int c = 0; c < columns; c += W) {
    for (int i = 0; i < shape.n_groups(); ++i) {
      const int64_t from = (int64_t)i * shape.group * columns + c, to = (int64_t)i * columns + c;
      if (shape.has_zero) {
        encode_groups<T, true>(shape, x + from, columns, codes + from, steps + to, zeros + to);
      } else {
        encode_groups<T, false>(shape, x + from, columns, codes + from, steps + to, zeros + to);
      }
    }
  }
}

// codes [n, columns], one per byte, to [n * bits/8, columns] in place: row i holds row i of each of 8 / bits runs.
void pack(const CodeShape& shape, int columns, uint8_t* codes) {
  const int64_t run = (int64_t)shape.row_bytes() * columns;
  for (int plane = 1; plane < shape.n_planes(); ++plane) {
    const uint8_t* from = codes + plane * run;
    for (int64_t i = 0; i < run; ++i) codes[i] = (uint8_t)(codes[i] | from[i] << (plane * shape.bits));
  }
}

// The columns of x [n, columns] become rows of codes and scales. Columns are a multiple of 16.
template <class T>
void encode_rows(const CodeShape& shape, const T* x, int columns, const Codes& part, uint8_t* page) {
  thread_local Scratch scratch;
  const size_t n_codes = (size_t)(shape.n + 16) * columns, n_scales = (size_t)shape.n_groups() * columns;
  Arena arena = scratch.arena();
  uint8_t* const codes = arena.take<uint8_t>(n_codes);
  T *const steps = arena.take<T>(n_scales), *const zeros = arena.take<T>(n_scales);
  encode_columns(shape, x, columns, codes, steps, zeros);
  pack(shape, columns, codes);
  transpose_bytes(codes, columns, shape.row_bytes(), columns, page + part.codes, part.code_stride);
  for (int c = 0; c < columns; ++c) {
    T* to = (T*)(page + part.scales + c * part.scale_stride);
    for (size_t i = c; i < n_scales; i += columns) {
      *to++ = steps[i];
      if (shape.has_zero) *to++ = zeros[i];
    }
  }
}

// The same for the rows of x [columns, n].
template <class T>
void encode_turned(const CodeShape& shape, const T* x, int columns, const Codes& part, uint8_t* page) {
  thread_local Scratch scratch;
  const size_t n = (size_t)shape.n * columns;
  T* const turned = scratch.arena().template take<T>(n);
  constexpr int bytes = sizeof(T);
  transpose<bytes>((const uint8_t*)x, shape.n * bytes, columns, shape.n, (uint8_t*)turned, columns * bytes);
  encode_rows(shape, turned, columns, part, page);
}

}  // namespace

void encode_keys(const Pages& pages, const void* keys, uint8_t* page) {
  with_dtype(pages.dtype, [&](auto type) {
    using T = decltype(type);
    if (pages.channel_keys) {
      encode_rows(CodeShape::keys(pages), (const T*)keys, pages.head_size, pages.key, page);
    } else {
      encode_turned(CodeShape::keys(pages), (const T*)keys, pages.block_size, pages.key, page);
    }
  });
}

void encode_block(const Pages& pages, const void* keys, const void* values, uint8_t* page) {
  encode_keys(pages, keys, page);
  with_dtype(pages.dtype, [&](auto type) {
    using T = decltype(type);
    encode_turned(CodeShape::values(pages), (const T*)values, pages.block_size, pages.value, page);
  });
}

}  // namespace sparq
