// The PRM loss of every prefix of a response, in one launch: a scan gives the value of each prefix, and with it the loss
// and its slope; the last block to arrive adds up. The backward pass is the scan of the slopes in reverse.

#include "block_carry.cuh"
#include "prm_math.cuh"

namespace pk {
namespace {

__device__ double responses_with_tokens(const pk_prefix_args& args) {
  double count = 0.0;
  for (int64_t r = threadIdx.x; r < args.n_responses; r += kThreads) {
    count += args.cu_seqlens[r] < args.cu_seqlens[r + 1] ? 1.0 : 0.0;
  }
  return block_sum(count);
}

__global__ void __launch_bounds__(kThreads, 2) prefix_kernel(pk_prefix_args args) {
  const Packed packed{args.cu_seqlens, args.n_responses, args.n_tokens, false};
  const BlockRange range(packed.tokens, blockIdx.x, gridDim.x);
  static_assert(sizeof(Affine<1>) == sizeof(pk_affine));
  auto* published = reinterpret_cast<Affine<1>*>(args.published);
  const Affine<1> carry = carry_over_blocks(args.log_ratio, packed, range, 1.0, published);
  const double share = 1.0 / fmax(responses_with_tokens(args), 1.0);
  double loss = 0.0;
  const auto input = [&](int64_t token, const Segment&) {
    return Affine<1>{1.0, {static_cast<double>(args.log_ratio[token])}};
  };
  const auto visit = [&](int64_t token, const Segment& response, const double* sum) {
    const int64_t r = response.index;
    const double length = static_cast<double>(response.end - response.begin);
    const double rate = args.beta / static_cast<double>(token - response.begin + 1);
    const double value = rate * sum[0] + (args.shift == nullptr ? 0.0 : args.shift[r]);
    const double weight = (args.weights == nullptr ? share : share * args.weights[r]) / length;
    const double right = args.outcomes[r];
    const double wrong = 1.0 - right;
    loss += weight * (right * softplus(args.margin - value) + wrong * softplus(args.margin + value));
    const double slope = wrong * sigmoid(args.margin + value) - right * sigmoid(args.margin - value);
    args.slope[token] = static_cast<float>(weight * rate * slope);
    if (token + 1 == response.end) args.scores[r] = sum[0] / length;
  };
  scan_block<1>(packed, range, carry, input, visit);
  loss = block_sum(loss);
  if (threadIdx.x == 0) args.sums[blockIdx.x] = loss;
  if (!arrives_last(args.arrived)) return;
  double all = 0.0;
  for (unsigned b = threadIdx.x; b < gridDim.x; b += kThreads) all += args.sums[b];
  all = block_sum(all);
  const OrderedResponses ordered{args.scores, args.outcomes, args.cu_seqlens};
  const double accuracy = pair_accuracy(ordered, args.cu_groups, args.n_groups);
  if (threadIdx.x == 0) {
    args.results[0] = static_cast<float>(all);
    args.results[1] = static_cast<float>(accuracy);
  }
}

}  // namespace
}  // namespace pk

extern "C" int pk_cuda_prefix_loss(const pk_prefix_args* args, void* stream) {
  using namespace pk;
  if (args == nullptr || args->n_responses < 0 || args->n_tokens < 0) return PK_BAD_ARGUMENT;
  if (args->n_responses == 0 && args->n_tokens > 0) return PK_BAD_ARGUMENT;
  return launch("prefix_kernel", prefix_kernel, blocks_for(args->n_tokens), true, stream, *args);
}
