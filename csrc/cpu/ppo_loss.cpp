// Clipped PPO loss over tokens: one pass for the sums, one for the gradient.

#include <algorithm>
#include <limits>
#include <vector>

#include "pk/abi.h"
#include "half.h"
#include "threads.h"

namespace pk {
namespace {

constexpr float kNoCeiling = std::numeric_limits<float>::infinity();
constexpr float kMaxLogRho = static_cast<float>(PK_MAX_LOG_RHO);

// e^x for x of at most kMaxLogRho, relative error below 2^-22; 0 instead of subnormals, NaN for NaN. Without branches,
// so that loops over it vectorise.
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

PK_INLINE Token token_of(float logp, float old_logp, float advantage, float low, float high, float ceiling) {
  const float log_rho = logp - old_logp;
  const float rho = exp_of(log_rho > kMaxLogRho ? kMaxLogRho : log_rho);
  const float bounded = rho < low ? low : (rho > high ? high : rho);
  const float free = -advantage * rho;
  const float clipped = -advantage * bounded;
  const float moving = log_rho > kMaxLogRho ? 0.0f : free;
  const float larger = clipped > free ? clipped : free;
  const float gradient = clipped > free ? 0.0f : moving;
  const float clipping = clipped > free ? 1.0f : 0.0f;
  // A select for each value: conditions that are combined as bools keep the loops from being vectorised.
  const float top = advantage < 0.0f ? ceiling : kNoCeiling;
  return {log_rho, rho > top ? -advantage * ceiling : larger, rho > top ? 0.0f : gradient,
          rho > top ? 1.0f : clipping};
}

struct Sums {
  double loss;
  double clipping;
  double log_rho;
  double count;
};

// Masked values are zeroed by a bit mask, not multiplied by 0: NaN in a masked token has no effect.
PK_INLINE uint32_t bits_if(uint8_t flag) { return 0u - static_cast<uint32_t>(flag != 0); }
PK_INLINE float kept(float x, uint32_t keep) { return float_of(bits_of(x) & keep); }

// Templates on whether there are a mask and weights, with each column as a separate pointer: a branch inside the loop,
// or a store that may alias the struct, would prevent vectorisation.
template <bool kMask, bool kWeights>
PK_INLINE Sums sums_of(const float* logp, const float* old_logp, const float* advantages, const uint8_t* mask,
             const float* weights, int64_t n, float low, float high, float ceiling, float, float*) {
  double loss = 0.0;
  double clipping = 0.0;
  double log_rho = 0.0;
  double count = 0.0;
#pragma omp simd reduction(+ : loss, clipping, log_rho, count)
  for (int64_t t = 0; t < n; ++t) {
    const Token token = token_of(logp[t], old_logp[t], advantages[t], low, high, ceiling);
    const uint32_t keep = kMask ? bits_if(mask[t]) : ~0u;
    const float weighted = kWeights ? token.loss * weights[t] : token.loss;
    loss += kept(weighted, keep);
    clipping += kept(token.clipping, keep);
    log_rho += kept(token.log_rho, keep);
    count += kept(1.0f, keep);
  }
  return {loss, clipping, log_rho, count};
}

template <bool kMask, bool kWeights>
PK_INLINE Sums gradient_of(const float* __restrict logp, const float* __restrict old_logp,
                           const float* __restrict advantages, const uint8_t* __restrict mask,
                           const float* __restrict weights, int64_t n, float low, float high, float ceiling,
                           float factor, float* __restrict out) {
  for (int64_t t = 0; t < n; ++t) {
    const Token token = token_of(logp[t], old_logp[t], advantages[t], low, high, ceiling);
    const uint32_t keep = kMask ? bits_if(mask[t]) : ~0u;
    const float weighted = kWeights ? token.gradient * weights[t] : token.gradient;
    out[t] = kept(weighted * factor, keep);
  }
  return {0.0, 0.0, 0.0, 0.0};
}

using Loop = Sums (*)(const float*, const float*, const float*, const uint8_t*, const float*, int64_t, float, float,
                      float, float, float*);

// One clone per x86-64 level; the loader picks the widest that the processor supports. Needs ifunc, hence glibc.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define PK_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define PK_CLONES
#endif
#define PK_LOOP(name, loop, mask, weights)                                                                           \
  PK_CLONES Sums name(const float* logp, const float* old_logp, const float* advantages, const uint8_t* masked,       \
                      const float* factors, int64_t n, float low, float high, float ceiling, float factor,            \
                      float* out) {                                                                                   \
    return loop<mask, weights>(logp, old_logp, advantages, masked, factors, n, low, high, ceiling, factor, out);      \
  }
PK_LOOP(sums, sums_of, false, false)
PK_LOOP(sums_weighted, sums_of, false, true)
PK_LOOP(sums_masked, sums_of, true, false)
PK_LOOP(sums_masked_weighted, sums_of, true, true)
PK_LOOP(gradient, gradient_of, false, false)
PK_LOOP(gradient_weighted, gradient_of, false, true)
PK_LOOP(gradient_masked, gradient_of, true, false)
PK_LOOP(gradient_masked_weighted, gradient_of, true, true)

constexpr Loop kSums[2][2] = {{sums, sums_weighted}, {sums_masked, sums_masked_weighted}};
constexpr Loop kGradient[2][2] = {{gradient, gradient_weighted}, {gradient_masked, gradient_masked_weighted}};

// Runs the loop on every block of tokens, in parallel if there are enough; adds up the blocks' sums in order.
Sums over_blocks(const pk_ppo_tokens& args, const Loop (&loops)[2][2], float factor, float* out) {
  const Loop loop = loops[args.mask != nullptr][args.weights != nullptr];
  const float low = static_cast<float>(1.0 - args.clip_low);
  const float high = static_cast<float>(1.0 + args.clip_high);
  const float ceiling = static_cast<float>(args.ceiling);
  const int64_t blocks = (args.n_tokens + kTokenBlock - 1) / kTokenBlock;
  std::vector<Sums> of_blocks(static_cast<size_t>(blocks));
  const int threads = thread_count(args.n_threads, blocks, args.n_tokens);
  (void)threads;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t at = block * kTokenBlock;
    const int64_t n = std::min(kTokenBlock, args.n_tokens - at);
    of_blocks[static_cast<size_t>(block)] =
        loop(args.logp + at, args.old_logp + at, args.advantages + at, args.mask == nullptr ? nullptr : args.mask + at,
             args.weights == nullptr ? nullptr : args.weights + at, n, low, high, ceiling, factor,
             out == nullptr ? nullptr : out + at);
  }
  Sums total{0.0, 0.0, 0.0, 0.0};
  for (const Sums& block : of_blocks) {
    total.loss += block.loss;
    total.clipping += block.clipping;
    total.log_rho += block.log_rho;
    total.count += block.count;
  }
  return total;
}

}  // namespace
}  // namespace pk

extern "C" int pk_cpu_ppo_loss(const pk_ppo_args* args) {
  using namespace pk;
  if (args == nullptr || args->tokens.n_tokens < 0) return PK_BAD_ARGUMENT;
  const Sums total = over_blocks(args->tokens, kSums, 0.0f, nullptr);
  const double count = std::max(total.count, 1.0);
  double denominator = args->denominator != nullptr ? *args->denominator : args->denominator_value;
  if (args->denominator == nullptr && denominator <= 0.0) denominator = count;
  const double scale = 1.0 / denominator;
  *args->scale = scale;
  args->results[0] = static_cast<float>(total.loss * scale);
  args->results[1] = static_cast<float>(total.clipping / count);
  args->results[2] = static_cast<float>(-total.log_rho / count);
  return PK_OK;
}

extern "C" int pk_cpu_ppo_loss_backward(const pk_ppo_grad_args* args) {
  using namespace pk;
  if (args == nullptr || args->tokens.n_tokens < 0) return PK_BAD_ARGUMENT;
  const double factor = *args->scale * static_cast<double>(*args->grad);
  over_blocks(args->tokens, kGradient, static_cast<float>(factor), args->out);
  return PK_OK;
}
