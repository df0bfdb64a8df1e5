// The channel-major copy of K of a full page.
#pragma once

#include "paged.h"

namespace sparq {

// Makes `scoring` and `ranges` of a page from its K.
void make_scoring_copy(const Pages& pages, uint8_t* page);

}  // namespace sparq
