// PPO and PRM losses, one launch per direction: the last block to arrive computes the results from the blocks' sums,
// without a host synchronisation.

#include "prm_math.cuh"
#include "segment_sums.cuh"

namespace pk {
namespace {

constexpr float kMaxLogRho = static_cast<float>(PK_MAX_LOG_RHO);

struct Token {
  float log_rho;
  float loss;      // unweighted
  float gradient;  // d loss / d logp, unweighted
  bool clipping;
};

__device__ bool is_valid(const pk_ppo_tokens& args, int64_t t) { return args.mask == nullptr || args.mask[t] != 0; }

__device__ Token token_at(const pk_ppo_tokens& args, int64_t t) {
  const float advantage = args.advantages[t];
  const float log_rho = args.logp[t] - args.old_logp[t];
  const float rho = expf(log_rho > kMaxLogRho ? kMaxLogRho : log_rho);
  const float low = static_cast<float>(1.0 - args.clip_low);
  const float high = static_cast<float>(1.0 + args.clip_high);
  const float bounded = rho < low ? low : (rho > high ? high : rho);
  const float free = -advantage * rho;
  const float clipped = -advantage * bounded;
  const float ceiling = static_cast<float>(args.ceiling);
  const bool beyond = advantage < 0.0f && rho > ceiling;
  const bool clipping = beyond || clipped > free;
  const float loss = beyond ? -advantage * ceiling : (clipped > free ? clipped : free);
  return {log_rho, loss, clipping || log_rho > kMaxLogRho ? 0.0f : free, clipping};
}

__global__ void __launch_bounds__(kThreads) ppo_kernel(pk_ppo_args results) {
  const pk_ppo_tokens& args = results.tokens;
  double loss = 0.0;
  double clipping = 0.0;
  double log_rho = 0.0;
  double count = 0.0;
  const BlockRange range(args.n_tokens, blockIdx.x, gridDim.x);
  for (int64_t t = range.begin + threadIdx.x; t < range.end; t += kThreads) {
    if (!is_valid(args, t)) continue;
    const Token token = token_at(args, t);
    loss += args.weights == nullptr ? token.loss : token.loss * args.weights[t];
    clipping += token.clipping ? 1.0 : 0.0;
    log_rho += token.log_rho;
    count += 1.0;
  }
  double* sums = results.sums + 4 * blockIdx.x;
  loss = block_sum(loss);
  clipping = block_sum(clipping);
  log_rho = block_sum(log_rho);
  count = block_sum(count);
  if (threadIdx.x == 0) {
    sums[0] = loss;
    sums[1] = clipping;
    sums[2] = log_rho;
    sums[3] = count;
  }
  if (!arrives_last(results.arrived)) return;
  double totals[4];
  for (int k = 0; k < 4; ++k) {
    double sum = 0.0;
    for (unsigned b = threadIdx.x; b < gridDim.x; b += kThreads) sum += results.sums[4 * b + k];
    totals[k] = block_sum(sum);
  }
  if (threadIdx.x == 0) {
    const double tokens = fmax(totals[3], 1.0);
    double denominator = results.denominator != nullptr ? *results.denominator : results.denominator_value;
    if (denominator <= 0.0) denominator = tokens;
    *results.scale = 1.0 / denominator;
    results.results[0] = static_cast<float>(totals[0] / denominator);
    results.results[1] = static_cast<float>(totals[1] / tokens);
    results.results[2] = static_cast<float>(-totals[2] / tokens);
  }
}

__global__ void __launch_bounds__(kThreads) ppo_gradient_kernel(pk_ppo_grad_args to) {
  const pk_ppo_tokens& args = to.tokens;
  const float factor = static_cast<float>(*to.scale * static_cast<double>(*to.grad));
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t t = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x; t < args.n_tokens; t += step) {
    float gradient = 0.0f;
    if (is_valid(args, t)) {
      gradient = token_at(args, t).gradient * factor;
      if (args.weights != nullptr) gradient *= args.weights[t];
    }
    to.out[t] = gradient;
  }
}

// The losses of a response and d (sum of losses) / d Delta, both before the division by the number of `terms`.
struct Terms {
  double loss;
  double slope;
  double terms;
};

__device__ Terms response_terms(const pk_prm_args& args, int64_t r, double kl) {
  const double delta = args.delta[r];
  const double outcome = args.outcomes[r];
  if (args.kind == PK_PRM_CE) {
    const double z = args.beta * delta + (args.shift == nullptr ? 0.0 : args.shift[r]);
    const double weight = args.weights == nullptr ? 1.0 : args.weights[r];
    return {weight * (softplus(z) - z * outcome), weight * args.beta * (sigmoid(z) - outcome), 1.0};
  }
  const double sign = outcome > 0.5 ? -1.0 : 1.0;
  const double p = sigmoid(args.beta * sign * (delta - kl));
  return {p, sign * args.beta * p * (1.0 - p), 1.0};
}

// A response with all responses of its group that it forms a pair with. A pair's loss is counted once, with its better
// response.
__device__ Terms pair_terms(const pk_prm_args& args, int64_t r, const Segment& group) {
  const int64_t* cu = args.cu_seqlens;
  const bool wanted = args.outcomes[r] > 0.5;
  const double beta = args.beta;
  const double mine = beta * args.delta[r];
  Terms all{0.0, 0.0, 0.0};
  for (int64_t j = group.begin; j < group.end; ++j) {
    if (cu[j] == cu[j + 1] || (args.outcomes[j] > 0.5) == wanted) continue;
    const double theirs = beta * args.delta[j];
    if (args.kind == PK_PRM_DPO) {
      const double margin = wanted ? mine - theirs : theirs - mine;
      all.slope += (wanted ? -beta : beta) * sigmoid(-margin);
      if (wanted) all.loss += softplus(-margin);
    } else if (wanted) {
      all.slope += beta * (0.5 * sigmoid(mine) - sigmoid(-mine));
      all.loss += softplus(-mine) + 0.5 * softplus(mine) + 0.5 * softplus(theirs);
    } else {
      all.slope += 0.5 * beta * sigmoid(mine);
    }
    if (wanted) all.terms += 1.0;
  }
  return all;
}

// For one block, after the sums of all responses.
__device__ void response_losses(const pk_prm_args& args) {
  const int64_t* cu = args.cu_seqlens;
  const bool pairs = args.kind == PK_PRM_DPO || args.kind == PK_PRM_NCA;
  double kl = 0.0;
  if (args.kind == PK_PRM_KTO) {
    double sum = 0.0;
    double count = 0.0;
    for (int64_t r = threadIdx.x; r < args.n_responses; r += kThreads) {
      if (cu[r] == cu[r + 1]) continue;
      sum += args.delta[r];
      count += 1.0;
    }
    sum = block_sum(sum);
    kl = fmax(sum / fmax(block_sum(count), 1.0), 0.0);
  }
  Terms all{0.0, 0.0, 0.0};
  Segment group;
  for (int64_t r = threadIdx.x; r < args.n_responses; r += kThreads) {
    args.slope[r] = 0.0;
    if (cu[r] == cu[r + 1]) continue;
    if (pairs) group.seek(args.cu_groups, args.n_groups, r);
    const Terms terms = pairs ? pair_terms(args, r, group) : response_terms(args, r, kl);
    args.slope[r] = terms.slope;
    all.loss += terms.loss;
    all.terms += terms.terms;
  }
  const double loss = block_sum(all.loss);
  const double terms = fmax(block_sum(all.terms), 1.0);
  for (int64_t r = threadIdx.x; r < args.n_responses; r += kThreads) args.slope[r] /= terms;
  const OrderedResponses ordered{args.delta, args.outcomes, args.cu_seqlens};
  const double accuracy = pair_accuracy(ordered, args.cu_groups, args.n_groups);
  if (threadIdx.x == 0) {
    args.results[0] = static_cast<float>(loss / terms);
    args.results[1] = static_cast<float>(accuracy);
  }
}

__global__ void __launch_bounds__(kThreads, 2) prm_kernel(pk_prm_args args) {
  const Packed packed{args.cu_seqlens, args.n_responses, args.n_tokens, true};
  sum_segments(args.log_ratio, packed, args.delta, args.published);
  if (!arrives_last(args.arrived)) return;
  join_segments(packed, args.delta, args.published);
  __syncthreads();
  response_losses(args);
}

}  // namespace
}  // namespace pk

