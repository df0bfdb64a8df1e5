// The channel-major copy of K of a full page.
#pragma once

#include "paged.h"

namespace sparq {

// Makes `scoring` and `ranges` of a page from K [N, D] of its tokens, in the pages' type; rows `stride` elements apart.
void make_scoring_copy(const Pages& pages, const void* keys, int64_t stride, uint8_t* page);

}  // namespace sparq
