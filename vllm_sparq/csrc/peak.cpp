// The most multiply-adds that this CPU does with the instruction that prefill consists of, whose operands are all in
// registers: what `bench ops --op prefill` sets beside its times. Not part of the interface of the ops.
#include <omp.h>

#include "api.h"
#include "prefill/tokens.h"

namespace sparq {
namespace {

constexpr int SUMS = 12;  // independent: above latency times instructions a cycle, and there are registers for them

// Multiply-adds of a round.
template <class M>
constexpr int64_t per_round(M) {
  return SUMS * W * M::per_cell;
}

template <class M>
float multiply(M, int64_t rounds) {
  Vec sums[SUMS];
#pragma GCC unroll 16
  for (int i = 0; i < SUMS; ++i) sums[i] = set1((float)i);  // equal ones would be computed once
  const Vec a = rounded(set1(0.5f)), b = rounded(set1(0.25f));
  for (int64_t i = 0; i < rounds; ++i)
#pragma GCC unroll 16
    for (Vec& sum : sums) sum = M::dot(sum, a, b);
  Vec total = zero();
#pragma GCC unroll 16
  for (const Vec& sum : sums) total = add(total, sum);
  return reduce_add(total);
}

#ifdef __AMX_BF16__
constexpr int64_t per_round(prefill::Bf16Tiles) { return 4 * 16 * 16 * 32; }

float multiply(prefill::Bf16Tiles, int64_t rounds) {
  const prefill::TileRegisters registers;
  for (int64_t i = 0; i < rounds; ++i) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  return 0;
}
#endif

}  // namespace
}  // namespace sparq

// Every thread does `rounds` of them; returns how many multiply-adds that are.
SPARQ_API int64_t sparq_multiply_adds(sparq::DType dtype, int64_t rounds) {
  using namespace sparq;
  int64_t n = 0;
  with_dtype(dtype, [&](auto type) {
    using M = typename prefill::Model<decltype(type)>::M;
    float kept = 0;
#pragma omp parallel reduction(+ : kept)
    kept += multiply(M{}, rounds);
    asm volatile("" : : "m"(kept));
    n = omp_get_max_threads() * rounds * per_round(M{});
  });
  return n;
}
