// Rows of codes where the CPU multiplies bf16: two codes per lane and instruction, straight from the packed bytes.
//
// A code less the middle of its range is exact in bf16. What it is multiplied with is rounded to bf16 once, or kept as the
// sum of two bf16 numbers, which is good to 2^-17; zeros are added in fp32. `int8` is two nibbles, the upper one signed.
#pragma once

#include "attend_codes.h"
#include "tile.h"

#ifdef __AVX512BF16__

namespace sparq {

constexpr uint16_t bf16_bits(float x) {
  int exponent = 127;
  const int sign = x < 0;
  if (x == 0) return 0;
  for (x = sign ? -x : x; x >= 2; x /= 2) ++exponent;
  for (; x < 1; x *= 2) --exponent;
  return (uint16_t)(sign << 15 | exponent << 7 | (int)((x - 1) * 128));
}

// What the lowest five bits of a word look up: a function of the lowest `bits`.
struct LookUp {
  alignas(64) uint16_t words[32]{};

  constexpr LookUp(int bits, float middle, bool is_signed, float factor) {
    for (int i = 0; i < 32; ++i) {
      const int code = i % (1 << bits);
      words[i] = bf16_bits((is_signed && code >= 1 << (bits - 1) ? code - (1 << bits) : code) * factor - middle);
    }
  }
  SPARQ_INLINE __m512i load() const { return _mm512_load_si512(words); }
};

// How the codes in a 16-bit word are told apart. A word holds two neighbouring codes of each plane: the planes of its low
// byte, then those of its high byte.
struct TwoBits {
  static constexpr int planes = 4, lookups = 1;
  static constexpr float middle = 1.5f;
  static constexpr LookUp table[1] = {{2, 1.5f, false, 1}};
};
struct FourBits {
  static constexpr int planes = 2, lookups = 1;
  static constexpr float middle = 7.5f;
  static constexpr LookUp table[1] = {{4, 7.5f, false, 1}};
};
struct EightBits {
  static constexpr int planes = 1, lookups = 2;
  static constexpr float middle = 0;
  static constexpr LookUp table[2] = {{4, 0, false, 1}, {4, 0, true, 16}};
};

template <int shift>
SPARQ_INLINE __m512i words_right(__m512i words) {
  if constexpr (shift == 0) return words;
  return _mm512_srli_epi16(words, shift);
}

constexpr int MIX_ROWS = 128;    // rows whose weights are made at once
constexpr int MIX_GROUPS = 16;   // groups of a row at most
constexpr int MIX_UNIT = 32;     // bytes of a row that fill a vector, when each word of it is paired with one of the next row

// Whether the codes of each plane in each unit of a row belong to one group.
inline bool can_mix_bf16(const CodeShape& shape) {
  const int row = shape.row_bytes();
  if (shape.dtype != DType::bf16 || shape.n_groups() > MIX_GROUPS || row % 2 != 0) return false;
  for (int first = 0; first < shape.n; first += row)
    for (int byte = 0; byte < row; byte += MIX_UNIT)
      if ((first + byte) / shape.group != (first + std::min(byte + MIX_UNIT, row) - 1) / shape.group) return false;
  return true;
}

// Step and zero of up to MIX_ROWS rows as the dwords they are, [n rounded up, n_groups]; zeros past the end.
inline const int32_t* stage_ranges(const CodeShape& shape, const CodeRows& rows, int first, int n, int32_t* to) {
  const int groups = shape.n_groups();
  if (rows.all_ranges != nullptr && shape.has_zero && n % 32 == 0)
    return (const int32_t*)rows.all_ranges + (size_t)first * groups;
  const uint8_t* const* from = rows.ranges + first;
  if (!shape.has_zero) {
    for (int i = 0; i < n; ++i) {
      uint16_t step;
      memcpy(&step, from[i], 2);
      to[i] = step;
    }
  } else if (groups == 2) {
    for (int i = 0; i < n; ++i) memcpy(to + 2 * i, from[i], 8);
  } else if (groups == 4) {
    for (int i = 0; i < n; ++i) memcpy(to + 4 * i, from[i], 16);
  } else {
    for (int i = 0; i < n; ++i) memcpy(to + i * groups, from[i], 4 * groups);
  }
  std::fill_n(to + n * groups, ((n + 31) / 32 * 32 - n) * groups, 0);
  return to;
}

// Vectors of ranges, lane (row, plane) = row * planes + plane, for the planes of one unit of a row.
template <int planes>
struct RangeLanes {
  const int32_t* ranges;
  int n_groups;
  bool in_order;  // the lanes are as in memory
  __m512i lanes;

