// A full block becomes codes and scales.
#pragma once

#include "base/paged.h"

namespace sparq {

// Quantizes K and V [N, D], dense and in the pages' type, into a page: the codes and scales of vllm_sparq/ops/codec.py,
// bit for bit (of a zero not its sign, of a NaN not which).
void encode_block(const Pages& pages, const void* keys, const void* values, uint8_t* page);

// K alone.
void encode_keys(const Pages& pages, const void* keys, uint8_t* page);

}  // namespace sparq