extern "C" int pk_cuda_ppo_loss(const pk_ppo_args* args, void* stream) {
  using namespace pk;
  if (args == nullptr || args->tokens.n_tokens < 0) return PK_BAD_ARGUMENT;
  return launch("ppo_kernel", ppo_kernel, blocks_for(args->tokens.n_tokens), false, stream, *args);
}

extern "C" int pk_cuda_ppo_loss_backward(const pk_ppo_grad_args* args, void* stream) {
  using namespace pk;
  if (args == nullptr || args->tokens.n_tokens < 0) return PK_BAD_ARGUMENT;
  if (args->tokens.n_tokens == 0) return PK_OK;
  const unsigned blocks = blocks_over(args->tokens.n_tokens, 8);
  return launch("ppo_gradient_kernel", ppo_gradient_kernel, blocks, false, stream, *args);
}

extern "C" int pk_cuda_prm_loss(const pk_prm_args* args, void* stream) {
  using namespace pk;
  if (args == nullptr || args->n_responses < 0 || args->n_tokens < 0) return PK_BAD_ARGUMENT;
  if (args->n_responses == 0 && args->n_tokens > 0) return PK_BAD_ARGUMENT;
  if (args->kind < PK_PRM_CE || args->kind > PK_PRM_NCA) return PK_BAD_ARGUMENT;
  return launch("prm_kernel", prm_kernel, blocks_for(args->n_tokens), false, stream, *args);
}
