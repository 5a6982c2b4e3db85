// The PRM loss of every prefix of a response and its slopes, in double.

#include <cmath>

#include "pk/abi.h"
#include "threads.h"

namespace pk {
namespace {

double softplus(double x) { return std::fmax(x, 0.0) + std::log1p(std::exp(-std::fabs(x))); }

double sigmoid(double x) {
  const double e = std::exp(-std::fabs(x));
  return (x >= 0.0 ? 1.0 : e) / (1.0 + e);
}

}  // namespace
}  // namespace pk

extern "C" int pk_cpu_prefix_loss(const pk_prefix_args* args) {
  using namespace pk;
  if (args == nullptr || args->n_responses < 0 || args->n_tokens < 0) return PK_BAD_ARGUMENT;
  const int64_t* cu = args->cu_seqlens;
  if (!valid_offsets(cu, args->n_responses, args->n_tokens)) return PK_BAD_ARGUMENT;
  int64_t count = 0;
  for (int64_t r = 0; r < args->n_responses; ++r) count += cu[r] < cu[r + 1];
  const double share = 1.0 / static_cast<double>(std::max<int64_t>(count, 1));
  const auto loss_of_response = [=](int64_t r, int64_t begin, int64_t end) {
    const double length = static_cast<double>(end - begin);
    const double weight = share * (args->weights == nullptr ? 1.0 : args->weights[r]) / length;
    const double shift = args->shift == nullptr ? 0.0 : args->shift[r];
    const double right = args->outcomes[r];
    const double wrong = 1.0 - right;
    double sum = 0.0;
    double loss = 0.0;
    for (int64_t t = begin; t < end; ++t) {
      sum += args->log_ratio[t];
      const double rate = args->beta / static_cast<double>(t - begin + 1);
      const double value = rate * sum + shift;
      loss += right * softplus(args->margin - value) + wrong * softplus(args->margin + value);
      const double slope = wrong * sigmoid(args->margin + value) - right * sigmoid(args->margin - value);
      args->slope[t] = static_cast<float>(weight * rate * slope);
    }
    args->losses[r] = begin < end ? weight * loss : 0.0;
    args->scores[r] = begin < end ? sum / length : 0.0;
  };
  for_each_segment(cu, args->n_responses, args->n_tokens, args->n_threads, loss_of_response);
  return PK_OK;
}
