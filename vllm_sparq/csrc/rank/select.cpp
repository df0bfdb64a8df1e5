#include "rank/select.h"

#include <algorithm>
#include <cmath>

#include "base/simd.h"

namespace sparq {
namespace {

constexpr int LANES = 16;  // of SoftmaxSums::total

// Floats in their order as integers, and back.
int32_t ordered(float x) {
  int32_t bits;
  memcpy(&bits, &x, 4);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}
float unordered(int32_t i) {
  i ^= (i >> 31) & 0x7fffffff;
  float x;
  memcpy(&x, &i, 4);
  return x;
}

SPARQ_INLINE unsigned first_lanes(int n) { return n >= W ? (1u << W) - 1 : (1u << n) - 1; }

int count_greater(const float* values, int n, float than) {
  const Vec bar = set1(than);
  GreaterCount even, odd;
  int i = 0;
  for (; i + 2 * W <= n; i += 2 * W) even.add(load(values + i), bar), odd.add(load(values + i + W), bar);
  int count = even.sum() + odd.sum();
  for (; i < n; ++i) count += values[i] > than;
  return count;
}

// The sum of the shares whose values are greater. It never rises with `than`: lanes are added in the same order always.
float share_greater(const float* values, const float* shares, int n, float than) {
  const Vec bar = set1(than);
  Vec sum = zero();
  for (int i = 0; i < n; i += W)
    sum = add(sum, select(greater(load(values + i), bar) & first_lanes(n - i), load(shares + i), zero()));
  return reduce_add(sum);
}

}  // namespace

// Bisection over the 32 bits of a bar: a pass counts n values in n / W instructions, which for the few hundred or
// thousand candidates in L1 or L2 beats any selection that moves them.
float bar_of_largest(const float* values, int n, int k, int* n_ties, int slack) {
  int64_t low = ordered(-INFINITY), high = ordered(INFINITY);  // the k-th largest is in low .. high
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    const int count = count_greater(values, n, unordered((int32_t)middle));
    if (count >= k && count <= k + slack) {
      *n_ties = 0;
      return unordered((int32_t)middle);
    }
    if (count > k) low = middle + 1;
    else high = middle;
  }
  const float kth = unordered((int32_t)low);
  *n_ties = k - count_greater(values, n, kth);
  return kth;
}

int Candidates::capacity_for(int wanted, int block_size) {
  return (int)round_up((size_t)wanted + std::max(wanted, 256) + block_size, 16);
}

Candidates Candidates::in(Arena& arena, int wanted, int capacity, int n_rows) {
  const size_t room = capacity + 16;  // whole vectors are stored
  return {arena.take<float>(room),
          arena.take<int32_t>(room),
          n_rows > 0 ? arena.take<float>(room * n_rows) : nullptr,
          n_rows,
          capacity,
          wanted,
          0,
          -INFINITY};
}

void Candidates::push(const float* scores, const float* heads, int stride, int first, int count) {
  if (n + count > capacity) keep_best(wanted / 8);
  constexpr int AT_ONCE = 4 * W;  // mostly none of so many enters
  const Vec bar = set1(threshold);
  const auto enter = [&](int i, unsigned bits) __attribute__((always_inline)) {
    store(score + n, compress(bits, load(scores + i)));
    store_numbers(token + n, first + i, bits);
    for (int row = 0; row < n_rows; ++row)
      store(head_scores + (size_t)row * (capacity + 16) + n, compress(bits, load(heads + (size_t)row * stride + i)));
    n += __builtin_popcount(bits);
  };
  int i = 0;
  for (; i + AT_ONCE <= count; i += AT_ONCE) {
    unsigned bits[4];
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) bits[v] = greater(load(scores + i + v * W), bar);
    if ((bits[0] | bits[1] | bits[2] | bits[3]) == 0) continue;
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) enter(i + v * W, bits[v]);
  }
  for (; i < count; i += W) enter(i, greater(load(scores + i), bar) & first_lanes(count - i));
}

void Candidates::push(const Candidates& other) {
  std::copy_n(other.score, other.n, score + n);
  std::copy_n(other.token, other.n, token + n);
  for (int row = 0; row < n_rows; ++row)
    std::copy_n(other.head_scores + (size_t)row * (other.capacity + 16), other.n,
                head_scores + (size_t)row * (capacity + 16) + n);
  n += other.n;
}

