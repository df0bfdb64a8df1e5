// vllm_sparq/ops/write: append new tokens to their pages.
#include <omp.h>

#include <algorithm>
#include <vector>

#include "api.h"
#include "base/paged.h"
#include "base/scratch.h"
#include "base/simd.h"
#include "codes/encode.h"
#include "codes/value_sum.h"
#include "rank/ranking_copy.h"

namespace sparq {
namespace {

struct NewTokens {
  Heads<const uint8_t> key, value;  // strides in bytes
  const int32_t* query_start_loc;
  const int32_t* first_positions;  // or null: a token's position is its slot
};

// One block of one KV head of one request: its new tokens are slots first .. last (none in the block before the first
// new one, which only owes its sum), brought by rows from `row` on.
struct Block {
  int request, block, first, last;
  int64_t row;
  bool next_opens;  // the next block gets its first token in this call
};

// Blocks of all requests, in block order: where one request goes on from blocks that another one brings in the same
// call, sums are chained across both.
void plan_blocks(const Pages& pages, const NewTokens& tokens, const Requests& requests, std::vector<Block>& blocks) {
  const int n = pages.block_size;
  blocks.clear();
  for (int b = 0; b < requests.n; ++b) {
    const int64_t start = tokens.query_start_loc[b];
    const int n_new = tokens.query_start_loc[b + 1] - (int)start;
    if (n_new <= 0) continue;
    const int first = requests.lens[b] - n_new, stop = requests.lens[b];
    const bool sum_before = pages.value_sum >= 0 && first % n == 0 && first > 0;
    for (int block = first / n - (sum_before ? 1 : 0); block * n < stop; ++block) {
      const int from = std::max(first, block * n), to = std::min(stop, (block + 1) * n);
      blocks.push_back({b, block, from - block * n, to - block * n, start + from - first, (block + 1) * n < stop});
    }
  }
  std::sort(blocks.begin(), blocks.end(), [](const Block& a, const Block& b) { return a.block < b.block; });
}

// The block of a write, of one KV head.
struct Target {
  const Pages& pages;
  const NewTokens& tokens;
  const Block& block;
  Sequence sequence;

