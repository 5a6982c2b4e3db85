// Sums of segments by blocks that each see a share of the tokens: what one block cannot finish, the last to arrive does.
#pragma once

#include "segmented_scan.cuh"

namespace pk {

// The sum of each segment from the last token of this share to its first token, where that lies in the share. `left`
// gets, for each block, what it leaves to the next. Empty segments sum to 0.
__device__ inline void sum_segments(const float* values, const Packed& packed, double* out, pk_block_left* left) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t s = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x; s < packed.segments; s += step) {
    if (packed.cu[s] == packed.cu[s + 1]) out[s] = 0.0;
  }
  const auto input = [&](int64_t token, const Segment&) { return Link<1>{1.0, {static_cast<double>(values[token])}}; };
  const auto store = [&](int64_t token, const Segment& segment, const double* y) {
    if (token == segment.begin) out[segment.index] = y[0];
  };
  const Share share(packed.tokens, blockIdx.x, gridDim.x);
  const Link<1> last = scan_share<1>(packed, share, identity<1>(), input, store);
  if (threadIdx.x == 0) left[blockIdx.x] = {last.weight, last.value[0]};
}

// By the last block to arrive: adds to each segment that was open where a share begins, and ends in it, what the shares
// before hold of it.
__device__ inline void join_segments(const Packed& packed, double* out, const pk_block_left* left) {
  for (int64_t block = threadIdx.x; block < gridDim.x; block += kThreads) {
    const Share share(packed.tokens, block, gridDim.x);
    if (share.empty()) continue;
    Segment open;
    open.seek(packed.cu, packed.segments, packed.token(share.begin));
    const bool came_in = packed.first(open) < share.begin;
    const bool ends_here = packed.first(open) + (open.end - open.begin) <= share.end;
    if (!came_in || !ends_here) continue;
    const auto of = [&](int64_t b) { return Link<1>{left[b].weight, {left[b].value}}; };
    out[open.index] += carried_into<1>(block, of).value[0];
  }
}

}  // namespace pk