void Candidates::keep_best(int slack) {
  if (n <= wanted + slack) return;
  int n_ties = 0;
  threshold = bar_of_largest(score, n, wanted, &n_ties, slack);
  const Vec bar = set1(threshold);
  int kept = 0;
  for (int i = 0; i < n; i += W) {
    const Vec x = load(score + i);
    unsigned ties = equal(x, bar) & first_lanes(n - i);
    while (__builtin_popcount(ties) > n_ties) ties &= ~(1u << (31 - __builtin_clz(ties)));  // the oldest stay
    n_ties -= __builtin_popcount(ties);
    const unsigned bits = (greater(x, bar) & first_lanes(n - i)) | ties;
    store(score + kept, compress(bits, x));
    Vec tokens;
    memcpy(&tokens, token + i, sizeof(Vec));
    tokens = compress(bits, tokens);
    memcpy(token + kept, &tokens, sizeof(Vec));
    for (int row = 0; row < n_rows; ++row) {
      float* heads = head_scores + (size_t)row * (capacity + 16);
      store(heads + kept, compress(bits, load(heads + i)));
    }
    kept += __builtin_popcount(bits);
  }
  n = kept;
}

// Bisection as in bar_of_largest, for the lowest score that is needed: those above it hold too little.
int Candidates::n_holding(const float* shares, float mass) const {
  int64_t low = ordered(-INFINITY), high = ordered(INFINITY);
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (share_greater(score, shares, n, unordered((int32_t)middle)) >= mass) low = middle + 1;
    else high = middle;
  }
  const float last = unordered((int32_t)low);
  int holding = count_greater(score, n, last);
  float held = share_greater(score, shares, n, last);
  for (int i = 0; i < n && held < mass; ++i)
    if (score[i] == last) held += shares[i], ++holding;  // the oldest first
  return holding;
}

SoftmaxSums SoftmaxSums::in(Arena& arena, int n_rows) {
  const SoftmaxSums sums{arena.take<float>(n_rows), arena.take<float>((size_t)n_rows * LANES), n_rows};
  std::fill_n(sums.peak, n_rows, -INFINITY);
  std::fill_n(sums.total, (size_t)n_rows * LANES, 0.0f);
  return sums;
}

void SoftmaxSums::add_scores(float* scores, int stride, int count) {
  const int n_padded = (int)round_up((size_t)count, LANES);
  for (int row = 0; row < n_rows; ++row) {
    float* x = scores + (size_t)row * stride;
    std::fill(x + count, x + n_padded, -INFINITY);
    Vec highest = load(x);
    for (int i = W; i < n_padded; i += W) highest = max(highest, load(x + i));
    float* lanes = total + row * LANES;
    if (greater(highest, set1(peak[row])) != 0) {  // rare after the first blocks
      const float now = reduce_max(highest), rescale = std::exp(peak[row] - now);
      for (int i = 0; i < LANES; i += W) store(lanes + i, mul(load(lanes + i), set1(rescale)));
      peak[row] = now;
    }
    Vec sum[LANES / W];
    for (int i = 0; i < LANES / W; ++i) sum[i] = load(lanes + i * W);
    for (int i = 0; i < n_padded; i += LANES)
      for (int k = 0; k < LANES / W; ++k) sum[k] = add(sum[k], exp_below(load(x + i + k * W), peak[row]));
    for (int i = 0; i < LANES / W; ++i) store(lanes + i * W, sum[i]);
  }
}

void SoftmaxSums::merge(const SoftmaxSums& other) {
  for (int row = 0; row < n_rows; ++row) {
    const float now = std::max(peak[row], other.peak[row]);
    const float a = std::exp(peak[row] - now), b = std::exp(other.peak[row] - now);
    for (int i = 0; i < LANES; ++i)
      total[row * LANES + i] = total[row * LANES + i] * a + other.total[row * LANES + i] * b;
    peak[row] = now;
  }
}

void SoftmaxSums::add_sinks(const float* sinks) {
  for (int row = 0; row < n_rows; ++row) {
    const float now = std::max(peak[row], sinks[row]), rescale = std::exp(peak[row] - now);
    for (int i = 0; i < LANES; ++i) total[row * LANES + i] *= rescale;
    total[row * LANES] += std::exp(sinks[row] - now);
    peak[row] = now;
  }
}

float SoftmaxSums::share_of(int row, float score) const { return std::exp(score - peak[row]) / total_of(row); }

float SoftmaxSums::total_of(int row) const {
  float sum = 0;
  for (int i = 0; i < LANES; ++i) sum += total[row * LANES + i];
  return sum;
}

}  // namespace sparq
