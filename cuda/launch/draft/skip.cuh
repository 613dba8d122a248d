/* The full form where only winners count, compiled by itself: full.cu calls it. */
#pragma once

#include "common/host.cuh"

namespace dspark {

/* dspark_draft_full with w2_bounds; its arguments are checked. */
dspark_status draft_skip(const dspark_draft_full_params& params, dspark_stream stream);

}  // namespace dspark
