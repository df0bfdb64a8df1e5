// vllm_sparq/ops/evict: drop tokens that have had little attention, and close the gaps, so that whole blocks come free.
#include <omp.h>

#include <algorithm>
#include <climits>
#include <cmath>

#include "api.h"
#include "base/paged.h"
#include "base/scratch.h"
#include "base/simd.h"
#include "codes/coded_tokens.h"
#include "codes/encode.h"
#include "codes/value_sum.h"
#include "rank/ranking_copy.h"
#include "rank/select.h"

namespace sparq {
namespace {

struct Evict {
  const Pages& pages;
  Requests requests;  // lens: slots taken
  const int32_t* kept_lens;
  const int32_t* recent_from;
  int sinks;
  Rank rank;
};

// The token in slot `from` takes slot `to`.
struct Move {
  int32_t from, to;
};

// One KV head of one request; `len` of the sequence is what it held before.
struct Held {
  const Pages& pages;
  Sequence sequence;
  int n_kept;
  bool by_attention;

  int n() const { return sequence.len; }
  int block(int slot) const { return slot / pages.block_size; }
  int place(int slot) const { return slot % pages.block_size; }
  uint8_t* page_of(int slot) const { return sequence.page(block(slot)); }
  int32_t* positions(int block) const { return (int32_t*)(sequence.page(block) + pages.positions); }
  float* attention(int block) const { return (float*)(sequence.page(block) + pages.attention); }
  int32_t& position(int slot) const { return positions(block(slot))[place(slot)]; }
};

// Room for the ranks of n tokens, whole vectors of them.
size_t n_ranks(int n, int block_size) { return round_up((size_t)n, (size_t)block_size) + W; }

// Fetches what ranks the tokens of a block.
void fetch(const Held& held, int block) {
  const uint8_t* const page = held.sequence.page(block);
  for (int byte = 0; byte < 4 * held.pages.block_size; byte += 64) {
    prefetch_l2(page + held.pages.positions + byte);
    if (held.by_attention) prefetch_l2(page + held.pages.attention + byte);
  }
}

// Step 1: ranks[slot], what the token has had or its position; infinite where it must stay, and after the last one.
void rank_tokens(const Held& held, int sinks, int recent_from, float* ranks) {
  const int n = held.pages.block_size;
  const Vec always = set1(INFINITY), never = set1(-INFINITY);
  const int n_blocks = held.pages.n_blocks(held.n());
  constexpr int AHEAD = 4;  // blocks; takes a third off where one of 4096 tokens goes
  for (int block = 0; block < std::min(AHEAD, n_blocks); ++block) fetch(held, block);
  for (int first = 0; first < held.n(); first += n) {
    if (first / n + AHEAD < n_blocks) fetch(held, first / n + AHEAD);
    const int32_t* const positions = held.positions(first / n);
    const float* const attention = held.by_attention ? held.attention(first / n) : nullptr;
    for (int i = 0; i < n; i += W) {
      Vec rank = load(positions + i);
      if (attention != nullptr) {
        rank = load(attention + i);
        rank = select(equal(rank, rank), rank, never);
      }
      const unsigned stay = above(positions + i, recent_from - 1) | ~above(positions + i, sinks - 1);
      store(ranks + first + i, select(stay & ((1u << W) - 1), always, rank));
    }
  }
  const size_t end = n_ranks(held.n(), n);
  std::fill(ranks + held.n(), ranks + end, INFINITY);
}

// The slot of the one token that goes: of those with the lowest rank the newest.
int worst_of(const Held& held, const float* ranks) {
  Vec lowest = set1(INFINITY);
  for (int i = 0; i < held.n(); i += W) lowest = min(lowest, load(ranks + i));
  const Vec bar = set1(-reduce_max(sub(zero(), lowest)));
  int worst = -1;
  for (int i = 0; i < held.n(); i += W) {
    for (unsigned ties = equal(load(ranks + i), bar); ties != 0; ties &= ties - 1) {
      const int slot = i + __builtin_ctz(ties);
      if (slot < held.n() && (worst < 0 || held.position(slot) > held.position(worst))) worst = slot;
    }
  }
  return worst;
}

// Who stays: ranks above a bar, and on it the oldest.
struct Bar {
  float rank;
  int32_t position;

