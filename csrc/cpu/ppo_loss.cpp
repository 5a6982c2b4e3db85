// Clipped PPO loss over tokens: one pass for the sums, one for the gradient.

#include <algorithm>
#include <vector>

#include "pk/abi.h"
#include "pk/numeric.h"
#include "pk/threads.h"

namespace pk {
namespace {

constexpr float kMaxLogRho = 20.0f;  // e^20: beyond it the ratio stays and passes no gradient

// e^x for x of at most kMaxLogRho, relative error below 2^-22; 0 where it would be subnormal, NaN for NaN. Free of
// branches, so that loops over it vectorise.
PK_INLINE float exp_of(float x) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it leaves round(t) in the low mantissa bits
  const float low = x < -87.0f ? -87.0f : x;
  const float shifted = low * 1.44269504088896341f + magic;
  const float n = shifted - magic;
  // ln 2 in two parts: n times the first is exact.
  const float r = (low - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9841270e-4f;
  p = p * r + 1.3888889e-3f;
  p = p * r + 8.3333333e-3f;
  p = p * r + 4.1666667e-2f;
  p = p * r + 1.6666667e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return x < -87.0f ? 0.0f : p * float_of((bits_of(shifted) << 23) + 0x3f800000u);
}

struct Token {
  float log_rho;
  float loss;      // before its weight
  float gradient;  // d loss / d logp, before its weight
  float clipping;
};

PK_INLINE Token token_of(float logp, float old_logp, float advantage, float low, float high) {
  const float log_rho = logp - old_logp;
  const float rho = exp_of(log_rho > kMaxLogRho ? kMaxLogRho : log_rho);
  const float bounded = rho < low ? low : (rho > high ? high : rho);
  const float free = -advantage * rho;
  const float clipped = -advantage * bounded;
  const bool clipping = clipped > free;
  const bool constant = clipping | (log_rho > kMaxLogRho);
  return {log_rho, clipping ? clipped : free, constant ? 0.0f : free, clipping ? 1.0f : 0.0f};
}

bool valid(const pk_ppo_args* args) { return args != nullptr && args->n_tokens >= 0; }

struct Sums {
  double loss;
  double clipping;
  double log_rho;
  double count;
};

// Whether there is a mask and whether there are weights is settled outside the loops: a branch inside would keep them
// from vectorising.
template <bool kMask, bool kWeights>
Sums sums_of(const pk_ppo_args& args, int64_t begin, int64_t end) {
  const float low = static_cast<float>(1.0 - args.clip_low);
  const float high = static_cast<float>(1.0 + args.clip_high);
  double loss = 0.0;
  double clipping = 0.0;
  double log_rho = 0.0;
  double count = 0.0;
#pragma omp simd reduction(+ : loss, clipping, log_rho, count)
  for (int64_t t = begin; t < end; ++t) {
    const Token token = token_of(args.logp[t], args.old_logp[t], args.advantages[t], low, high);
    // Selected, not multiplied: what a masked token holds, NaN included, has no effect.
    const bool counts = kMask ? args.mask[t] != 0 : true;
    const float weighted = kWeights ? token.loss * args.weights[t] : token.loss;
    loss += counts ? weighted : 0.0f;
    clipping += counts ? token.clipping : 0.0f;
    log_rho += counts ? token.log_rho : 0.0f;
    count += counts ? 1.0f : 0.0f;
  }
  return {loss, clipping, log_rho, count};
}

template <bool kMask, bool kWeights>
void gradient_of(const pk_ppo_args& args, int64_t begin, int64_t end, float factor, float* out) {
  const float low = static_cast<float>(1.0 - args.clip_low);
  const float high = static_cast<float>(1.0 + args.clip_high);
#pragma omp simd
  for (int64_t t = begin; t < end; ++t) {
    const Token token = token_of(args.logp[t], args.old_logp[t], args.advantages[t], low, high);
    const bool counts = kMask ? args.mask[t] != 0 : true;
    const float weighted = kWeights ? token.gradient * args.weights[t] : token.gradient;
    out[t] = counts ? weighted * factor : 0.0f;
  }
}

// body(block, begin, end) for every block of tokens, on as many threads as are worth it.
template <typename Body>
void for_each_block(const pk_ppo_args& args, Body body) {
  const int64_t blocks = (args.n_tokens + kTokenBlock - 1) / kTokenBlock;
  const int threads = thread_count(args.n_threads, blocks, args.n_tokens);
  (void)threads;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t begin = block * kTokenBlock;
    body(block, begin, std::min(begin + kTokenBlock, args.n_tokens));
  }
}

}  // namespace
}  // namespace pk

extern "C" int pk_cpu_ppo_loss(const pk_ppo_args* args, double* sums) {
  using namespace pk;
  if (!valid(args)) return PK_BAD_ARGUMENT;
  std::vector<Sums> of_blocks(static_cast<size_t>((args->n_tokens + kTokenBlock - 1) / kTokenBlock));
  const auto run = args->mask != nullptr ? (args->weights != nullptr ? sums_of<true, true> : sums_of<true, false>)
                                         : (args->weights != nullptr ? sums_of<false, true> : sums_of<false, false>);
  for_each_block(*args, [&](int64_t block, int64_t begin, int64_t end) {
    of_blocks[static_cast<size_t>(block)] = run(*args, begin, end);
  });
  Sums total{0.0, 0.0, 0.0, 0.0};
  for (const Sums& block : of_blocks) {
    total.loss += block.loss;
    total.clipping += block.clipping;
    total.log_rho += block.log_rho;
    total.count += block.count;
  }
  sums[0] = total.loss;
  sums[1] = total.clipping;
  sums[2] = total.log_rho;
  sums[3] = total.count;
  return PK_OK;
}

extern "C" int pk_cpu_ppo_loss_backward(const pk_ppo_args* args, double factor, float* out) {
  using namespace pk;
  if (!valid(args)) return PK_BAD_ARGUMENT;
  const auto run = args->mask != nullptr
                       ? (args->weights != nullptr ? gradient_of<true, true> : gradient_of<true, false>)
                       : (args->weights != nullptr ? gradient_of<false, true> : gradient_of<false, false>);
  for_each_block(*args, [&](int64_t, int64_t begin, int64_t end) {
    run(*args, begin, end, static_cast<float>(factor), out);
  });
  return PK_OK;
}
