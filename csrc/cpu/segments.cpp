// Scans and sums over packed segments, accumulated in double; pack and unpack.

#include <algorithm>
#include <cstring>

#include "pk/abi.h"
#include "threads.h"

namespace pk {
namespace {

// y_t = x_t + gamma * y_{t-1} in each segment (y_{t+1} in reverse).
template <typename T>
void scan(const pk_segment_scan_args& args) {
  const T* values = static_cast<const T*>(args.values);
  T* out = static_cast<T*>(args.out);
  const double factor = args.factor == nullptr ? 1.0 : static_cast<double>(*args.factor);
  for_each_segment(args.cu_seqlens, args.n_segments, args.n_tokens, args.n_threads,
                   [&](int64_t, int64_t begin, int64_t end) {
                     double y = 0.0;
                     if (args.reverse) {
                       for (int64_t t = end; t-- > begin;) {
                         y = values[t] + args.gamma * y;
                         out[t] = static_cast<T>(y * factor);
                       }
                     } else {
                       for (int64_t t = begin; t < end; ++t) {
                         y = values[t] + args.gamma * y;
                         out[t] = static_cast<T>(y * factor);
                       }
                     }
                   });
}

// Calls body(row, padding columns before its tokens, first token, number of tokens) for every row.
template <typename Body>
int for_each_row(const pk_pack_args* args, Body body) {
  if (args == nullptr || args->n_rows < 0 || args->length < 0 || args->width < 1) return PK_BAD_ARGUMENT;
  if (!valid_offsets(args->cu_seqlens, args->n_rows, args->n_tokens)) return PK_BAD_ARGUMENT;
  for (int64_t r = 0; r < args->n_rows; ++r) {
    if (args->cu_seqlens[r + 1] - args->cu_seqlens[r] > args->length) return PK_BAD_ARGUMENT;
  }
  const int threads = thread_count(args->n_threads, args->n_rows, args->n_rows * args->length * args->width);
  (void)threads;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t r = 0; r < args->n_rows; ++r) {
    const int64_t tokens = args->cu_seqlens[r + 1] - args->cu_seqlens[r];
    body(r, args->pad_left ? args->length - tokens : 0, args->cu_seqlens[r], tokens);
  }
  return PK_OK;
}

}  // namespace
}  // namespace pk

extern "C" int pk_cpu_segment_scan(const pk_segment_scan_args* args) {
  using namespace pk;
  if (args == nullptr || args->n_segments < 0 || args->n_tokens < 0) return PK_BAD_ARGUMENT;
  if (!valid_offsets(args->cu_seqlens, args->n_segments, args->n_tokens)) return PK_BAD_ARGUMENT;
  if (args->dtype != PK_FLOAT32 && args->dtype != PK_FLOAT64) return PK_BAD_ARGUMENT;
  args->dtype == PK_FLOAT64 ? scan<double>(*args) : scan<float>(*args);
  return PK_OK;
}

extern "C" int pk_cpu_pack(const pk_pack_args* args) {
  const auto* in = static_cast<const char*>(args->in);
  auto* out = static_cast<char*>(args->out);
  const int64_t token = args->width * args->itemsize;
  return pk::for_each_row(args, [=](int64_t row, int64_t skipped, int64_t first, int64_t tokens) {
    if (tokens > 0) std::memcpy(out + first * token, in + (row * args->length + skipped) * token, tokens * token);
  });
}

extern "C" int pk_cpu_unpack(const pk_pack_args* args) {
  const auto* in = static_cast<const char*>(args->in);
  auto* out = static_cast<char*>(args->out);
  const int64_t token = args->width * args->itemsize;
  const auto pad = [=](char* to, int64_t tokens) {
    if (args->fill == 0) {
      std::memset(to, 0, tokens * token);
    } else {
      // All supported processors are little-endian: an element's bits are the low bytes.
      for (int64_t i = 0; i < tokens * args->width; ++i) {
        std::memcpy(to + i * args->itemsize, &args->fill, args->itemsize);
      }
    }
  };
  return pk::for_each_row(args, [=](int64_t row, int64_t skipped, int64_t first, int64_t tokens) {
    char* to = out + row * args->length * token;
    if (skipped > 0) pad(to, skipped);
    if (tokens > 0) std::memcpy(to + skipped * token, in + first * token, tokens * token);
    if (skipped + tokens < args->length) pad(to + (skipped + tokens) * token, args->length - skipped - tokens);
  });
}

extern "C" int pk_cpu_segment_sum(const pk_segment_sum_args* args) {
  using namespace pk;
  if (args == nullptr || args->n_segments < 0 || args->n_tokens < 0) return PK_BAD_ARGUMENT;
  if (!valid_offsets(args->cu_seqlens, args->n_segments, args->n_tokens)) return PK_BAD_ARGUMENT;
  const float* values = args->values;
  double* out = args->out;
  for_each_segment(args->cu_seqlens, args->n_segments, args->n_tokens, args->n_threads,
                   [=](int64_t segment, int64_t begin, int64_t end) {
                     double sum = 0.0;
#pragma omp simd reduction(+ : sum)
                     for (int64_t t = begin; t < end; ++t) sum += values[t];
                     out[segment] = sum;
                   });
  return PK_OK;
}

extern "C" int pk_cpu_segment_fill(const pk_segment_fill_args* args) {
  using namespace pk;
  if (args == nullptr || args->n_segments < 0 || args->n_tokens < 0) return PK_BAD_ARGUMENT;
  if (!valid_offsets(args->cu_seqlens, args->n_segments, args->n_tokens)) return PK_BAD_ARGUMENT;
  const double factor = args->factor == nullptr ? 1.0 : static_cast<double>(*args->factor);
  for_each_segment(args->cu_seqlens, args->n_segments, args->n_tokens, args->n_threads,
                   [=](int64_t segment, int64_t begin, int64_t end) {
                     std::fill(args->out + begin, args->out + end, static_cast<float>(args->values[segment] * factor));
                   });
  return PK_OK;
}