  bool passes(const Held& held, const float* ranks, int slot) const {
    return ranks[slot] > rank || (ranks[slot] == rank && held.position(slot) <= position);
  }
};

Bar find_bar(const Held& held, const float* ranks, int32_t* ties) {
  int n_staying = 0, n_ties = 0;
  const float rank = bar_of_largest(ranks, held.n(), held.n_kept, &n_staying);
  for (int slot = 0; slot < held.n(); ++slot)
    if (ranks[slot] == rank) ties[n_ties++] = held.position(slot);
  if (n_staying >= n_ties) return {rank, INT_MAX};
  if (n_staying == 0) return {rank, INT_MIN};
  std::nth_element(ties, ties + n_staying - 1, ties + n_ties);
  return {rank, ties[n_staying - 1]};
}

// Steps 1 and 2: the moves that close the gaps, at most one per token that goes; returns how many.
int plan_moves(const Held& held, int sinks, int recent_from, Move* moves) {
  thread_local Scratch scratch;
  const size_t n = n_ranks(held.n(), held.pages.block_size);
  Arena arena = scratch.arena();
  float* const ranks = arena.take<float>(n);
  rank_tokens(held, sinks, recent_from, ranks);
  if (held.n_kept == held.n() - 1) {  // a step of an answer: nothing to sort
    const int worst = worst_of(held, ranks);
    moves[0] = {held.n_kept, worst};
    return worst < held.n_kept ? 1 : 0;
  }
  const Bar bar = find_bar(held, ranks, arena.take<int32_t>(n));
  int n_moves = 0;
  for (int to = 0, from = held.n_kept; to < held.n_kept; ++to) {
    if (bar.passes(held, ranks, to)) continue;
    while (!bar.passes(held, ranks, from)) ++from;
    moves[n_moves++] = {from++, to};
  }
  return n_moves;
}

// Bytes of a page that codes and scales reach; those of V come last.
size_t coded_bytes(const Pages& pages) {
  const int64_t last = pages.value.scales + (pages.block_size - 1) * pages.value.scale_stride;
  return last + CodeShape::values(pages).scale_bytes();
}

// The newest block of a quantized format, which waits in the model's own type, made to look like any other.
struct Newest {
  uint8_t* keys;  // [N, D] in the pages' type
  uint8_t* page;  // its codes, as a page has them; else room for them

  static Newest of(const Held& held, bool wanted, Arena& arena) {
    const Pages& pages = held.pages;
    const size_t row_bytes = pages.record_bytes() / 2, rows = pages.block_size * row_bytes;
    uint8_t *const keys = arena.take<uint8_t>(rows), *const values = arena.take<uint8_t>(rows);
    const Newest newest{keys, arena.take<uint8_t>(coded_bytes(pages))};
    if (!wanted) return newest;
    const int block = held.sequence.newest_block(), last = held.place(held.n() - 1);
    for (int slot = 0; slot < pages.block_size; ++slot) {
      const uint8_t* const staged = held.sequence.staged(block, std::min(slot, last));
      memcpy(keys + slot * row_bytes, staged, row_bytes);
      memcpy(values + slot * row_bytes, staged + row_bytes, row_bytes);
    }
    encode_block(pages, keys, values, newest.page);
    return newest;
  }
};

void copy_row(const Codes& where, const CodeShape& shape, const uint8_t* from, int row, uint8_t* to, int to_row) {
  memcpy(to + where.codes + to_row * where.code_stride, from + where.codes + row * where.code_stride,
         shape.row_bytes());
  memcpy(to + where.scales + to_row * where.scale_stride, from + where.scales + row * where.scale_stride,
         shape.scale_bytes());
}

// Channel-major K of one block that tokens have moved to: groups that one of them joined are quantized again.
template <class T>
class KeyGroups {
  using Decoder = CodedTokens<T, false>;

 public:
  KeyGroups(const Held& held, const Newest& newest, Arena& arena)
      : held_(held),
        newest_(newest),
        old_(held.pages, arena),
        sources_(held.pages, arena),
        rows_(arena.take<T>((size_t)held.pages.block_size * held.pages.head_size)),
        source_rows_(arena.take<T>((size_t)Decoder::TOKENS * held.pages.head_size)),
        mask_(arena.take<uint8_t>(CodeShape::keys(held.pages).row_bytes())) {}

