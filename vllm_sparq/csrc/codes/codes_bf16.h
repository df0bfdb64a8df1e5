// Rows of codes where the CPU multiplies bf16: two codes per lane and instruction, straight from the packed bytes.
//
// A code less the middle of its range is exact in bf16. What it is multiplied with is rounded to bf16 once; zeros are
// added in fp32.
#pragma once

#include "base/tile.h"
#include "codes/attend_codes.h"

#ifdef SPARQ_BF16_VECTORS

namespace sparq {

constexpr uint16_t bf16_bits(float x) {
  int exponent = 127;
  const int sign = x < 0;
  if (x == 0) return 0;
  for (x = sign ? -x : x; x >= 2; x /= 2) ++exponent;
  for (; x < 1; x *= 2) --exponent;
  return (uint16_t)(sign << 15 | exponent << 7 | (int)((x - 1) * 128));
}

// What the lowest five bits of a word look up: a function of `bits` of them, from bit `from` on.
struct LookUp {
  alignas(64) uint16_t words[32]{};

  constexpr LookUp(int from, int bits, float middle) {
    for (int i = 0; i < 32; ++i) words[i] = bf16_bits((float)((i >> from) % (1 << bits)) - middle);
  }
  SPARQ_INLINE __m512i load() const { return _mm512_load_si512(words); }
};

// How the codes in a 16-bit word are told apart. A word holds two neighbouring codes of each plane: the planes of its
// low byte, then those of its high byte. All have a zero.
struct TwoBits {
  static constexpr int planes = 4, tables = 2;  // the second table spares every other shift
  static constexpr float middle = 1.5f;
  static constexpr LookUp table[2] = {{0, 2, 1.5f}, {2, 2, 1.5f}};
};
struct FourBits {
  static constexpr int planes = 2, tables = 1;
  static constexpr float middle = 7.5f;
  static constexpr LookUp table[1] = {{0, 4, 7.5f}};
};

template <int shift>
SPARQ_INLINE __m512i words_right(__m512i words) {
  if constexpr (shift == 0) return words;
  return _mm512_srli_epi16(words, shift);
}

constexpr int MIX_ROWS = 128;  // rows whose weights are made at once
constexpr int MIX_UNIT = 32;   // bytes of a row that fill a vector, beside those of the next row
constexpr int SHORT_ROW = 16;  // bytes of a whole row that fill one beside those of the next three

constexpr int AHEAD_ROWS = 8;  // between requests for memory that is wanted next

// Whether the codes of each plane in each unit of a row belong to one group.
inline bool can_mix_bf16(const CodeShape& shape) {
  const int row = shape.row_bytes();
  if (shape.dtype != DType::bf16 || !shape.has_zero || shape.n_groups() > MIX_GROUPS || row % 2 != 0) return false;
  for (int first = 0; first < shape.n; first += row)
    for (int byte = 0; byte < row; byte += MIX_UNIT)
      if ((first + byte) / shape.group != (first + std::min(byte + MIX_UNIT, row) - 1) / shape.group) return false;
  return true;
}

// Step and zero of up to MIX_ROWS rows as the dwords they are, [n rounded up, n_groups]; zeros past the end.
inline const int32_t* stage_scales(const CodeShape& shape, const CodeRows& rows, int first, int n, int32_t* to) {
  const int groups = shape.n_groups();
  if (rows.all_scales != nullptr && n % 32 == 0) return (const int32_t*)rows.all_scales + (size_t)first * groups;
  const uint8_t* const* from = rows.scales + first;
  if (groups == 2) {
    for (int i = 0; i < n; ++i) memcpy(to + 2 * i, from[i], 8);
  } else if (groups == 4) {
    for (int i = 0; i < n; ++i) memcpy(to + 4 * i, from[i], 16);
  } else {
    for (int i = 0; i < n; ++i) memcpy(to + i * groups, from[i], 4 * groups);
  }
  std::fill_n(to + n * groups, ((n + 31) / 32 * 32 - n) * groups, 0);
  return to;
}

// Vectors of scales, lane (row, i) = row * n_weights + i, for the planes of one unit of a row: as many scales a row as
// planes, or fewer, each for neighbouring planes.
template <int n_weights>
struct ScaleLanes {
  const int32_t* scales;
  int n_groups;
  bool in_order;      // the lanes are as in memory
  __mmask16 few = 0;  // dwords that all lanes come from, where these are a vector's or less
  __m512i lanes;

