// y_t = x_t + gamma * y_{t-1} inside each segment (y_{t+1} in reverse), accumulated in double.

#include <algorithm>

#include "pk/abi.h"
#include "pk/threads.h"

namespace {

void scan_segment(const pk_segment_scan_args& args, int64_t segment) {
  const int64_t begin = args.cu_seqlens[segment];
  const int64_t end = args.cu_seqlens[segment + 1];
  double y = 0.0;
  if (args.reverse) {
    for (int64_t t = end; t-- > begin;) {
      y = args.values[t] + args.gamma * y;
      args.out[t] = static_cast<float>(y);
    }
  } else {
    for (int64_t t = begin; t < end; ++t) {
      y = args.values[t] + args.gamma * y;
      args.out[t] = static_cast<float>(y);
    }
  }
}

bool valid(const pk_segment_scan_args* args) {
  if (args == nullptr || args->n_segments < 0 || args->n_tokens < 0 || args->cu_seqlens == nullptr) return false;
  const int64_t* cu = args->cu_seqlens;
  return cu[0] == 0 && cu[args->n_segments] == args->n_tokens && std::is_sorted(cu, cu + args->n_segments + 1);
}

}  // namespace

extern "C" int pk_cpu_segment_scan(const pk_segment_scan_args* args) {
  if (!valid(args)) return PK_BAD_ARGUMENT;
  const int64_t* cu = args->cu_seqlens;
  const int64_t* cu_end = cu + args->n_segments + 1;
  const int threads = pk::thread_count(args->n_threads, args->n_segments, args->n_tokens);
  // Each thread takes the segments that begin in its share of the tokens: long and short ones balance out, and every
  // segment is still scanned by one thread from end to end.
#pragma omp parallel for schedule(static, 1) num_threads(threads) if (threads > 1)
  for (int share = 0; share < threads; ++share) {
    const int64_t tokens = args->n_tokens;
    const int64_t from = tokens / threads * share + std::min<int64_t>(share, tokens % threads);
    const int64_t upto = tokens / threads * (share + 1) + std::min<int64_t>(share + 1, tokens % threads);
    const int64_t first = std::lower_bound(cu, cu_end, from) - cu;
    const int64_t last = std::lower_bound(cu, cu_end, upto) - cu;
    for (int64_t segment = first; segment < std::min(last, args->n_segments); ++segment) scan_segment(*args, segment);
  }
  return PK_OK;
}
