#include "scoring_copy.h"

#include <cmath>

#include "scratch.h"
#include "simd.h"
#include "transpose.h"

namespace sparq {
namespace {

constexpr float FP16_MAX = 65504.0f;

// 0 where x is infinite or NaN.
SPARQ_INLINE Vec finite_or_zero(Vec x) {
  const Vec magnitude = max(x, sub(zero(), x));
  return select(greater(set1(INFINITY), magnitude), x, zero());
}

// Rounds to fp16 in one direction, saturating, and back: the fp16 bits are stored in `bits`.
template <int rounding>
SPARQ_INLINE Vec to_fp16(Vec x, fp16* bits) {
  x = min(max(x, set1(-FP16_MAX)), set1(FP16_MAX));
#ifdef __AVX512F__
  _mm256_storeu_si256((__m256i*)bits, _mm512_cvtps_ph(x, rounding | _MM_FROUND_NO_EXC));
#else
  _mm_storeu_si128((__m128i*)bits, _mm256_cvtps_ph(x, rounding | _MM_FROUND_NO_EXC));
#endif
  return load(bits);
}

// Integral floats 0 .. 255 to bytes, one each.
SPARQ_INLINE void store_bytes(uint8_t* to, Vec x) {
#ifdef __AVX512F__
  _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8(_mm512_cvttps_epi32(x)));
#else
  const __m256i words = _mm256_cvttps_epi32(x);
  const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storel_epi64((__m128i*)to, _mm_packus_epi16(packed, packed));
#endif
}

// Step and zero of W channels.
struct Range {
  Vec step, zero;
  unsigned has_step;

  // (x - zero) / step, rounded half to even, as a float 0 .. top; 0 in a constant channel.
  SPARQ_INLINE Vec code(Vec x, float top) const {
    const Vec y = round_even(div(sub(finite_or_zero(x), zero), step));
    return select(has_step, min(max(y, sparq::zero()), set1(top)), sparq::zero());
  }
};

// Ranges of W channels over N tokens; `keys` is the first, tokens lie `stride` elements apart.
template <class T>
Range find_range(const T* keys, int64_t stride, int n_tokens, float top, fp16* steps, fp16* zeros) {
  Vec low = set1(INFINITY), high = set1(-INFINITY);
  for (int t = 0; t < n_tokens; ++t) {
    const Vec x = finite_or_zero(load(keys + t * stride));
    low = min(low, x), high = max(high, x);
  }
  Range range;
  range.zero = to_fp16<_MM_FROUND_TO_NEG_INF>(low, zeros);
  range.step = to_fp16<_MM_FROUND_TO_POS_INF>(div(sub(high, range.zero), set1(top)), steps);
  range.has_step = greater(range.step, zero());
  return range;
}

// Token-major codes: int4 pairs token t with token t + N/2 in a byte, so rows are N/2 for int4 and N for int8.
template <class T>
void quantize_channels(const T* keys, int64_t stride, int n_tokens, Scoring type, uint8_t* codes, int64_t codes_stride,
                       fp16* steps, fp16* zeros) {
  const float top = type == Scoring::int4 ? 15.0f : 255.0f;
  const Range range = find_range(keys, stride, n_tokens, top, steps, zeros);
  if (type == Scoring::int8) {
    for (int t = 0; t < n_tokens; ++t) store_bytes(codes + t * codes_stride, range.code(load(keys + t * stride), top));
    return;
  }
  const int half = n_tokens / 2;
  for (int t = 0; t < half; ++t) {
    const Vec low = range.code(load(keys + t * stride), top), high = range.code(load(keys + (t + half) * stride), top);
    store_bytes(codes + t * codes_stride, fma(high, set1(16.0f), low));
  }
}

template <class T>
void quantize(const Pages& pages, uint8_t* page) {
  thread_local Scratch scratch;
  const int d = pages.head_size, n = pages.block_size;
  const int rows = pages.scoring_type == Scoring::int4 ? n / 2 : n;
  Arena arena = scratch.arena(Arena::room<uint8_t>((size_t)rows * d) + 2 * Arena::room<fp16>(d));
  uint8_t* codes = arena.take<uint8_t>((size_t)rows * d);
  fp16 *steps = arena.take<fp16>(d), *zeros = arena.take<fp16>(d);
  const T* keys = (const T*)(page + pages.records);
  for (int c = 0; c < d; c += W)
    quantize_channels(keys + c, 2 * (int64_t)d, n, pages.scoring_type, codes + c, d, steps + c, zeros + c);

  uint8_t* to = page + pages.scoring;
  if (rows % 16 == 0) {
    transpose<1>(codes, d, rows, d, to, rows);
  } else {  // int4 with N = 16, 48, ...: 8 rows that fill no square
    for (int c = 0; c < d; ++c)
      for (int r = 0; r < rows; ++r) to[c * rows + r] = codes[r * d + c];
  }
  auto* ranges = (fp16*)(page + pages.ranges);
  for (int c = 0; c < d; ++c) ranges[2 * c] = steps[c], ranges[2 * c + 1] = zeros[c];
}

}  // namespace

void make_scoring_copy(const Pages& pages, uint8_t* page) {
  if (pages.scoring_type != Scoring::model) {
    with_dtype(pages.dtype, [&](auto type) { quantize<decltype(type)>(pages, page); });
    return;
  }
  const int d = pages.head_size, n = pages.block_size;
  if (pages.dtype == DType::fp32)
    transpose<4>(page + pages.records, 8 * d, n, d, page + pages.scoring, 4 * n);
  else
    transpose<2>(page + pages.records, 4 * d, n, d, page + pages.scoring, 2 * n);
}

}  // namespace sparq
