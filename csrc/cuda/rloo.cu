// RLOO returns in one launch with three grid-wide barriers, and their whitening in another.
//
// If the largest return is combined over ranks, the sums and the returns are separate launches.

#include <cooperative_groups.h>

#include "segmented_scan.cuh"

#ifdef __CUDACC__
// CUDA's own function behind assert(), whose declaration comes and goes with NDEBUG.
extern "C" __device__ void __assertfail(const char* message, const char* file, unsigned line, const char* function,
                                        size_t char_size);
#endif

namespace pk {
namespace {

// What a block publishes of the response that is open at the end of its range: two affine maps, of undiscounted and of
// discounted sums, of the process rewards and of their number.
struct OpenResponse {
  double weight;             // 1, or 0 if the response begins in this block (it is read from its last token)
  double discounted_weight;  // gamma_process^tokens, or 0
  double sum;
  double count;
  double discounted_sum;
  double discounted_count;
};
static_assert(sizeof(OpenResponse) * PK_MAX_BLOCKS <= PK_RLOO_WORKSPACE, "workspace too small for the open responses");

struct Rloo {
  pk_cuda_rloo_args args;
  OpenResponse* published;  // [blocks]
  double* block_largest;    // [blocks]: the largest |suffix sum|
  double* sums;             // [responses], as all below: of process rewards
  double* counts;           // tokens with a process reward
  double* scale;            // the process return of a response is that of scale * reward + shift
  double* shift;
  double* centred;  // outcome less its baseline
};

__device__ bool has_reward(const Rloo& rloo, int64_t token) {
  return rloo.args.mask == nullptr || rloo.args.mask[token] != 0;
}

__device__ Packed packed_of(const Rloo& rloo) {
  return {rloo.args.cu_seqlens, rloo.args.n_responses, rloo.args.n_tokens, true};
}

__device__ void publish_open_response(const Rloo& rloo, const BlockRange& range) {
  const Packed packed = packed_of(rloo);
  OpenResponse open{1.0, 1.0, 0.0, 0.0, 0.0, 0.0};
  if (!range.empty()) {
    Segment response;
    response.seek(packed.cu, packed.segments, packed.token(range.end - 1));
    const bool begins = packed.first(response) >= range.begin;
    const int64_t from = begins ? packed.first(response) : range.begin;
    for (int64_t p = from + threadIdx.x; p < range.end; p += kThreads) {
      const int64_t token = packed.token(p);
      if (!has_reward(rloo, token)) continue;
      const double reward = rloo.args.rewards[token];
      const double discount = power(rloo.args.gamma_process, range.end - 1 - p);
      open.sum += reward;
      open.count += 1.0;
      open.discounted_sum += discount * reward;
      open.discounted_count += discount;
    }
    open.weight = begins ? 0.0 : 1.0;
    open.discounted_weight = begins ? 0.0 : power(rloo.args.gamma_process, range.end - range.begin);
  }
  open.sum = block_sum(open.sum);
  open.count = block_sum(open.count);
  open.discounted_sum = block_sum(open.discounted_sum);
  open.discounted_count = block_sum(open.discounted_count);
  if (threadIdx.x == 0) rloo.published[blockIdx.x] = open;
}

// Sum and count of each response's process rewards, and the largest |suffix sum| in the block's range.
__device__ void response_sums(const Rloo& rloo, const BlockRange& range) {
  const Packed packed = packed_of(rloo);
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t r = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x; r < packed.segments; r += step) {
    if (packed.cu[r] == packed.cu[r + 1]) rloo.sums[r] = rloo.counts[r] = 0.0;
  }
  const Affine<2> carry = carry_into<2>(blockIdx.x, [&](int64_t block) {
    const OpenResponse& open = rloo.published[block];
    return Affine<2>{open.weight, {open.sum, open.count}};
  });
  double largest = 0.0;
  const auto input = [&](int64_t token, const Segment&) {
    const bool counted = has_reward(rloo, token);
    return Affine<2>{1.0, {counted ? static_cast<double>(rloo.args.rewards[token]) : 0.0, counted ? 1.0 : 0.0}};
  };
  const auto visit = [&](int64_t token, const Segment& response, const double* y) {
    largest = fmax(largest, fabs(y[0]));
    if (token == response.begin) {
      rloo.sums[response.index] = y[0];
      rloo.counts[response.index] = y[1];
    }
  };
  scan_block<2>(packed, range, Affine<2>{0.0, {carry.value[0], carry.value[1]}}, input, visit);
  largest = block_max(largest);
  if (threadIdx.x == 0) rloo.block_largest[blockIdx.x] = largest;
}

__device__ double max_of(const double* values, int64_t count) {
  double largest = 0.0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) largest = fmax(largest, values[i]);
  return block_max(largest);
}

