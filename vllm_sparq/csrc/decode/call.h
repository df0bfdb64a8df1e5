// The arguments of a decode op, and what its kernels are for these pages.
#pragma once

#include "attend/attend.h"
#include "base/paged.h"
#include "base/scratch.h"
#include "codes/attend_codes.h"

namespace sparq {

// Queries of their own for the first n slots of every request, fp32 [B, n, H, D] and dense.
struct Turned {
  const float* data = nullptr;
  int n = 0, n_heads = 0, head_size = 0;

  // Of a slot, from a head on.
  const float* at(int request, int slot, int head) const {
    return data + (((size_t)request * n + slot) * n_heads + head) * head_size;
  }
};

// The tensors of a decode call; byte addresses, so that only the kernels know the element type.
struct Decode {
  const Pages& pages;
  Requests requests;
  Heads<const uint8_t> query;  // strides in bytes
  Heads<uint8_t> out;
  int n_heads;  // H
  Logits logits;
  AttendKernels kernels;
  CodeKernels codes;  // quantized formats only
  Turned turned{};    // dense reads of pages in the model's type only

  int group_size() const { return n_heads / pages.n_kv_heads; }
  // Of the query group of a KV head [H/G], or null.
  const float* sinks(int head) const { return logits.sinks != nullptr ? logits.sinks + head * group_size() : nullptr; }
  size_t state_floats() const { return State::n_floats(group_size(), pages.head_size); }
  State new_state(float* memory) const;
  Sequence sequence(int request, int head) const {
    return {&pages, requests.blocks(request), head, requests.lens[request]};
  }

  // The query group of a KV head.
  Group group(int request, int head, Arena& arena) const;
  // Rounds the outputs of a query group; weights [H/G] and rest [D] as in AttendKernels::finish, null for 1 and 0.
  void finish(int request, int head, const State& state, const float* weights, const float* rests) const;
  void zero_out(int request) const;
};

Decode decode_call(const Pages& pages, const Requests& requests, const Tensor& query, const Tensor& out,
                   const Logits& logits);

}  // namespace sparq
