// RLOO returns and whitening. The caller computes the few numbers per response between the two steps. One thread
// handles a whole response, and sums over responses are taken in order and in double: results do not depend on the
// number of threads.

#include <algorithm>
#include <cmath>
#include <vector>

#include "pk/abi.h"
#include "threads.h"

namespace pk {
namespace {

template <typename Args>
bool has_reward(const Args& args, int64_t token) {
  return args.mask == nullptr || args.mask[token] != 0;
}

template <typename Args>
bool valid(const Args* args) {
  return args != nullptr && args->n_responses >= 0 && args->n_tokens >= 0 &&
         valid_offsets(args->cu_seqlens, args->n_responses, args->n_tokens);
}

template <typename Args, typename Body>
void for_each_response(const Args& args, Body body) {
  for_each_segment(args.cu_seqlens, args.n_responses, args.n_tokens, args.n_threads, body);
}

double sum_in_order(const std::vector<double>& terms) {
  double sum = 0.0;
  for (const double term : terms) sum += term;
  return sum;
}

double squares_about(const float* values, int64_t n, double mean, int n_threads) {
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
  return sum_in_order(sums);
}

}  // namespace
}  // namespace pk

extern "C" int pk_cpu_rloo_sums(const pk_rloo_sums_args* args) {
  using namespace pk;
  if (!valid(args) || (args->rewards == nullptr && args->n_tokens > 0)) return PK_BAD_ARGUMENT;
  std::vector<double> largest(static_cast<size_t>(args->n_responses), 0.0);
  for_each_response(*args, [&](int64_t response, int64_t begin, int64_t end) {
    double sum = 0.0;
    double count = 0.0;
    double largest_here = 0.0;
    for (int64_t t = end; t-- > begin;) {
      if (has_reward(*args, t)) {
        sum += args->rewards[t];
        count += 1.0;
      }
      largest_here = std::max(largest_here, std::fabs(sum));
    }
    args->sums[response] = sum;
    args->counts[response] = count;
    largest[static_cast<size_t>(response)] = largest_here;
  });
  *args->largest = 0.0;
  for (const double of_response : largest) *args->largest = std::max(*args->largest, of_response);
  return PK_OK;
}

extern "C" int pk_cpu_rloo_returns(const pk_rloo_returns_args* args) {
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
        if (has_reward(*args, t)) process += scale * args->rewards[t] + shift;
      }
      const float value = static_cast<float>(args->process_coef * process + args->outcome_coef * outcome);
      args->out[t] = value;
      sum += value;
      outcome *= args->gamma_outcome;
    }
    sums[static_cast<size_t>(response)] = sum;
  });
  const double mean = sum_in_order(sums) / static_cast<double>(std::max<int64_t>(args->n_tokens, 1));
  args->moments[0] = static_cast<double>(args->n_tokens);
  args->moments[1] = mean;
  args->moments[2] = squares_about(args->out, args->n_tokens, mean, args->n_threads);
  return PK_OK;
}

extern "C" int pk_cpu_whiten(const pk_whiten_args* args) {
  using namespace pk;
  if (args == nullptr || args->n_tokens < 0 || args->n_parts < 0) return PK_BAD_ARGUMENT;
  double count = 0.0;
  double sum = 0.0;
  for (int64_t i = 0; i < args->n_parts; ++i) {
    count += args->moments[3 * i];
    sum += args->moments[3 * i] * args->moments[3 * i + 1];
  }
  const double mean = sum / std::max(count, 1.0);
  double squares = 0.0;
  for (int64_t i = 0; i < args->n_parts; ++i) {
    const double deviation = args->moments[3 * i + 1] - mean;
    squares += args->moments[3 * i + 2] + args->moments[3 * i] * deviation * deviation;
  }
  const double factor = 1.0 / std::sqrt(squares / std::max(count - 1.0, 1.0) + PK_WHITEN_EPS);
  const float* values = args->values;
  float* out = args->out;
  const int64_t n = args->n_tokens;
  const int threads = thread_count(args->n_threads, n, n);
  (void)threads;
#pragma omp parallel for simd schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t t = 0; t < n; ++t) out[t] = static_cast<float>((values[t] - mean) * factor);
  return PK_OK;
}