// Leave-one-out baselines. The process reward less its baseline is scale * reward + shift, with one scale and shift per
// response, as normalisation and baselines are linear in the rewards.
__device__ void leave_one_out(const Rloo& rloo) {
  const pk_cuda_rloo_args& args = rloo.args;
  double factor = 1.0;
  if (args.rewards != nullptr && args.normalize_process != 0) {
    const double largest = args.largest != nullptr ? *args.largest : max_of(rloo.block_largest, gridDim.x);
    factor = 1.0 / (largest + PK_NORMALIZE_EPS);
  }
  const int64_t* cu = args.cu_seqlens;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  Segment group;
  for (int64_t r = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x; r < args.n_responses; r += step) {
    group.seek(args.cu_groups, args.n_groups, r);
    double outcomes = 0.0;
    double others = 0.0;
    double means = 0.0;
    double others_with_rewards = 0.0;
    for (int64_t j = group.begin; j < group.end; ++j) {
      if (j == r) continue;
      if (cu[j + 1] > cu[j]) {
        outcomes += args.outcomes[j];
        others += 1.0;
      }
      if (args.rewards != nullptr && rloo.counts[j] > 0.0) {
        means += rloo.sums[j] * factor / rloo.counts[j];
        others_with_rewards += 1.0;
      }
    }
    rloo.centred[r] = args.outcomes[r] - outcomes / fmax(others, 1.0);
    if (args.rewards == nullptr) continue;
    const double mean = rloo.sums[r] * factor / fmax(rloo.counts[r], 1.0);
    // The "reference" baseline adds (reward - mean) / (n - 1).
    const bool paper = args.paper_baseline != 0 || others_with_rewards == 0.0;
    const double weight = paper ? 0.0 : 1.0 / others_with_rewards;
    rloo.scale[r] = factor * (1.0 + weight);
    rloo.shift[r] = -weight * mean - means / fmax(others_with_rewards, 1.0);
  }
}

__device__ void returns(const Rloo& rloo, const BlockRange& range) {
  const pk_cuda_rloo_args& args = rloo.args;
  const Packed packed = packed_of(rloo);
  const bool process = args.rewards != nullptr;
  Affine<1> carry{0.0, {}};
  if (process && !range.empty()) {
    Segment response;
    response.seek(packed.cu, packed.segments, packed.token(range.begin));
    const Affine<2> open = carry_into<2>(blockIdx.x, [&](int64_t block) {
      const OpenResponse& before = rloo.published[block];
      return Affine<2>{before.discounted_weight, {before.discounted_sum, before.discounted_count}};
    });
    carry.value[0] = rloo.scale[response.index] * open.value[0] + rloo.shift[response.index] * open.value[1];
  }
  double sum = 0.0;
  const auto input = [&](int64_t token, const Segment& response) {
    double reward = 0.0;
    if (process && has_reward(rloo, token)) {
      reward = rloo.scale[response.index] * static_cast<double>(args.rewards[token]) + rloo.shift[response.index];
    }
    return Affine<1>{args.gamma_process, {reward}};
  };
  const auto store = [&](int64_t token, const Segment& response, const double* y) {
    const double outcome = rloo.centred[response.index] * power(args.gamma_outcome, response.end - 1 - token);
    const float value = static_cast<float>(args.process_coef * y[0] + args.outcome_coef * outcome);
    args.out[token] = value;
    sum += value;
  };
  scan_block<1>(packed, range, carry, input, store);
  const double count = static_cast<double>(range.end - range.begin);
  const double mean = block_sum(sum) / fmax(count, 1.0);
  double squares = 0.0;
  for (int64_t p = range.begin + threadIdx.x; p < range.end; p += kThreads) {
    const double centred = args.out[packed.token(p)] - mean;
    squares += centred * centred;
  }
  squares = block_sum(squares);
  if (threadIdx.x == 0) {
    double* moments = args.moments + 3 * blockIdx.x;
    moments[0] = count;
    moments[1] = mean;
    moments[2] = squares;
  }
}

__global__ void __launch_bounds__(kThreads) rloo_kernel(Rloo rloo) {
  const BlockRange range(rloo.args.n_tokens, blockIdx.x, gridDim.x);
  if (rloo.args.with_sums != 0) {
    publish_open_response(rloo, range);
    cooperative_groups::this_grid().sync();
    response_sums(rloo, range);
    cooperative_groups::this_grid().sync();
    if (rloo.args.with_returns == 0 && blockIdx.x == 0) {
      const double largest = max_of(rloo.block_largest, gridDim.x);
      if (threadIdx.x == 0) *rloo.args.largest = largest;
    }
  }
  if (rloo.args.with_returns == 0) return;
  leave_one_out(rloo);
  cooperative_groups::this_grid().sync();
  returns(rloo, range);
}

