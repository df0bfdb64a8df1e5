// What Python passes, and how the kernels find a token. vllm_sparq/ops/native.py mirrors the enums, constants and
// structs of api.h's functions; abi.cpp lists them once more, so that a library refuses to be called with others.
//
// Sizes, as in vllm_sparq/ops/__init__.py: B requests, T new tokens, S context length, H query heads, G KV heads, D
// head size, P pages, N tokens per page, M blocks of the longest request.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

namespace sparq {

enum class DType : int32_t { bf16 = 0, fp16 = 1, fp32 = 2 };
enum class RankingType : int32_t { none = 0, int4 = 1, int8 = 2, model = 3, bounds = 4, representatives = 5 };
enum class Rank : int32_t { attention = 0, age = 1 };  // of an eviction: what decides who goes first

// Element types of K, V, query and out. The 16-bit ones are storage only; simd.h converts them.
struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

// Where K or V of a quantized page is: rows of codes, and their scales (step, zero) in the model's type. A row is a
// token, but a channel where K is channel-major (KIVI). Byte offsets into a page, and bytes between rows.
struct Codes {
  int64_t codes, code_stride;
  int64_t scales, scale_stride;
  int32_t bits;       // of a code; 0 where nothing is quantized, like what follows
  int32_t has_zero;   // whether scales are step and zero: codes are unsigned then, else signed
  int32_t group;      // g: elements of a quantization group
  int32_t midpoints;  // whether codes stand for the middles of equal cells of a range, not the outermost for its ends
};

// The KV cache of one layer. vllm_sparq/layout.py decides every number in it.
struct Pages {
  uint8_t* data;
  int64_t page_stride;  // bytes between pages
  int64_t head_stride;  // bytes between the KV heads of a page
  int64_t records;      // byte offsets of the parts; -1 where the layout has no such part
  int64_t ranking;
  int64_t scales;
  int64_t value_sum;
  int64_t positions;   // int32 of the token in each slot
  int64_t attention;   // fp32, what the token in each slot has had
  int32_t n_kv_heads;  // G
  int32_t block_size;  // N
  int32_t head_size;   // D
  DType dtype;
  RankingType ranking_type;
  int32_t channel_keys;     // whether K is channel-major: a group of it is neighbouring tokens of one channel
  int32_t staged_per_page;  // tokens of an unfinished block that fit into a page
  Codes key, value;

  bool quantized() const { return key.bits > 0; }
  bool adds_attention() const { return attention >= 0; }
  uint8_t* page(int32_t id, int head) const { return data + id * page_stride + head * head_stride; }
  int n_blocks(int n_tokens) const { return (n_tokens + block_size - 1) / block_size; }
  size_t element_bytes() const { return dtype == DType::fp32 ? 4 : 2; }
  size_t record_bytes() const { return 2 * head_size * element_bytes(); }  // of a token in the model's own type
};

// A tensor [rows, heads, D], dense in its last dimension; strides in elements.
struct Tensor {
  void* data;
  int64_t row_stride;
  int64_t head_stride;
  int32_t n_heads;
};

// The same with a type.
template <class T>
struct Heads {
  T* data;
  int64_t row_stride;
  int64_t head_stride;

  explicit Heads(const Tensor& tensor) : Heads(tensor, 1) {}
  // As bytes: strides count them.
  Heads(const Tensor& tensor, int64_t element_bytes)
      : data((T*)tensor.data),
        row_stride(tensor.row_stride * element_bytes),
        head_stride(tensor.head_stride * element_bytes) {}

  T* at(int64_t row, int head) const { return data + row * row_stride + head * head_stride; }
};

// What a softmax is over besides the tokens, and how long its logits are.
struct Logits {
  const float* sinks;  // [H] or null: one more logit of each query head, whose value is zero
  float scale;         // of query . K
  float soft_cap;      // 0: none; else logits are soft_cap tanh(logit / soft_cap), those of tokens

  // 2^(sink - peak) of a head, to the base 2: what the sink adds to a sum over the tokens; infinite far above them.
  float sink_weight(int head, float peak) const {
    return sinks != nullptr ? std::exp2(sinks[head] * (float)M_LOG2E - peak) : 0.0f;
  }
};

// Where the tokens of each request are: one row of page ids per request, and its length in tokens.
struct Requests {
  const int32_t* block_table;
  int64_t table_stride;  // elements
  const int32_t* lens;
  int32_t n;  // B

  const int32_t* blocks(int request) const { return block_table + request * table_stride; }
};

// One KV head of one request: finds the record (K row, then V row) of a token.
struct Sequence {
  const Pages* pages;
  const int32_t* blocks;
  int head;
  int len = 0;  // S, where it is asked for

  uint8_t* page(int block) const { return pages->page(blocks[block], head); }
  // Quantized formats: where a token of an unfinished block waits, in the blocks after it.
  uint8_t* staged(int block, int slot) const {
    const int ahead = slot / pages->staged_per_page, place = slot % pages->staged_per_page;
    return page(block + 1 + ahead) + place * pages->record_bytes();
  }
  // In quantized formats the only one that is not read from codes.
  int newest_block() const { return (len - 1) / pages->block_size; }
  // A token that is kept in the model's own type.
  uint8_t* record(int block, int slot) const {
    return pages->quantized() ? staged(block, slot) : page(block) + pages->records + slot * pages->record_bytes();
  }
};

// Calls f(T{}) with the element type of the pages.
template <class F>
void with_dtype(DType dtype, F&& f) {
  if (dtype == DType::bf16) return f(bf16{});
  if (dtype == DType::fp16) return f(fp16{});
  f(float{});
}

// D as a compile-time constant for the head sizes of common models, 0 for "read it from the pages".
template <int D>
struct HeadSize {
  static constexpr int value = D;
};

template <class F>
void with_head_size(int head_size, F&& f) {
  switch (head_size) {
    case 64: return f(HeadSize<64>{});
    case 80: return f(HeadSize<80>{});
    case 96: return f(HeadSize<96>{});
    case 128: return f(HeadSize<128>{});
    case 256: return f(HeadSize<256>{});
    default: return f(HeadSize<0>{});
  }
}

}  // namespace sparq