  ScaleLanes(const CodeShape& shape, const int32_t* staged, int unit) : scales(staged), n_groups(shape.n_groups()) {
    alignas(64) int32_t at[16];
    int group[n_weights];
    for (int i = 0; i < n_weights; ++i)
      group[i] = (shape.n_planes() / n_weights * i * shape.row_bytes() + unit * MIX_UNIT) / shape.group;
    in_order = n_groups == n_weights;
    for (int lane = 0; lane < 16; ++lane) {
      at[lane] = lane / n_weights * n_groups + group[lane % n_weights];
      in_order &= at[lane] == lane;
    }
    const int n_dwords = 16 / n_weights * n_groups;
    if (n_dwords <= 16) few = (__mmask16)((1u << n_dwords) - 1);
    lanes = _mm512_load_si512(at);
  }
  // From the given row on.
  SPARQ_INLINE __m512i load(int row) const {
    const int32_t* from = scales + row * n_groups;
    if (in_order) return _mm512_loadu_si512(from);
    if (few) return _mm512_permutexvar_epi32(lanes, _mm512_maskz_loadu_epi32(few, from));
    if (n_groups == 2 * n_weights)
      return _mm512_permutex2var_epi32(_mm512_loadu_si512(from), lanes, _mm512_loadu_si512(from + 16));
    return _mm512_i32gather_epi32(lanes, from, 4);
  }
};

// Pairs of bf16 weights x step of neighbouring rows, [n / 2 / Side::pairs, n_weights, Side::pairs] dwords, and the sums
// of x (zero + middle step), one for each of the n_weights of a row.
template <class C, class Side, int n_weights>
void fold(const ScaleLanes<n_weights>& scales, const float* x, int n, int32_t* weights, float* sums) {
  constexpr int P = n_weights, R = 16 / P;  // rows of a vector
  alignas(64) int32_t of_row[16];
  alignas(64) int16_t of_pair[32];
  for (int lane = 0; lane < 16; ++lane) of_row[lane] = lane / P;
  for (int word = 0; word < 32; ++word) {
    const int dword = word / 2, of = dword / Side::pairs;
    const int pair = of / P * Side::pairs + dword % Side::pairs;
    of_pair[word] = (int16_t)((pair * 2 + word % 2) * P + of % P);
  }
  const __m512i row = _mm512_load_si512(of_row), pair = _mm512_load_si512(of_pair);
  Vec sum = zero();
  const auto product = [&](int first) __attribute__((always_inline)) {
    const __m512i both = scales.load(first);
    const Vec step = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
    const Vec low = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32((int)0xffff0000)));
    const auto inside = (__mmask16)((1u << std::max(0, std::min(R, n - first))) - 1);
    const Vec q = _mm512_permutexvar_ps(row, _mm512_maskz_loadu_ps(inside, x + first));
    sum = fma(q, fma(set1(C::middle), step, low), sum);
    return mul(q, step);
  };
  for (int i = 0; i < n; i += 2 * R, weights += 16) {
    const Vec a = product(i), b = product(i + R);
    const auto high = (__m512i)_mm512_cvtne2ps_pbh(b, a);
    const __m512i pairs = _mm512_permutexvar_epi16(pair, high);
    _mm512_store_si512(weights, pairs);
  }
  alignas(64) float lanes[16];
  store(lanes, sum);
  for (int i = 0; i < P; ++i) {
    sums[i] = 0;
    for (int lane = i; lane < 16; lane += P) sums[i] += lanes[lane];
  }
}

