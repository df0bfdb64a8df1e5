// The channel-major copy of K of a full page, or the bounds of its spans.
#pragma once

#include "base/paged.h"

namespace sparq {

// Makes `ranking` and `scales` of a page from K [N, D] of its tokens, in the pages' type; rows `stride` elements apart.
void make_ranking_copy(const Pages& pages, const void* keys, int64_t stride, uint8_t* page);

// The bounds [2, D] of one span, in the pages' type, from its n <= 16 rows of K.
void bound_span(const Pages& pages, const uint8_t* const* rows, int n, uint8_t* bounds);

}  // namespace sparq
