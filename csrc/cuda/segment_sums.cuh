// Segment sums by blocks of equal token counts; the last block to arrive completes segments that span several blocks.
#pragma once

#include "segmented_scan.cuh"

namespace pk {

// Writes, for each segment whose first token lies in this block's range, the sum of its tokens in that range; publishes
// the block's map. Empty segments sum to 0. The scan runs in reverse.
__device__ inline void sum_segments(const float* values, const Packed& packed, double* out, pk_affine* published) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t s = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x; s < packed.segments; s += step) {
    if (packed.cu[s] == packed.cu[s + 1]) out[s] = 0.0;
  }
  const auto input = [&](int64_t token, const Segment&) {
    return Affine<1>{1.0, {static_cast<double>(values[token])}};
  };
  const auto store = [&](int64_t token, const Segment& segment, const double* y) {
    if (token == segment.begin) out[segment.index] = y[0];
  };
  const BlockRange range(packed.tokens, blockIdx.x, gridDim.x);
  const Affine<1> last = scan_block<1>(packed, range, identity<1>(), input, store);
  if (threadIdx.x == 0) published[blockIdx.x] = {last.weight, last.value[0]};
}

// For the last block to arrive: completes the sum of each segment that begins in one block's range and continues into
// others.
__device__ inline void join_segments(const Packed& packed, double* out, const pk_affine* published) {
  for (int64_t block = threadIdx.x; block < gridDim.x; block += kThreads) {
    const BlockRange range(packed.tokens, block, gridDim.x);
    if (range.empty()) continue;
    Segment open;
    open.seek(packed.cu, packed.segments, packed.token(range.begin));
    const bool began_before = packed.first(open) < range.begin;
    const bool ends_here = packed.first(open) + (open.end - open.begin) <= range.end;
    if (!began_before || !ends_here) continue;
    const auto map_of = [&](int64_t b) { return Affine<1>{published[b].weight, {published[b].value}}; };
    out[open.index] += carry_into<1>(block, map_of).value[0];
  }
}

}  // namespace pk