// A few neighbouring units of all rows.
struct MixUnits {
  const uint8_t* const* codes;
  int n;                // rows
  int byte, row_bytes;  // where the first begins, and a row ends
  int n_weights;        // of a row, each of planes_of_weight neighbouring planes
  int planes_of_weight;
  const int32_t* weights[2];  // of each unit: [heads, weight_stride]
  int weight_stride;
  const float* sums[2];  // [heads, n_weights]

  int weight_of(int plane) const { return plane / planes_of_weight; }
};

// A unit of two rows in a vector, word beside word.
struct TwoRows {
  static constexpr int pairs = 1;

  static SPARQ_INLINE __m512i words(const uint8_t* const* rows, int, int byte, __mmask16 inside) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m256i low = _mm256_maskz_loadu_epi16(inside, rows[0] + byte);
    const __m256i high = _mm256_maskz_loadu_epi16(inside, rows[1] + byte);
    return _mm512_permutexvar_epi16(order, _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
  }
  static SPARQ_INLINE __m512i weight(const int32_t* weights, int i) { return _mm512_set1_epi32(weights[i]); }
  // Sums of the codes at even places and of those at odd ones, [16] each, in the order of a row.
  static SPARQ_INLINE void in_order(Vec a, Vec b, Vec* to) {
    const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    to[0] = _mm512_permutex2var_ps(a, first, b);
    to[1] = _mm512_permutex2var_ps(a, _mm512_add_epi32(first, _mm512_set1_epi32(8)), b);
  }
};

// Four short rows in a vector: a dword of the first two, then one of the others.
struct FourRows {
  static constexpr int pairs = 2;

  // Of `n` rows; more than there are become the first again, and their weights are zero.
  static SPARQ_INLINE __m512i words(const uint8_t* const* rows, int n, int, __mmask16) {
    const __m512i order = _mm512_set_epi16(31, 23, 15, 7, 30, 22, 14, 6, 29, 21, 13, 5, 28, 20, 12, 4, 27, 19, 11, 3,
                                           26, 18, 10, 2, 25, 17, 9, 1, 24, 16, 8, 0);
    const auto row = [&](int i) __attribute__((always_inline)) {
      return _mm_loadu_si128((const __m128i*)rows[i < n ? i : 0]);
    };
    const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(row(0)), row(1), 1);
    const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(row(2)), row(3), 1);
    return _mm512_permutexvar_epi16(order, _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
  }
  static SPARQ_INLINE __m512i weight(const int32_t* weights, int i) {
    int64_t both;
    memcpy(&both, weights + 2 * i, 8);
    return _mm512_set1_epi64(both);
  }
  static SPARQ_INLINE void in_order(Vec a, Vec b, Vec* to) {
    const __m512i even = _mm512_setr_epi32(0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    to[0] = add(_mm512_permutex2var_ps(a, even, b), _mm512_permutex2var_ps(a, odd, b));
    to[1] = zero();
  }
};

// Sums of PP planes from plane p0 on of U units.
template <class C, class Side, int HH, int PP, int p0, int U>
struct PlaneSums {
  static constexpr int BITS = 8 / C::planes;
  Vec sum[U][PP][2][HH];

  SPARQ_INLINE PlaneSums() {
#pragma GCC unroll 32
    for (int i = 0; i < U * PP * 2 * HH; ++i) (&sum[0][0][0][0])[i] = zero();
  }