  RangeLanes(const CodeShape& shape, const int32_t* staged, int unit) : ranges(staged), n_groups(shape.n_groups()) {
    alignas(64) int32_t at[16];
    int group[planes];
    for (int p = 0; p < planes; ++p) group[p] = (p * shape.row_bytes() + unit * MIX_UNIT) / shape.group;
    in_order = n_groups == planes;
    for (int lane = 0; lane < 16; ++lane) {
      at[lane] = lane / planes * n_groups + group[lane % planes];
      in_order &= at[lane] == lane;
    }
    lanes = _mm512_load_si512(at);
  }
  // From the given row on.
  SPARQ_INLINE __m512i load(int row) const {
    const int32_t* from = ranges + row * n_groups;
    if (in_order) return _mm512_loadu_si512(from);
    if (n_groups == 2 * planes)
      return _mm512_permutex2var_epi32(_mm512_loadu_si512(from), lanes, _mm512_loadu_si512(from + 16));
    return _mm512_i32gather_epi32(lanes, from, 4);
  }
};

// Pairs of bf16 weights x step of neighbouring rows, [n / 2, planes, TERMS] dwords, and the sums of x (zero + middle step),
// one a plane.
template <class C, int TERMS>
void fold(const RangeLanes<C::planes>& ranges, const float* x, int n, int32_t* weights, float* sums) {
  constexpr int P = C::planes, R = 16 / P;  // rows of a vector
  alignas(64) int32_t of_row[16];
  alignas(64) int16_t of_pair[32];
  for (int lane = 0; lane < 16; ++lane) of_row[lane] = lane / P;
  for (int word = 0; word < 32; ++word) of_pair[word] = (int16_t)((word / 2 / P * 2 + word % 2) * P + word / 2 % P);
  const __m512i row = _mm512_load_si512(of_row), pair = _mm512_load_si512(of_pair);
  Vec sum = zero();
  const auto product = [&](int first) __attribute__((always_inline)) {
    const __m512i both = ranges.load(first);
    const Vec step = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
    const Vec low = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32((int)0xffff0000)));
    const auto inside = (__mmask16)((1u << std::max(0, std::min(R, n - first))) - 1);
    const Vec q = _mm512_permutexvar_ps(row, _mm512_maskz_loadu_ps(inside, x + first));
    sum = fma(q, fma(set1(C::middle), step, low), sum);
    return mul(q, step);
  };
  for (int i = 0; i < n; i += 2 * R, weights += 16 * TERMS) {
    Vec a = product(i), b = product(i + R);
    const auto high = (__m512i)_mm512_cvtne2ps_pbh(b, a);
    const __m512i pairs = _mm512_permutexvar_epi16(pair, high);
    if constexpr (TERMS == 1) {
      _mm512_store_si512(weights, pairs);
    } else {
      const auto widen = [](__m256i words) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
      };
      a = sub(a, widen(_mm512_castsi512_si256(high)));
      b = sub(b, widen(_mm512_extracti64x4_epi64(high, 1)));
      const __m512i rest = _mm512_permutexvar_epi16(pair, (__m512i)_mm512_cvtne2ps_pbh(b, a));
      const __m512i order_low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      const __m512i order_high = _mm512_add_epi32(order_low, _mm512_set1_epi32(8));
      _mm512_store_si512(weights, _mm512_permutex2var_epi32(pairs, order_low, rest));
      _mm512_store_si512(weights + 16, _mm512_permutex2var_epi32(pairs, order_high, rest));
    }
  }
  alignas(64) float lanes[16];
  store(lanes, sum);
  for (int plane = 0; plane < P; ++plane) {
    sums[plane] = 0;
    for (int lane = plane; lane < 16; lane += P) sums[plane] += lanes[lane];
  }
}

