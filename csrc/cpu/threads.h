// Work distribution over threads.
#pragma once

#include <algorithm>
#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace pk {

// Of the team of a parallel region.
inline int thread_index() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// With fewer elements per thread, starting it costs more than it saves.
constexpr int64_t kElementsPerThread = 16384;
// Sums over all tokens are taken per block and then over blocks in order, for any number of threads.
constexpr int64_t kTokenBlock = 4096;

inline int thread_count(int64_t requested, int64_t rows, int64_t elements) {
  const int64_t useful = std::min(rows, elements / kElementsPerThread);
  return static_cast<int>(std::max<int64_t>(1, std::min(requested, useful)));
}

inline bool valid_offsets(const int64_t* cu, int64_t n_segments, int64_t n_tokens) {
  return cu != nullptr && cu[0] == 0 && cu[n_segments] == n_tokens && std::is_sorted(cu, cu + n_segments + 1);
}

// Calls body(segment, begin, end) for every segment. Each thread takes the segments that begin in its range of tokens,
// of equal size for all threads; a segment is processed by one thread.
template <typename Body>
void for_each_segment(const int64_t* cu, int64_t n_segments, int64_t n_tokens, int n_threads, Body body) {
  const int64_t* cu_end = cu + n_segments + 1;
  const int threads = thread_count(n_threads, n_segments, n_tokens);
#pragma omp parallel for schedule(static, 1) num_threads(threads) if (threads > 1)
  for (int thread = 0; thread < threads; ++thread) {
    const int64_t from = n_tokens / threads * thread + std::min<int64_t>(thread, n_tokens % threads);
    const int64_t upto = n_tokens / threads * (thread + 1) + std::min<int64_t>(thread + 1, n_tokens % threads);
    // The last range also has the empty segments at the very end.
    const int64_t first = std::lower_bound(cu, cu_end, from) - cu;
    const int64_t last = thread + 1 == threads ? n_segments : std::lower_bound(cu, cu_end, upto) - cu;
    for (int64_t segment = first; segment < std::min(last, n_segments); ++segment) {
      body(segment, cu[segment], cu[segment + 1]);
    }
  }
}

}  // namespace pk