  // Half 0 and 1 of the words are neighbouring codes.
  template <int u, int p, int half>
  SPARQ_INLINE void add_codes(__m512i words, const __m512i* table, const int32_t* weights, int stride, const int* of) {
    constexpr int bit = half * 8 + (p0 + p) * BITS, which = BITS == 2 ? bit / 2 % 2 : 0;
    const __m512i codes = _mm512_permutexvar_epi16(words_right<bit / 4 * 4>(words), table[which]);
#pragma GCC unroll 4
    for (int h = 0; h < HH; ++h) {
      const auto weight = (__m512bh)Side::weight(weights + h * stride, of[p]);
      sum[u][p][half][h] = _mm512_dpbf16_ps(sum[u][p][half][h], (__m512bh)codes, weight);
    }
  }
  template <int u, int p>
  SPARQ_INLINE void add_plane(__m512i words, const __m512i* table, const int32_t* weights, int stride, const int* of) {
    add_codes<u, p, 0>(words, table, weights, stride, of);
    add_codes<u, p, 1>(words, table, weights, stride, of);
    if constexpr (p + 1 < PP) add_plane<u, p + 1>(words, table, weights, stride, of);
  }

  // out[h] += the sums, and what the zeros of the rows add up to.
  SPARQ_INLINE void add_to(const MixUnits& units, float* out, int out_stride) const {
#pragma GCC unroll 2
    for (int u = 0; u < U; ++u) {
      const int byte = units.byte + u * MIX_UNIT, n = std::min(MIX_UNIT, units.row_bytes - byte);
      const auto inside = (__mmask32)((1ull << n) - 1);
#pragma GCC unroll 4
      for (int p = 0; p < PP; ++p)
#pragma GCC unroll 4
        for (int h = 0; h < HH; ++h) {
          const Vec zeros = set1(units.sums[u][h * units.n_weights + units.weight_of(p0 + p)]);
          Vec ordered[2];
          Side::in_order(sum[u][p][0][h], sum[u][p][1][h], ordered);
          float* to = out + (size_t)h * out_stride + (p0 + p) * units.row_bytes + byte;
          const auto put = [&](float* at, Vec x, __mmask16 mask) __attribute__((always_inline)) {
            _mm512_mask_storeu_ps(at, mask, add(_mm512_maskz_loadu_ps(mask, at), add(x, zeros)));
          };
          put(to, ordered[0], (__mmask16)inside);
          put(to + 16, ordered[1], (__mmask16)(inside >> 16));
        }
    }
  }
};

template <class C, class Side, int HH, int PP, int p0, int U>
void mix_planes(const MixUnits& units, float* out, int out_stride, Ahead& ahead, int share) {
  __m512i table[C::tables];
#pragma GCC unroll 2
  for (int i = 0; i < C::tables; ++i) table[i] = C::table[i].load();
  const int n_last = std::min(MIX_UNIT, units.row_bytes - units.byte - (U - 1) * MIX_UNIT);
  const auto inside = (__mmask16)((1u << n_last / 2) - 1);
  PlaneSums<C, Side, HH, PP, p0, U> sums;
  int of[PP];
  for (int p = 0; p < PP; ++p) of[p] = units.weight_of(p0 + p);
  for (int row = 0, at = 0; row < units.n; row += 2 * Side::pairs, at += Side::pairs * units.n_weights) {
    if (row % AHEAD_ROWS == 0) ahead.step(share);
    const uint8_t* const* rows = units.codes + row;
    const __m512i words = Side::words(rows, units.n - row, units.byte, U == 1 ? inside : (__mmask16)0xffff);
    sums.template add_plane<0, 0>(words, table, units.weights[0] + at, units.weight_stride, of);
    if constexpr (U == 2) {
      const __m512i more = Side::words(rows, units.n - row, units.byte + MIX_UNIT, inside);
      sums.template add_plane<1, 0>(more, table, units.weights[1] + at, units.weight_stride, of);
    }
  }
  sums.add_to(units, out, out_stride);
}