  uint8_t* page(int ahead = 0) const { return sequence.page(block.block + ahead); }
  bool fills() const { return block.first < block.last && block.last == pages.block_size; }
};

// The new tokens go to where their block keeps them in the model's own type, as many at a time as lie in one page.
void copy_tokens(const Target& to) {
  const size_t row_bytes = to.pages.record_bytes() / 2;
  const int head = to.sequence.head, in_page = to.pages.quantized() ? to.pages.staged_per_page : to.pages.block_size;
  int64_t row = to.block.row;
  for (int slot = to.block.first; slot < to.block.last;) {
    const int end = std::min(to.block.last, (slot / in_page + 1) * in_page);
    uint8_t* record = to.sequence.record(to.block.block, slot);
    for (; slot < end; ++slot, ++row, record += 2 * row_bytes) {
      memcpy(record, to.tokens.key.at(row, head), row_bytes);
      memcpy(record + row_bytes, to.tokens.value.at(row, head), row_bytes);
    }
  }
}

// Which token each new slot holds, and that it has had no attention yet.
void note_tokens(const Target& to) {
  const Pages& pages = to.pages;
  const Block& block = to.block;
  auto* const positions = (int32_t*)(to.page() + pages.positions);
  const int32_t* const firsts = to.tokens.first_positions;
  const int nth = (int)(block.row - to.tokens.query_start_loc[block.request]);
  const int first = firsts == nullptr ? block.block * pages.block_size + block.first : firsts[block.request] + nth;
  for (int slot = block.first; slot < block.last; ++slot) positions[slot] = first + slot - block.first;
  auto* const attention = (float*)(to.page() + pages.attention);
  if (pages.adds_attention()) std::fill(attention + block.first, attention + block.last, 0.0f);
}

// K and V of a full block, dense, [N, D] each: tokens of earlier calls from where they are staged, new ones as they
// come.
const uint8_t* gather(const Target& from) {
  thread_local Scratch scratch;
  const Pages& pages = from.pages;
  const size_t row_bytes = pages.record_bytes() / 2, all_values = row_bytes * pages.block_size;
  uint8_t* const rows = scratch.arena().take<uint8_t>(2 * all_values);
  for (int slot = 0; slot < pages.block_size; ++slot) {
    uint8_t* const to = rows + slot * row_bytes;
    const int64_t row = from.block.row + slot - from.block.first;
    const bool old = slot < from.block.first;
    const uint8_t* staged = old ? from.sequence.staged(from.block.block, slot) : nullptr;
    memcpy(to, old ? staged : from.tokens.key.at(row, from.sequence.head), row_bytes);
    memcpy(to + all_values, old ? staged + row_bytes : from.tokens.value.at(row, from.sequence.head), row_bytes);
  }
  return rows;
}

// What a page owes at its last token.
void close_page(const Target& to) {
  const Pages& pages = to.pages;
  uint8_t* const page = to.page();
  const bool ranked = pages.ranking_type != RankingType::none && pages.ranking_type != RankingType::representatives;
  if (!pages.quantized()) {
    if (ranked) make_ranking_copy(pages, page + pages.records, 2 * (int64_t)pages.head_size, page);
    return;
  }
  const uint8_t* const keys = gather(to);
  encode_block(pages, keys, keys + pages.record_bytes() / 2 * pages.block_size, page);
  if (ranked) make_ranking_copy(pages, keys, pages.head_size, page);
}

// Stores the tokens of a block and finishes its page.
void write_block(const Target& to) {
  const Pages& pages = to.pages;
  const Block& block = to.block;
  if (!pages.quantized() || !block.next_opens) copy_tokens(to);  // of quantized blocks, the newest alone stays staged
  if (pages.positions >= 0) note_tokens(to);
  if (to.fills()) close_page(to);
}

// The sum of a block's V goes where the next page wants it; `chain_sums` then turns sums of single pages into sums of
// all pages before.
void sum_block(const Target& of) {
  const Pages& pages = of.pages;
  const Block& block = of.block;
  if (block.block == 0 && block.first == 0) std::fill_n((float*)(of.page() + pages.value_sum), pages.head_size, 0.0f);
  if (block.next_opens) sum_values(pages, of.page(), (float*)(of.page(1) + pages.value_sum));
}

// Whether earlier tokens of the block lie in the pages after it, so that nothing may be written there before it is
// quantized.
bool is_awaited(const Pages& pages, const Block& block) {
  return pages.quantized() && block.first > 0 && block.last == pages.block_size && block.first < block.last;
}

// value_sum of each block that opened += value_sum of the block before, in order.
void chain_sums(const Pages& pages, const Requests& requests, const Block* blocks, size_t n_blocks, int head) {
  for (const Block* block = blocks; block < blocks + n_blocks; ++block) {
    if (!block->next_opens) continue;
    const int32_t* ids = requests.blocks(block->request) + block->block;
    const auto* before = (const float*)(pages.page(ids[0], head) + pages.value_sum);
    auto* sum = (float*)(pages.page(ids[1], head) + pages.value_sum);
    for (int c = 0; c < pages.head_size; c += W) store(sum + c, add(load(before + c), load(sum + c)));
  }
}

// Rough cost in bytes moved, to decide whether threads are worth waking: a page that closes is read a few times.
size_t work(const Pages& pages, const std::vector<Block>& blocks) {
  size_t n_tokens = 0;
  for (const Block& block : blocks)
    n_tokens +=
        block.last - block.first + (block.next_opens || block.last == pages.block_size ? 8 * pages.block_size : 0);
  return n_tokens * pages.n_kv_heads * pages.head_size * 4;
}

void write(const Pages& pages, const NewTokens& tokens, const Requests& requests) {
  constexpr size_t PARALLEL_BYTES = 256 << 10;  // less is done before a team has woken up
  thread_local std::vector<Block> plan;
  plan_blocks(pages, tokens, requests, plan);
  const Block* const blocks = plan.data();
  const int64_t n_blocks = (int64_t)plan.size(), n_heads = pages.n_kv_heads;
#pragma omp parallel if (work(pages, plan) > PARALLEL_BYTES)
  {
    for (const bool awaited : {true, false}) {
      if (awaited && !pages.quantized()) continue;
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < n_blocks * n_heads; ++i) {
        const Block& block = blocks[i / n_heads];
        if (is_awaited(pages, block) != awaited) continue;
        write_block({pages, tokens, block, {&pages, requests.blocks(block.request), (int)(i % n_heads)}});
      }
    }
    if (pages.value_sum >= 0) {
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < n_blocks * n_heads; ++i) {
        const Block& block = blocks[i / n_heads];
        sum_block({pages, tokens, block, {&pages, requests.blocks(block.request), (int)(i % n_heads)}});
      }
#pragma omp for schedule(static)
      for (int64_t head = 0; head < n_heads; ++head) chain_sums(pages, requests, blocks, (size_t)n_blocks, (int)head);
    }
  }
}

}  // namespace
}  // namespace sparq

SPARQ_API void sparq_write(const sparq::Pages& pages, const sparq::Tensor& key, const sparq::Tensor& value,
                           const sparq::Requests& requests, const int32_t* query_start_loc,
                           const int32_t* first_positions) {
  const auto bytes = (int64_t)pages.element_bytes();
  const sparq::NewTokens tokens{sparq::Heads<const uint8_t>(key, bytes), sparq::Heads<const uint8_t>(value, bytes),
                                query_start_loc, first_positions};
  sparq::write(pages, tokens, requests);
}
