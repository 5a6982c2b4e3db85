// What the losses of process reward models share.
#pragma once

#include "segmented_scan.cuh"

namespace pk {

__device__ inline double softplus(double x) { return fmax(x, 0.0) + log1p(exp(-fabs(x))); }
__device__ inline double sigmoid(double x) { return x >= 0.0 ? 1.0 / (1.0 + exp(-x)) : exp(x) / (1.0 + exp(x)); }

struct OrderedResponses {
  const double* scores;
  const double* outcomes;
  const int64_t* cu_seqlens;  // responses without tokens form no pair
};

// For one block: the mean over groups of the share of pairs in the right order, weighted by the difference of their
// outcomes; NaN without groups.
__device__ inline double pair_accuracy(const OrderedResponses& all, const int64_t* cu_groups, int64_t n_groups) {
  if (cu_groups == nullptr) return nan("");
  const int64_t* cu = all.cu_seqlens;
  double shares = 0.0;
  for (int64_t g = threadIdx.x; g < n_groups; g += kThreads) {
    double gaps = 0.0;
    double agreeing = 0.0;
    for (int64_t i = cu_groups[g]; i < cu_groups[g + 1]; ++i) {
      if (cu[i] == cu[i + 1]) continue;
      for (int64_t j = i + 1; j < cu_groups[g + 1]; ++j) {
        if (cu[j] == cu[j + 1]) continue;
        const double gap = fabs(all.outcomes[i] - all.outcomes[j]);
        gaps += gap;
        if ((all.scores[i] > all.scores[j]) == (all.outcomes[i] > all.outcomes[j])) agreeing += gap;
      }
    }
    shares += gaps > 0.0 ? agreeing / gaps : 0.5;
  }
  shares = block_sum(shares);
  return n_groups > 0 ? shares / static_cast<double>(n_groups) : 0.5;
}

}  // namespace pk