  // Moves to one block, all of them.
  void remake(const Move* moves, int n) {
    const Pages& pages = held_.pages;
    const int d = pages.head_size;
    uint8_t* const page = held_.page_of(moves[0].to);
    for (int slot = 0; slot < pages.block_size; slot += Decoder::TOKENS)
      old_.keys(page, slot, rows_ + (size_t)slot * d);
    std::fill_n(mask_, CodeShape::keys(pages).row_bytes(), uint8_t{0});
    for (int i = 0; i < n; ++i) {
      T* const row = rows_ + (size_t)held_.place(moves[i].to) * d;
      memcpy((void*)row, key(moves[i].from), d * sizeof(T));
    }
    encode_keys(pages, rows_, newest_.page);
    for (int i = 0, last = -1; i < n; ++i) {
      const int group = held_.place(moves[i].to) / pages.key.group;
      if (group != last) take_group(last = group, page);
    }
    take_codes(page);
  }

 private:
  const T* key(int slot) {
    const int d = held_.pages.head_size, block = held_.block(slot), place = held_.place(slot);
    if (block == held_.sequence.newest_block()) return (const T*)newest_.keys + (size_t)place * d;
    const int first = slot - place % Decoder::TOKENS;
    if (first != decoded_) sources_.keys(held_.page_of(slot), place - place % Decoder::TOKENS, source_rows_);
    decoded_ = first;
    return source_rows_ + (size_t)(place % Decoder::TOKENS) * d;
  }

  // Its scales now, and which bits of a row are its codes.
  void take_group(int group, uint8_t* page) {
    const Pages& pages = held_.pages;
    const CodeShape shape = CodeShape::keys(pages);
    for (int c = 0; c < pages.head_size; ++c) {
      const int64_t at = pages.key.scales + c * pages.key.scale_stride + group * 2 * (int64_t)sizeof(T);
      memcpy(page + at, newest_.page + at, 2 * sizeof(T));
    }
    for (int slot = group * shape.group; slot < (group + 1) * shape.group; ++slot) {
      const int plane = slot / shape.row_bytes(), bits = ((1 << shape.bits) - 1) << (plane * shape.bits);
      mask_[slot % shape.row_bytes()] |= (uint8_t)bits;
    }
  }

  void take_codes(uint8_t* page) {
    const Codes& key = held_.pages.key;
    const int n = CodeShape::keys(held_.pages).row_bytes();
    for (int c = 0; c < held_.pages.head_size; ++c) {
      uint8_t* const to = page + key.codes + c * key.code_stride;
      const uint8_t* const from = newest_.page + key.codes + c * key.code_stride;
      for (int i = 0; i < n; ++i) to[i] = (uint8_t)((to[i] & ~mask_[i]) | (from[i] & mask_[i]));
    }
  }