// One unit of all rows.
struct MixUnit {
  const uint8_t* const* codes;
  int n;                   // rows
  int byte, n_bytes;       // of each row
  const int32_t* weights;  // [heads, weight_stride]
  int weight_stride;
  const float* sums;       // [heads, planes]
};

// out[h] += the sums of PP planes from plane p0 on.
template <class C, int HH, int TERMS, int PP, int p0>
void mix_planes(const MixUnit& unit, int row_bytes, float* out, int out_stride, Ahead& ahead, int share) {
  constexpr int P = C::planes, BITS = 8 / P;
  const auto inside = (__mmask16)((1u << (unit.n_bytes / 2)) - 1);
  __m512i table[C::lookups];
#pragma GCC unroll 2
  for (int i = 0; i < C::lookups; ++i) table[i] = C::table[i].load();
  Vec sum[TERMS][HH][PP][2];
#pragma GCC unroll 32
  for (int i = 0; i < TERMS * HH * PP * 2; ++i) (&sum[0][0][0][0])[i] = zero();
  const int32_t* weights = unit.weights;
  for (int row = 0; row < unit.n; row += 2, weights += P * TERMS) {
    ahead.step(share);
    const uint8_t *even = unit.codes[row], *odd = unit.codes[std::min(row + 1, unit.n - 1)];
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(inside, even + unit.byte));
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(inside, odd + unit.byte));
    const __m512i words = _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
    const auto plane = [&](auto p, auto second) __attribute__((always_inline)) {
      constexpr int shift = second.value * 8 + (p0 + p.value) * BITS;
      const auto use = [&](__m512i code) __attribute__((always_inline)) {
#pragma GCC unroll 4
        for (int h = 0; h < HH; ++h)
#pragma GCC unroll 2
          for (int t = 0; t < TERMS; ++t) {
            const int32_t weight = weights[h * unit.weight_stride + (p0 + p.value) * TERMS + t];
            Vec& to = sum[t][h][p.value][second.value];
            to = _mm512_dpbf16_ps(to, (__m512bh)code, (__m512bh)_mm512_set1_epi32(weight));
          }
      };
      use(_mm512_permutexvar_epi16(words_right<shift>(words), table[0]));
      if constexpr (C::lookups == 2) use(_mm512_permutexvar_epi16(words_right<shift + 4>(words), table[1]));
    };
    const auto both = [&](auto p) __attribute__((always_inline)) {
      plane(p, std::integral_constant<int, 0>{});
      plane(p, std::integral_constant<int, 1>{});
    };
    both(std::integral_constant<int, 0>{});
    if constexpr (PP >= 2) both(std::integral_constant<int, 1>{});
    if constexpr (PP >= 4) both(std::integral_constant<int, 2>{}), both(std::integral_constant<int, 3>{});
  }
  const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  const auto lanes = (__mmask32)((1ull << unit.n_bytes) - 1);
#pragma GCC unroll 4
  for (int h = 0; h < HH; ++h)
