// The C interface: the functions that Python calls, one a file. vllm_sparq/ops/native.py has the same structs and
// signatures; what the arguments mean is in vllm_sparq/ops/<op>/__init__.py. int32_t pointers are dense tensors.
#pragma once

#include "base/paged.h"
#include "base/reads.h"

#define SPARQ_API extern "C" __attribute__((visibility("default")))

// The whole interface in one number: differs wherever a caller must not call.
SPARQ_API uint64_t sparq_abi();

SPARQ_API void sparq_write(const sparq::Pages& pages, const sparq::Tensor& key, const sparq::Tensor& value,
                           const sparq::Requests& requests, const int32_t* query_start_loc,
                           const int32_t* first_positions);

SPARQ_API void sparq_dense_decode(const sparq::Pages& pages, const sparq::Tensor& query, const sparq::Tensor& out,
                                  const sparq::Requests& requests, const sparq::Logits& logits);

// turned: fp32 [B, n H, D], dense.
SPARQ_API void sparq_turned_decode(const sparq::Pages& pages, const sparq::Tensor& query, const sparq::Tensor& turned,
                                   const sparq::Tensor& out, const sparq::Requests& requests,
                                   const sparq::Logits& logits);

SPARQ_API void sparq_sparq_decode(const sparq::Pages& pages, const sparq::Tensor& query, const sparq::Tensor& out,
                                  const sparq::Requests& requests, const sparq::Logits& logits,
                                  const sparq::SparqRead& read);

SPARQ_API void sparq_quest_decode(const sparq::Pages& pages, const sparq::Tensor& query, const sparq::Tensor& out,
                                  const sparq::Requests& requests, const sparq::Logits& logits,
                                  const sparq::SpansRead& read);

SPARQ_API void sparq_represent(const sparq::Pages& pages, const sparq::Tensor& query, const sparq::Requests& requests,
                               const int32_t* query_start_loc);

// requests.lens: the tokens that pages hold; query_start_loc, key_start_loc: [B + 1].
SPARQ_API void sparq_prefill(const sparq::Pages& pages, const sparq::Tensor& query, const sparq::Tensor& key,
                             const sparq::Tensor& value, const sparq::Tensor& out, const sparq::Requests& requests,
                             const int32_t* query_start_loc, const int32_t* key_start_loc, const sparq::Logits& logits);

// requests.lens: slots taken.
SPARQ_API void sparq_evict(const sparq::Pages& pages, const sparq::Requests& requests, const int32_t* kept_lens,
                           const int32_t* recent_from, int32_t sinks, sparq::Rank rank);