// All planes of U units, as many at once as registers hold: 16 sums.
template <class C, class Side, int HH, int U, int p0 = 0>
void mix_units(const MixUnits& units, float* out, int out_stride, Ahead& ahead, int share) {
  constexpr int sums_of_plane = 2 * U * (HH == 3 ? 4 : HH);
  constexpr int PP = std::max(1, std::min(C::planes, 16 / sums_of_plane));
  mix_planes<C, Side, HH, PP, p0, U>(units, out, out_stride, ahead, share);
  if constexpr (p0 + PP < C::planes) mix_units<C, Side, HH, U, p0 + PP>(units, out, out_stride, ahead, 0);
}

template <class C, class Side, int HH>
void mix_heads_bf16(const CodeShape& shape, const CodeRows& rows, const float* x, int x_stride, float* out,
                    int out_stride, Ahead& ahead) {
  constexpr int P = C::planes, U = Side::pairs == 1 && 4 * P * HH <= 16 ? 2 : 1;
  constexpr int weight_stride = MIX_ROWS / 2 * P;
  alignas(64) int32_t weights[U][HH * weight_stride], staged[MIX_ROWS * MIX_GROUPS];
  float sums[U][HH * P];
  const int row_bytes = shape.row_bytes(), share = ahead.share((rows.n + AHEAD_ROWS - 1) / AHEAD_ROWS);
  const bool by_plane = P % shape.n_groups() == 0;  // all units have the same groups in the same planes
  const int n_weights = by_plane ? shape.n_groups() : P;
  for (int first = 0; first < rows.n; first += MIX_ROWS) {
    const int n = std::min(MIX_ROWS, rows.n - first);
    const int32_t* const scales = stage_scales(shape, rows, first, n, staged);
    const auto prepare = [&](int unit, int to) {
      const auto by = [&](auto lanes) {
        for (int h = 0; h < HH; ++h)
          fold<C, Side>(lanes, x + (size_t)h * x_stride + first, n, weights[to] + h * weight_stride,
                        sums[to] + h * n_weights);
      };
      if (n_weights == 1) by(ScaleLanes<1>(shape, scales, unit));
      if (n_weights == 2) by(ScaleLanes<2>(shape, scales, unit));
      if (n_weights == 4) by(ScaleLanes<4>(shape, scales, unit));
    };
    for (int byte = 0, n_units; byte < row_bytes; byte += n_units * MIX_UNIT) {
      n_units = row_bytes - byte > MIX_UNIT ? U : 1;
      if (byte == 0 || !by_plane)
        for (int u = 0; u < (by_plane ? 1 : n_units); ++u) prepare(byte / MIX_UNIT + u, u);
      const int second = by_plane ? 0 : U - 1;
      const MixUnits units{rows.codes + first,
                           n,
                           byte,
                           row_bytes,
                           n_weights,
                           P / n_weights,
                           {weights[0], weights[second]},
                           weight_stride,
                           {sums[0], sums[second]}};
      if (n_units == 2) mix_units<C, Side, HH, U>(units, out, out_stride, ahead, byte == 0 ? share : 0);
      else mix_units<C, Side, HH, 1>(units, out, out_stride, ahead, byte == 0 ? share : 0);
    }
  }
}

template <class C, class Side>
void mix_sides_bf16(const CodeShape& shape, const CodeRows& rows, const float* x, int x_stride, int n_heads, float* out,
                    int out_stride, Ahead& ahead) {
  few_at_a_time<MAX_TILE_HEADS>(n_heads, [&](int h, auto heads) {
    mix_heads_bf16<C, Side, heads>(shape, rows, x + (size_t)h * x_stride, x_stride, out + (size_t)h * out_stride,
                                   out_stride, ahead);
  });
}

template <class C>
void mix_bf16(const CodeShape& shape, const CodeRows& rows, const float* x, int x_stride, int n_heads, float* out,
              int out_stride, Ahead& ahead) {
  const auto mix = shape.row_bytes() == SHORT_ROW ? mix_sides_bf16<C, FourRows> : mix_sides_bf16<C, TwoRows>;
  mix(shape, rows, x, x_stride, n_heads, out, out_stride, ahead);
}

}  // namespace sparq

#endif