#pragma GCC unroll 4
    for (int p = 0; p < PP; ++p) {
      Vec a = sum[0][h][p][0], b = sum[0][h][p][1];
      if constexpr (TERMS == 2) a = add(a, sum[1][h][p][0]), b = add(b, sum[1][h][p][1]);
      const Vec zeros = set1(unit.sums[h * P + p0 + p]);
      float* to = out + (size_t)h * out_stride + (p0 + p) * row_bytes + unit.byte;
      const auto put = [&](float* at, Vec x, __mmask16 mask) {
        _mm512_mask_storeu_ps(at, mask, add(_mm512_maskz_loadu_ps(mask, at), add(x, zeros)));
      };
      put(to, _mm512_permutex2var_ps(a, first, b), (__mmask16)lanes);
      put(to + 16, _mm512_permutex2var_ps(a, second, b), (__mmask16)(lanes >> 16));
    }
}

template <class C, int HH, int TERMS>
void mix_unit(const MixUnit& unit, int row_bytes, float* out, int out_stride, Ahead& ahead, int share) {
  constexpr int PP = std::max(1, std::min(C::planes, 8 / (HH == 3 ? 4 : HH) / TERMS));  // up to 16 sums
  mix_planes<C, HH, TERMS, PP, 0>(unit, row_bytes, out, out_stride, ahead, share);
  if constexpr (PP < C::planes) mix_planes<C, HH, TERMS, PP, PP>(unit, row_bytes, out, out_stride, ahead, 0);
  if constexpr (2 * PP < C::planes) {
    mix_planes<C, HH, TERMS, PP, 2 * PP>(unit, row_bytes, out, out_stride, ahead, 0);
    mix_planes<C, HH, TERMS, PP, 3 * PP>(unit, row_bytes, out, out_stride, ahead, 0);
  }
}

template <class C, int TERMS, int HH>
void mix_heads_bf16(const CodeShape& shape, const CodeRows& rows, const float* x, int x_stride, float* out,
                    int out_stride, Ahead& ahead) {
  constexpr int P = C::planes, weight_stride = MIX_ROWS / 2 * P * TERMS;
  alignas(64) int32_t weights[HH * weight_stride], staged[MIX_ROWS * MIX_GROUPS];
  float sums[HH * P];
  const int row_bytes = shape.row_bytes(), share = ahead.share((rows.n + 1) / 2);
  const bool by_plane = P % shape.n_groups() == 0;  // all units have the same groups in the same planes
  for (int first = 0; first < rows.n; first += MIX_ROWS) {
    const int n = std::min(MIX_ROWS, rows.n - first);
    const int32_t* const ranges = stage_ranges(shape, rows, first, n, staged);
    for (int byte = 0; byte < row_bytes; byte += MIX_UNIT) {
      if (byte == 0 || !by_plane) {
        const RangeLanes<P> lanes(shape, ranges, byte / MIX_UNIT);
        for (int h = 0; h < HH; ++h)
          fold<C, TERMS>(lanes, x + (size_t)h * x_stride + first, n, weights + h * weight_stride, sums + h * P);
      }
      const MixUnit unit{rows.codes + first, n, byte, std::min(MIX_UNIT, row_bytes - byte), weights, weight_stride, sums};
      mix_unit<C, HH, TERMS>(unit, row_bytes, out, out_stride, ahead, byte == 0 ? share : 0);
    }
  }
}

template <class C, int TERMS>
void mix_bf16(const CodeShape& shape, const CodeRows& rows, const float* x, int x_stride, int n_heads, float* out,
              int out_stride, Ahead& ahead) {
  switch (n_heads) {
    case 1: return mix_heads_bf16<C, TERMS, 1>(shape, rows, x, x_stride, out, out_stride, ahead);
    case 2: return mix_heads_bf16<C, TERMS, 2>(shape, rows, x, x_stride, out, out_stride, ahead);
    case 3: return mix_heads_bf16<C, TERMS, 3>(shape, rows, x, x_stride, out, out_stride, ahead);
    default: return mix_heads_bf16<C, TERMS, 4>(shape, rows, x, x_stride, out, out_stride, ahead);
  }
}

}  // namespace sparq

#endif
