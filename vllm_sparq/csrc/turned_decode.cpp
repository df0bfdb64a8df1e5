// vllm_sparq/ops/turned_attention: dense_decode where the first slots are seen by queries of their own.
#include "api.h"
#include "decode/dense.h"

SPARQ_API void sparq_turned_decode(const sparq::Pages& pages, const sparq::Tensor& query, const sparq::Tensor& turned,
                                   const sparq::Tensor& out, const sparq::Requests& requests,
                                   const sparq::Logits& logits) {
  sparq::Decode call = sparq::decode_call(pages, requests, query, out, logits);
  call.turned = {(const float*)turned.data, turned.n_heads / query.n_heads, query.n_heads, pages.head_size};
  sparq::attend_all(call);
}
