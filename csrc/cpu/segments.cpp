// Scans and sums of packed segments, accumulated in double.

#include <algorithm>

#include "pk/abi.h"
#include "pk/threads.h"

// y_t = x_t + gamma * y_{t-1} inside each segment (y_{t+1} in reverse).
extern "C" int pk_cpu_segment_scan(const pk_segment_scan_args* args) {
  using namespace pk;
  if (args == nullptr || args->n_segments < 0 || args->n_tokens < 0) return PK_BAD_ARGUMENT;
  if (!valid_offsets(args->cu_seqlens, args->n_segments, args->n_tokens)) return PK_BAD_ARGUMENT;
  const auto scan = [args](int64_t, int64_t begin, int64_t end) {
    double y = 0.0;
    if (args->reverse) {
      for (int64_t t = end; t-- > begin;) {
        y = args->values[t] + args->gamma * y;
        args->out[t] = static_cast<float>(y);
      }
    } else {
      for (int64_t t = begin; t < end; ++t) {
        y = args->values[t] + args->gamma * y;
        args->out[t] = static_cast<float>(y);
      }
    }
  };
  for_each_segment(args->cu_seqlens, args->n_segments, args->n_tokens, args->n_threads, scan);
  return PK_OK;
}

extern "C" int pk_cpu_segment_sum(const float* values, const int64_t* cu, int64_t n_segments, int64_t n_tokens,
                                  int n_threads, double* out) {
  using namespace pk;
  if (n_segments < 0 || n_tokens < 0 || !valid_offsets(cu, n_segments, n_tokens)) return PK_BAD_ARGUMENT;
  for_each_segment(cu, n_segments, n_tokens, n_threads, [=](int64_t segment, int64_t begin, int64_t end) {
    double sum = 0.0;
#pragma omp simd reduction(+ : sum)
    for (int64_t t = begin; t < end; ++t) sum += values[t];
    out[segment] = sum;
  });
  return PK_OK;
}

// The gradient of a sum: each token gets its segment's.
extern "C" int pk_cpu_segment_fill(const double* values, const int64_t* cu, int64_t n_segments, int64_t n_tokens,
                                   int n_threads, float* out) {
  using namespace pk;
  if (n_segments < 0 || n_tokens < 0 || !valid_offsets(cu, n_segments, n_tokens)) return PK_BAD_ARGUMENT;
  for_each_segment(cu, n_segments, n_tokens, n_threads, [=](int64_t segment, int64_t begin, int64_t end) {
    std::fill(out + begin, out + end, static_cast<float>(values[segment]));
  });
  return PK_OK;
}
