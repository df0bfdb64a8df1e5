// The C interface: the functions that Python calls, one a file. vllm_sparq/ops/native.py (`FUNCTIONS`) has the types of their
// arguments; what they mean is in vllm_sparq/ops/<op>/__init__.py. Strides are in elements, addresses those of tensors.
#pragma once

#include "paged.h"

#define SPARQ_API extern "C" __attribute__((visibility("default")))

// The whole interface in one number: differs wherever a caller must not call.
SPARQ_API uint64_t sparq_abi();

SPARQ_API void sparq_write(const sparq::Pages* pages, const void* key, int64_t key_row, int64_t key_head,
                           const void* value, int64_t value_row, int64_t value_head, int32_t n_requests,
                           const int32_t* block_table, int64_t table_stride, const int32_t* query_start_loc,
                           const int32_t* seq_lens, const int32_t* first_positions);

SPARQ_API void sparq_dense_decode(const sparq::Pages* pages, const void* query, int64_t query_row, int64_t query_head,
                                  void* out, int64_t out_row, int64_t out_head, int32_t n_requests, int32_t n_heads,
                                  const int32_t* block_table, int64_t table_stride, const int32_t* seq_lens,
                                  float scale);

SPARQ_API void sparq_sparq_decode(const sparq::Pages* pages, const void* query, int64_t query_row, int64_t query_head,
                                  void* out, int64_t out_row, int64_t out_head, int32_t n_requests, int32_t n_heads,
                                  const int32_t* block_table, int64_t table_stride, const int32_t* seq_lens,
                                  float scale, int32_t r, int64_t min_k, int64_t slope, int64_t slope_divisor,
                                  int64_t local, int64_t dense_below, double alpha_floor, int32_t probs, double mass,
                                  int64_t least_k);

SPARQ_API void sparq_quest_decode(const sparq::Pages* pages, const void* query, int64_t query_row, int64_t query_head,
                                  void* out, int64_t out_row, int64_t out_head, int32_t n_requests, int32_t n_heads,
                                  const int32_t* block_table, int64_t table_stride, const int32_t* seq_lens,
                                  float scale, int64_t min_k, int64_t slope, int64_t slope_divisor,
                                  int64_t dense_below);

SPARQ_API void sparq_prefill(const sparq::Pages* pages, const int32_t* block_table, int64_t table_stride,
                             const int32_t* context_lens, const int32_t* query_start_loc,
                             const int32_t* key_start_loc, int32_t n_requests, int32_t n_heads,
                             const void* query, int64_t query_row, int64_t query_head,
                             const void* key, int64_t key_row, int64_t key_head,
                             const void* value, int64_t value_row, int64_t value_head,
                             void* out, int64_t out_row, int64_t out_head, float scale);

SPARQ_API void sparq_evict(const sparq::Pages* pages, int32_t n_requests, const int32_t* block_table,
                           int64_t table_stride, const int32_t* seq_lens, const int32_t* kept_lens,
                           const int32_t* recent_from, int32_t sinks, int32_t rank);
