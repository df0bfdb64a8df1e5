// vllm_sparq/ops/write: append new tokens to their pages.
#include <omp.h>

#include <algorithm>
#include <vector>

#include "paged.h"
#include "scoring_copy.h"
#include "simd.h"
#include "value_sum.h"

namespace sparq {
namespace {

struct NewTokens {
  Heads<const uint8_t> key, value;  // strides in bytes
  const int32_t* query_start_loc;
};

// One block of one KV head of one request: its new tokens are slots first .. last (none in the block before the first
// new one, which only owes its sum), brought by rows from `row` on.
struct Block {
  int request, block, first, last;
  int64_t row;
  bool next_opens;  // the next block gets its first token in this call
};

// Blocks of all requests, those of one request in order.
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
}

// Copies the tokens of a block and finishes its page. The sum of its V goes where the next page wants it; `chain_sums`
// then turns sums of single pages into sums of all pages before.
void write_block(const Pages& pages, const NewTokens& tokens, const Requests& requests, const Block& block, int head) {
  const int32_t* ids = requests.blocks(block.request);
  uint8_t* page = pages.page(ids[block.block], head);
  const size_t row_bytes = (size_t)pages.head_size * (pages.dtype == DType::fp32 ? 4 : 2);
  uint8_t* record = page + pages.records + 2 * row_bytes * block.first;
  for (int64_t row = block.row; row < block.row + block.last - block.first; ++row, record += 2 * row_bytes) {
    memcpy(record, tokens.key.at(row, head), row_bytes);
    memcpy(record + row_bytes, tokens.value.at(row, head), row_bytes);
  }
  if (pages.value_sum >= 0 && block.block == 0 && block.first == 0)
    std::fill_n((float*)(page + pages.value_sum), pages.head_size, 0.0f);
  if (pages.value_sum >= 0 && block.next_opens) {
    auto* sum = (float*)(pages.page(ids[block.block + 1], head) + pages.value_sum);
    std::fill_n(sum, pages.head_size, 0.0f);
    add_values(pages, page, pages.block_size, sum);
  }
  if (pages.scoring_type != Scoring::none && block.last == pages.block_size && block.first < block.last)
    make_scoring_copy(pages, page);
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
    n_tokens += block.last - block.first + (block.next_opens || block.last == pages.block_size ? 8 * pages.block_size : 0);
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
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < n_blocks * n_heads; ++i)
      write_block(pages, tokens, requests, blocks[i / n_heads], (int)(i % n_heads));
    if (pages.value_sum >= 0) {
#pragma omp for schedule(static)
      for (int64_t head = 0; head < n_heads; ++head)
        chain_sums(pages, requests, blocks, (size_t)n_blocks, (int)head);
    }
  }
}

}  // namespace
}  // namespace sparq

SPARQ_API void sparq_write(const sparq::Pages* pages, const void* key, int64_t key_row, int64_t key_head,
                           const void* value, int64_t value_row, int64_t value_head, int32_t n_requests,
                           const int32_t* block_table, int64_t table_stride, const int32_t* query_start_loc,
                           const int32_t* seq_lens) {
  const int64_t bytes = pages->dtype == sparq::DType::fp32 ? 4 : 2;
  const sparq::NewTokens tokens{{(const uint8_t*)key, key_row * bytes, key_head * bytes},
                                {(const uint8_t*)value, value_row * bytes, value_head * bytes},
                                query_start_loc};
  sparq::write(*pages, tokens, {block_table, table_stride, seq_lens, n_requests});
}
