// One number for the interface, as vllm_sparq/ops/native.py (`abi`) puts it together: an old library beside newer
// Python is refused when it is loaded.
#include <initializer_list>

#include "api.h"

namespace sparq {
namespace {

constexpr int ABI_VERSION = 1;  // raised by hand where the meaning changes and none of these numbers does

// As in `C_TYPES` of native.py.
template <class T>
constexpr char LETTER = 0;
template <>
constexpr char LETTER<const Pages&> = 'P';
template <>
constexpr char LETTER<const Tensor&> = 'T';
template <>
constexpr char LETTER<const Requests&> = 'R';
template <>
constexpr char LETTER<const Logits&> = 'L';
template <>
constexpr char LETTER<const SparqRead&> = 'S';
template <>
constexpr char LETTER<const SpansRead&> = 'N';
template <>
constexpr char LETTER<const int32_t*> = 'p';
template <>
constexpr char LETTER<int32_t> = 'i';
template <>
constexpr char LETTER<Rank> = 'i';

struct Digest {
  uint64_t value = 0xcbf29ce484222325;  // FNV-1a, a number at a time

  constexpr void add(uint64_t number) { value = (value ^ number) * 0x100000001b3; }
  constexpr void add_all(std::initializer_list<size_t> numbers) {
    for (const size_t number : numbers) add(number);
  }
  template <class... E>
  constexpr void add_enum(E... values) {
    (add((uint64_t)values), ...);
  }
  template <class... A>
  constexpr void add_arguments(void (*)(A...)) {
    static_assert(((LETTER<A> != 0) && ...));
    (add((uint64_t)LETTER<A>), ...);
  }
};

#define AT(member) offsetof(Type, member)

constexpr uint64_t digest() {
  Digest digest;
  digest.add_all({ABI_VERSION, SPAN_TOKENS, REPRESENTATIVES, WINDOW_SPANS});
  digest.add_enum(DType::bf16, DType::fp16, DType::fp32);
  digest.add_enum(RankingType::none, RankingType::int4, RankingType::int8, RankingType::model, RankingType::bounds,
                  RankingType::representatives);
  digest.add_enum(Rank::attention, Rank::age);
  {
    using Type = Codes;
    digest.add_all({sizeof(Type), AT(codes), AT(code_stride), AT(scales), AT(scale_stride), AT(bits), AT(has_zero),
                    AT(group), AT(midpoints)});
  }
  {
    using Type = Pages;
    digest.add_all({sizeof(Type), AT(data), AT(page_stride), AT(head_stride), AT(records), AT(ranking), AT(scales),
                    AT(value_sum), AT(positions), AT(attention), AT(n_kv_heads), AT(block_size), AT(head_size),
                    AT(dtype), AT(ranking_type), AT(channel_keys), AT(staged_per_page), AT(key), AT(value)});
  }
  {
    using Type = Tensor;
    digest.add_all({sizeof(Type), AT(data), AT(row_stride), AT(head_stride), AT(n_heads)});
  }
  {
    using Type = Requests;
    digest.add_all({sizeof(Type), AT(block_table), AT(table_stride), AT(lens), AT(n)});
  }
  {
    using Type = Logits;
    digest.add_all({sizeof(Type), AT(sinks), AT(scale), AT(soft_cap)});
  }
  {
    using Type = SparqRead;
    digest.add_all({sizeof(Type), AT(min_k), AT(slope), AT(slope_divisor), AT(dense_below), AT(local), AT(least_k),
                    AT(r), AT(probs), AT(alpha_floor), AT(mass)});
  }
  {
    using Type = SpansRead;
    digest.add_all({sizeof(Type), AT(min_k), AT(slope), AT(slope_divisor), AT(dense_below), AT(least), AT(n_first),
                    AT(least_newest), AT(local)});
  }
  digest.add_arguments(sparq_write);
  digest.add_arguments(sparq_dense_decode);
  digest.add_arguments(sparq_turned_decode);
  digest.add_arguments(sparq_sparq_decode);
  digest.add_arguments(sparq_quest_decode);
  digest.add_arguments(sparq_represent);
  digest.add_arguments(sparq_prefill);
  digest.add_arguments(sparq_evict);
  return digest.value;
}

#undef AT

}  // namespace
}  // namespace sparq

SPARQ_API uint64_t sparq_abi() {
  constexpr uint64_t value = sparq::digest();
  return value;
}
