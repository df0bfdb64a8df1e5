// vllm_sparq/ops/dense_decode: attention of one new token per request over all its pages.
#include "api.h"
#include "decode/dense.h"

SPARQ_API void sparq_dense_decode(const sparq::Pages& pages, const sparq::Tensor& query, const sparq::Tensor& out,
                                  const sparq::Requests& requests, const sparq::Logits& logits) {
  sparq::attend_all(sparq::decode_call(pages, requests, query, out, logits));
}
