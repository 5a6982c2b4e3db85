// The running sum that a block of a cooperative launch starts from.
#pragma once

#include <cooperative_groups.h>

#include "segmented_scan.cuh"

namespace pk {

// Publishes each block's map, for which only the segment that is open at the end of its range matters; after a barrier
// over the grid, the maps of the blocks before give the carry.
template <typename T>
__device__ Affine<1> carry_over_blocks(const T* values, const Packed& packed, const BlockRange& range, double gamma,
                                       Affine<1>* published) {
  if (gridDim.x == 1) return {0.0, {}};
  double sum = 0.0;
  double weight = 1.0;
  if (!range.empty()) {
    Segment open;
    open.seek(packed.cu, packed.segments, packed.token(range.end - 1));
    const bool begins = packed.first(open) >= range.begin;
    const int64_t from = begins ? packed.first(open) : range.begin;
    for (int64_t p = from + threadIdx.x; p < range.end; p += kThreads) {
      sum += power(gamma, range.end - 1 - p) * static_cast<double>(values[packed.token(p)]);
    }
    weight = begins ? 0.0 : power(gamma, range.end - range.begin);
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) published[blockIdx.x] = {weight, {sum}};
  cooperative_groups::this_grid().sync();
  return carry_into<1>(blockIdx.x, [&](int64_t block) { return published[block]; });
}

}  // namespace pk
