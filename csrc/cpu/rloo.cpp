// The token passes of RLOO advantages. What happens between them, on a number or two a response, is the caller's.
// A response is one thread's from end to end and sums over responses are taken in their order, in double: results do
// not depend on the number of threads.

#include <algorithm>
#include <cmath>
#include <vector>

#include "pk/abi.h"
#include "threads.h"

namespace pk {
namespace {

template <typename Body>
void for_each_response(const pk_rloo_args& args, Body body) {
  for_each_segment(args.cu_seqlens, args.n_responses, args.n_tokens, args.n_threads, body);
}

bool carries(const pk_rloo_args& args, int64_t token) { return args.mask == nullptr || args.mask[token] != 0; }

bool valid(const pk_rloo_args* args) {
  return args != nullptr && args->n_responses >= 0 && args->n_tokens >= 0 &&
         valid_offsets(args->cu_seqlens, args->n_responses, args->n_tokens);
}

double in_order(const std::vector<double>& terms) {
  double sum = 0.0;
  for (const double term : terms) sum += term;
  return sum;
}

}  // namespace
}  // namespace pk

extern "C" int pk_cpu_rloo_moments(const pk_rloo_args* args, double* sums, double* counts, double* largest) {
  using namespace pk;
  if (!valid(args) || (args->rewards == nullptr && args->n_tokens > 0)) return PK_BAD_ARGUMENT;
  std::vector<double> highest(static_cast<size_t>(args->n_responses), 0.0);
  for_each_response(*args, [&](int64_t response, int64_t begin, int64_t end) {
    double sum = 0.0;
    double count = 0.0;
    double top = 0.0;
    for (int64_t t = end; t-- > begin;) {
      if (carries(*args, t)) {
        sum += args->rewards[t];
        count += 1.0;
      }
      top = std::max(top, std::fabs(sum));
    }
    sums[response] = sum;
    counts[response] = count;
    highest[static_cast<size_t>(response)] = top;
  });
  *largest = 0.0;
  for (const double top : highest) *largest = std::max(*largest, top);
  return PK_OK;
}

extern "C" int pk_cpu_rloo_returns(const pk_rloo_args* args, double* total) {
  using namespace pk;
  if (!valid(args)) return PK_BAD_ARGUMENT;
  std::vector<double> sums(static_cast<size_t>(args->n_responses), 0.0);
  for_each_response(*args, [&](int64_t response, int64_t begin, int64_t end) {
    const double scale = args->rewards == nullptr ? 0.0 : args->scale[response];
    const double shift = args->rewards == nullptr ? 0.0 : args->shift[response];
    double process = 0.0;
    double outcome = args->outcomes[response];
    double sum = 0.0;
    for (int64_t t = end; t-- > begin;) {
      if (args->rewards != nullptr) {
        process *= args->gamma_process;
        if (carries(*args, t)) process += scale * args->rewards[t] + shift;
      }
      const float value = static_cast<float>(args->process_coef * process + args->outcome_coef * outcome);
      args->out[t] = value;
      sum += value;
      outcome *= args->gamma_outcome;
    }
    sums[static_cast<size_t>(response)] = sum;
  });
  *total = in_order(sums);
  return PK_OK;
}

extern "C" int pk_cpu_centred_squares(const float* values, int64_t n, double mean, int n_threads, double* total) {
  using namespace pk;
  if (n < 0) return PK_BAD_ARGUMENT;
  const int64_t blocks = (n + kTokenBlock - 1) / kTokenBlock;
  std::vector<double> sums(static_cast<size_t>(blocks), 0.0);
  const int threads = thread_count(n_threads, blocks, n);
  (void)threads;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t end = std::min(n, (block + 1) * kTokenBlock);
    double sum = 0.0;
#pragma omp simd reduction(+ : sum)
    for (int64_t t = block * kTokenBlock; t < end; ++t) {
      const double centred = values[t] - mean;
      sum += centred * centred;
    }
    sums[static_cast<size_t>(block)] = sum;
  }
  *total = in_order(sums);
  return PK_OK;
}

extern "C" int pk_cpu_whiten(const float* values, int64_t n, double mean, double factor, int n_threads, float* out) {
  using namespace pk;
  if (n < 0) return PK_BAD_ARGUMENT;
  const int threads = thread_count(n_threads, n, n);
  (void)threads;
#pragma omp parallel for simd schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t t = 0; t < n; ++t) out[t] = static_cast<float>((values[t] - mean) * factor);
  return PK_OK;
}