__device__ void require(bool condition, const char* message) {
  // Unlike assert() also in builds with NDEBUG.
  if (!condition) __assertfail(message, "prime_kernels", 0, "rloo_advantages", sizeof(char));
}

__device__ bool finite(double value) { return fabs(value) <= 1.7976931348623157e308; }

__global__ void __launch_bounds__(kThreads) check_kernel(pk_cuda_rloo_check_args args) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t* cu = args.cu_seqlens;
  const int64_t* groups = args.cu_groups;
  const int64_t start = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (start == 0) {
    require(cu[0] == 0, "cu_seqlens: expected to start at 0");
    require(groups[0] == 0, "cu_groups: expected to start at 0");
    require(groups[args.n_groups] == args.n_responses, "cu_groups: expected to end at the number of responses");
    if (args.rewards != nullptr) {
      require(cu[args.n_responses] == args.n_tokens, "cu_seqlens: expected to end at the number of tokens");
    }
  }
  for (int64_t i = start; i < args.n_responses; i += step) {
    require(cu[i] <= cu[i + 1], "cu_seqlens: expected non-decreasing offsets");
    require(finite(args.outcomes[i]), "outcomes: expected finite values");
  }
  for (int64_t i = start; i < args.n_groups; i += step) {
    require(groups[i] <= groups[i + 1], "cu_groups: expected non-decreasing offsets");
  }
  if (args.rewards == nullptr) return;
  for (int64_t t = start; t < args.n_tokens; t += step) {
    if (args.mask != nullptr && args.mask[t] == 0) continue;
    require(finite(args.rewards[t]), "process_rewards: expected finite values");
  }
}

// Every block merges the moments of all parts, in the same order.
__global__ void __launch_bounds__(kThreads) whiten_kernel(pk_whiten_args args) {
  double count = 0.0;
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < args.n_parts; i += kThreads) {
    count += args.moments[3 * i];
    sum += args.moments[3 * i] * args.moments[3 * i + 1];
  }
  count = block_sum(count);
  const double mean = block_sum(sum) / fmax(count, 1.0);
  double squares = 0.0;
  for (int64_t i = threadIdx.x; i < args.n_parts; i += kThreads) {
    const double deviation = args.moments[3 * i + 1] - mean;
    squares += args.moments[3 * i + 2] + args.moments[3 * i] * deviation * deviation;
  }
  const double factor = rsqrt(block_sum(squares) / fmax(count - 1.0, 1.0) + PK_WHITEN_EPS);
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t t = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x; t < args.n_tokens; t += step) {
    args.out[t] = static_cast<float>((args.values[t] - mean) * factor);
  }
}

}  // namespace
}  // namespace pk

extern "C" int pk_cuda_rloo_check(const pk_cuda_rloo_check_args* args, void* stream) {
  using namespace pk;
  if (args == nullptr || args->n_responses < 0 || args->n_groups < 0 || args->n_tokens < 0) return PK_BAD_ARGUMENT;
  const int64_t most = args->n_tokens > args->n_groups ? args->n_tokens : args->n_groups;
  const unsigned blocks = blocks_over(most > args->n_responses ? most : args->n_responses, 8);
  return launch("check_kernel", check_kernel, blocks, false, stream, *args);
}

extern "C" int pk_cuda_rloo_returns(const pk_cuda_rloo_args* args, void* stream) {
  using namespace pk;
  if (args == nullptr || args->n_responses < 0 || args->n_tokens < 0) return PK_BAD_ARGUMENT;
  if (args->n_responses == 0 && args->n_tokens > 0) return PK_BAD_ARGUMENT;
  const int64_t n = args->n_responses;
  double* of_blocks = static_cast<double*>(args->workspace);
  double* of_responses = of_blocks + PK_RLOO_WORKSPACE / sizeof(double) + PK_MAX_BLOCKS;
  Rloo rloo{*args,
            reinterpret_cast<OpenResponse*>(of_blocks),
            of_blocks + PK_RLOO_WORKSPACE / sizeof(double),
            of_responses,
            of_responses + n,
            of_responses + 2 * n,
            of_responses + 3 * n,
            of_responses + 4 * n};
  const unsigned grid = blocks_for(args->n_tokens);
  *args->n_blocks = grid;
  return launch("rloo_kernel", rloo_kernel, grid, true, stream, rloo);
}

extern "C" int pk_cuda_whiten(const pk_whiten_args* args, void* stream) {
  using namespace pk;
  if (args == nullptr || args->n_tokens < 0 || args->n_parts < 0) return PK_BAD_ARGUMENT;
  if (args->n_tokens == 0) return PK_OK;
  return launch("whiten_kernel", whiten_kernel, blocks_over(args->n_tokens, 8), false, stream, *args);
}