  const Held& held_;
  const Newest& newest_;
  Decoder old_, sources_;
  T *rows_, *source_rows_;
  uint8_t* mask_;
  int decoded_ = -1;
};

// f(first move, moves) for each block that tokens move to; the moves ascend.
template <class F>
void each_target(const Held& held, const Move* moves, int n_moves, F&& f) {
  for (int first = 0, stop; first < n_moves; first = stop) {
    for (stop = first + 1; stop < n_moves && held.block(moves[stop].to) == held.block(moves[first].to);) ++stop;
    f(moves + first, stop - first);
  }
}

// Step 2, quantized formats: tokens take their codes along.
void move_codes(const Held& held, const Move* moves, int n_moves) {
  thread_local Scratch scratch;
  const Pages& pages = held.pages;
  with_dtype(pages.dtype, [&](auto type) {
    using T = decltype(type);
    Arena arena = scratch.arena();
    const int first_staged = held.sequence.newest_block() * pages.block_size;
    const Newest newest = Newest::of(held, moves[n_moves - 1].from >= first_staged, arena);
    for (const Move* move = moves; move < moves + n_moves; ++move) {
      const uint8_t* const from = move->from < first_staged ? held.page_of(move->from) : newest.page;
      uint8_t* const to = held.page_of(move->to);
      const int row = held.place(move->from), to_row = held.place(move->to);
      copy_row(pages.value, CodeShape::values(pages), from, row, to, to_row);
      if (!pages.channel_keys) copy_row(pages.key, CodeShape::keys(pages), from, row, to, to_row);
    }
    if (!pages.channel_keys) return;
    KeyGroups<T> keys(held, newest, arena);
    each_target(held, moves, n_moves, [&](const Move* first, int n) { keys.remake(first, n); });
  });
}

// Step 2.
void move_tokens(const Held& held, const Move* moves, int n_moves) {
  const Pages& pages = held.pages;
  for (const Move* move = moves; move < moves + n_moves; ++move) {
    const int block = held.block(move->from), place = held.place(move->from);
    held.position(move->to) = held.position(move->from);
    if (pages.adds_attention())
      held.attention(held.block(move->to))[held.place(move->to)] = held.attention(block)[place];
    if (!pages.quantized())
      memcpy(held.sequence.record(held.block(move->to), held.place(move->to)), held.sequence.record(block, place),
             pages.record_bytes());
  }
  if (pages.quantized()) move_codes(held, moves, n_moves);
}

// The ranking copy of a page some of whose tokens are new.
void remake_copy(const Pages& pages, uint8_t* page) {
  if (!pages.quantized()) return make_ranking_copy(pages, page + pages.records, 2 * (int64_t)pages.head_size, page);
  thread_local Scratch scratch;
  with_dtype(pages.dtype, [&](auto type) {
    using T = decltype(type);
    using Decoder = CodedTokens<T, false>;
    const size_t d = pages.head_size, n = pages.block_size;
    Arena arena = scratch.arena();
    Decoder tokens(pages, arena);
    T* const rows = arena.take<T>(n * d);
    for (size_t slot = 0; slot < n; slot += Decoder::TOKENS) tokens.keys(page, (int)slot, rows + slot * d);
    make_ranking_copy(pages, rows, (int64_t)d, page);
  });
}

// Step 3: what pages derive from their tokens.
void remake(const Held& held, const Move* moves, int n_moves) {
  const Pages& pages = held.pages;
  if (pages.ranking_type != RankingType::none) {
    each_target(held, moves, n_moves, [&](const Move* first, int) {
      const int block = held.block(first->to);
      if ((block + 1) * pages.block_size <= held.n_kept) remake_copy(pages, held.sequence.page(block));
    });
  }
  if (pages.value_sum < 0) return;
  for (int block = held.block(moves[0].to) + 1; block <= held.block(held.n_kept - 1); ++block) {
    const uint8_t* const before = held.sequence.page(block - 1);
    const auto* sum_before = (const float*)(before + pages.value_sum);
    auto* sum = (float*)(held.sequence.page(block) + pages.value_sum);
    sum_values(pages, before, sum);
    for (int c = 0; c < pages.head_size; c += W) store(sum + c, add(load(sum_before + c), load(sum + c)));
  }
}

void evict_head(const Evict& call, int request, int head) {
  thread_local Scratch scratch;
  const int n_held = call.requests.lens[request], n_kept = call.kept_lens[request];
  const Held held{
      call.pages, {&call.pages, call.requests.blocks(request), head, n_held}, n_kept, call.rank == Rank::attention};
  Move* const moves = scratch.arena().take<Move>(n_held - n_kept);
  const int n_moves = plan_moves(held, call.sinks, call.recent_from[request], moves);
  if (n_moves == 0) return;
  move_tokens(held, moves, n_moves);
  remake(held, moves, n_moves);
}

// Rough cost in bytes moved, to decide whether threads are worth waking.
size_t work(const Evict& call) {
  const Pages& pages = call.pages;
  const bool derives = pages.quantized() || pages.ranking_type != RankingType::none || pages.value_sum >= 0;
  size_t total = 0;
  for (int b = 0; b < call.requests.n; ++b) {
    const size_t n_held = call.requests.lens[b], n_kept = call.kept_lens[b];
    if (n_kept == n_held) continue;
    total += 8 * n_held + (derives ? n_kept : 2 * std::min(n_kept, n_held - n_kept)) * pages.record_bytes();
  }
  return total * pages.n_kv_heads;
}

void evict(const Evict& call) {
  constexpr size_t PARALLEL_BYTES = 256 << 10;  // less is done before a team has woken up
  const int n_heads = call.pages.n_kv_heads, n_tasks = call.requests.n * n_heads;
#pragma omp parallel for schedule(dynamic, 1) if (work(call) > PARALLEL_BYTES)
  for (int i = 0; i < n_tasks; ++i)
    if (const int b = i / n_heads; call.kept_lens[b] < call.requests.lens[b]) evict_head(call, b, i % n_heads);
}

}  // namespace
}  // namespace sparq

SPARQ_API void sparq_evict(const sparq::Pages& pages, const sparq::Requests& requests, const int32_t* kept_lens,
                           const int32_t* recent_from, int32_t sinks, sparq::Rank rank) {
  sparq::evict({pages, requests, kept_lens, recent_from, sinks, rank});
}
