// RLOO returns in one launch with three barriers over the grid, and their whitening in a second.
//
// Where every rank's largest return is needed first, the launch ends before the responses and a second one goes on.

#include <cooperative_groups.h>

#include "segmented_scan.cuh"

namespace pk {
namespace {

// What a block leaves to the next of the response that is open at its end.
struct Open {
  double weight;   // 1, or 0 where a response begins (from its last token on) in the block
  double fading;   // the same for rewards discounted by gamma_process: gamma^tokens or 0
  double sum;      // of the rewards
  double count;    // of the tokens that carry one
  double rewards;  // discounted
  double carried;  // ones, discounted
};
static_assert(sizeof(Open) * PK_MAX_BLOCKS <= PK_RLOO_WORKSPACE, "the workspace holds what the blocks leave");

struct Rloo {
  pk_rloo_args args;
  const double* outcomes;
  const int64_t* cu_groups;
  int64_t groups;
  bool normalize;
  bool paper;
  Open* open;
  double* top;      // [blocks]
  double* largest;  // or null: taken from `top`
  double* sums;     // [responses] and below
  double* counts;
  double* scale;
  double* shift;
  double* centred;
  double* stats;  // [blocks, 3]
  bool moments;   // what this launch does
  bool returns;
};

__device__ bool carries(const Rloo& rloo, int64_t token) { return rloo.args.mask == nullptr || rloo.args.mask[token] != 0; }

__device__ Packed packed_of(const Rloo& rloo) {
  return {rloo.args.cu_seqlens, rloo.args.n_responses, rloo.args.n_tokens, true};
}

__device__ void leave_open(const Rloo& rloo, const Share& share) {
  const Packed packed = packed_of(rloo);
  Open open{1.0, 1.0, 0.0, 0.0, 0.0, 0.0};
  if (!share.empty()) {
    Segment response;
    response.seek(packed.cu, packed.segments, packed.token(share.end - 1));
    const bool begins = packed.first(response) >= share.begin;
    const int64_t from = begins ? packed.first(response) : share.begin;
    for (int64_t p = from + threadIdx.x; p < share.end; p += kThreads) {
      const int64_t token = packed.token(p);
      if (!carries(rloo, token)) continue;
      const double reward = rloo.args.rewards[token];
      const double discount = power(rloo.args.gamma_process, share.end - 1 - p);
      open.sum += reward;
      open.count += 1.0;
      open.rewards += discount * reward;
      open.carried += discount;
    }
    open.weight = begins ? 0.0 : 1.0;
    open.fading = begins ? 0.0 : power(rloo.args.gamma_process, share.end - share.begin);
  }
  open.sum = block_sum(open.sum);
  open.count = block_sum(open.count);
  open.rewards = block_sum(open.rewards);
  open.carried = block_sum(open.carried);
  if (threadIdx.x == 0) rloo.open[blockIdx.x] = open;
}

// Sum and count of each response, and the largest |sum of a response's rewards from a token on| of the share.
__device__ void moments(const Rloo& rloo, const Share& share) {
  const Packed packed = packed_of(rloo);
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t r = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x; r < packed.segments; r += step) {
    if (packed.cu[r] == packed.cu[r + 1]) rloo.sums[r] = rloo.counts[r] = 0.0;
  }
  const Link<2> carry = carried_into<2>(blockIdx.x, [&](int64_t block) {
    const Open& open = rloo.open[block];
    return Link<2>{open.weight, {open.sum, open.count}};
  });
  double top = 0.0;
  const auto input = [&](int64_t token, const Segment&) {
    const bool carried = carries(rloo, token);
    return Link<2>{1.0, {carried ? static_cast<double>(rloo.args.rewards[token]) : 0.0, carried ? 1.0 : 0.0}};
  };
  const auto visit = [&](int64_t token, const Segment& response, const double* y) {
    top = fmax(top, fabs(y[0]));
    if (token == response.begin) {
      rloo.sums[response.index] = y[0];
      rloo.counts[response.index] = y[1];
    }
  };
  scan_share<2>(packed, share, Link<2>{0.0, {carry.value[0], carry.value[1]}}, input, visit);
  top = block_max(top);
  if (threadIdx.x == 0) rloo.top[blockIdx.x] = top;
}

__device__ double highest(const double* top, int64_t count) {
  double value = 0.0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) value = fmax(value, top[i]);
  return block_max(value);
}

// The process return of a response is that of scale * reward + shift: baselines and normalisation are linear in it.
__device__ void responses(const Rloo& rloo) {
  double unit = 1.0;
  if (rloo.args.rewards != nullptr && rloo.normalize) {
    unit = 1.0 / ((rloo.largest != nullptr ? *rloo.largest : highest(rloo.top, gridDim.x)) + 1e-6);
  }
  const int64_t* cu = rloo.args.cu_seqlens;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  Segment group;
  for (int64_t r = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x; r < rloo.args.n_responses; r += step) {
    group.seek(rloo.cu_groups, rloo.groups, r);
    double outcomes = 0.0;
    double others = 0.0;
    double means = 0.0;
    double carrying = 0.0;
    for (int64_t j = group.begin; j < group.end; ++j) {
      if (j == r) continue;
      if (cu[j + 1] > cu[j]) {
        outcomes += rloo.outcomes[j];
        others += 1.0;
      }
      if (rloo.args.rewards != nullptr && rloo.counts[j] > 0.0) {
        means += rloo.sums[j] * unit / rloo.counts[j];
        carrying += 1.0;
      }
    }
    rloo.centred[r] = rloo.outcomes[r] - outcomes / fmax(others, 1.0);
    if (rloo.args.rewards == nullptr) continue;
    const double mean = rloo.sums[r] * unit / fmax(rloo.counts[r], 1.0);
    const double share = rloo.paper || carrying == 0.0 ? 0.0 : 1.0 / carrying;
    rloo.scale[r] = unit * (1.0 + share);
    rloo.shift[r] = -share * mean - means / fmax(carrying, 1.0);
  }
}

__device__ void returns(const Rloo& rloo, const Share& share) {
  const pk_rloo_args& args = rloo.args;
  const Packed packed = packed_of(rloo);
  const bool process = args.rewards != nullptr;
  Link<1> carry{0.0, {}};
  if (process && !share.empty()) {
    Segment response;
    response.seek(packed.cu, packed.segments, packed.token(share.begin));
    const Link<2> open = carried_into<2>(blockIdx.x, [&](int64_t block) {
      const Open& left = rloo.open[block];
      return Link<2>{left.fading, {left.rewards, left.carried}};
    });
    carry.value[0] = rloo.scale[response.index] * open.value[0] + rloo.shift[response.index] * open.value[1];
  }
  double sum = 0.0;
  const auto input = [&](int64_t token, const Segment& response) {
    double reward = 0.0;
    if (process && carries(rloo, token)) {
      reward = rloo.scale[response.index] * static_cast<double>(args.rewards[token]) + rloo.shift[response.index];
    }
    return Link<1>{args.gamma_process, {reward}};
  };
  const auto store = [&](int64_t token, const Segment& response, const double* y) {
    const double outcome = rloo.centred[response.index] * power(args.gamma_outcome, response.end - 1 - token);
    const float value = static_cast<float>(args.process_coef * y[0] + args.outcome_coef * outcome);
    args.out[token] = value;
    sum += value;
  };
  scan_share<1>(packed, share, carry, input, store);
  const double count = static_cast<double>(share.end - share.begin);
  const double mean = block_sum(sum) / fmax(count, 1.0);
  double squares = 0.0;
  for (int64_t p = share.begin + threadIdx.x; p < share.end; p += kThreads) {
    const double centred = args.out[packed.token(p)] - mean;
    squares += centred * centred;
  }
  squares = block_sum(squares);
  if (threadIdx.x == 0) {
    double* stats = rloo.stats + 3 * blockIdx.x;
    stats[0] = count;
    stats[1] = mean;
    stats[2] = squares;
  }
}

__global__ void __launch_bounds__(kThreads) rloo_kernel(Rloo rloo) {
  const Share share(rloo.args.n_tokens, blockIdx.x, gridDim.x);
  if (rloo.moments) {
    leave_open(rloo, share);
    cooperative_groups::this_grid().sync();
    moments(rloo, share);
    cooperative_groups::this_grid().sync();
    if (!rloo.returns && blockIdx.x == 0) {
      const double largest = highest(rloo.top, gridDim.x);
      if (threadIdx.x == 0) *rloo.largest = largest;
    }
  }
  if (!rloo.returns) return;
  responses(rloo);
  cooperative_groups::this_grid().sync();
  returns(rloo, share);
}

// The shares' statistics are merged by every block, in one order.
__global__ void __launch_bounds__(kThreads) whiten_kernel(const float* values, int64_t n, const double* stats,
                                                          int64_t rows, float* out) {
  double count = 0.0;
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < rows; i += kThreads) {
    count += stats[3 * i];
    sum += stats[3 * i] * stats[3 * i + 1];
  }
  count = block_sum(count);
  const double mean = block_sum(sum) / fmax(count, 1.0);
  double squares = 0.0;
  for (int64_t i = threadIdx.x; i < rows; i += kThreads) {
    const double apart = stats[3 * i + 1] - mean;
    squares += stats[3 * i + 2] + stats[3 * i] * apart * apart;
  }
  const double factor = rsqrt(block_sum(squares) / fmax(count - 1.0, 1.0) + 1e-8);
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t t = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x; t < n; t += step) {
    out[t] = static_cast<float>((values[t] - mean) * factor);
  }
}

}  // namespace
}  // namespace pk

extern "C" int pk_cuda_rloo_returns(const pk_cuda_rloo_args* args, void* stream, int64_t* blocks) {
  using namespace pk;
  if (args == nullptr || args->tokens.n_responses < 0 || args->tokens.n_tokens < 0) return PK_BAD_ARGUMENT;
  if (args->tokens.n_responses == 0 && args->tokens.n_tokens > 0) return PK_BAD_ARGUMENT;
  const int64_t n = args->tokens.n_responses;
  double* of_blocks = static_cast<double*>(args->workspace);
  double* of_responses = of_blocks + PK_RLOO_WORKSPACE / sizeof(double) + PK_MAX_BLOCKS;
  Rloo rloo{args->tokens,
            args->outcomes,
            args->cu_groups,
            args->n_groups,
            args->normalize_process != 0,
            args->paper_baseline != 0,
            reinterpret_cast<Open*>(of_blocks),
            of_blocks + PK_RLOO_WORKSPACE / sizeof(double),
            args->largest,
            of_responses,
            of_responses + n,
            of_responses + 2 * n,
            of_responses + 3 * n,
            of_responses + 4 * n,
            args->stats,
            args->moments != 0,
            args->returns != 0};
  const unsigned grid = blocks_for(args->tokens.n_tokens);
  *blocks = grid;
  return launch(rloo_kernel, grid, true, stream, rloo);
}

extern "C" int pk_cuda_whiten(const float* values, int64_t n, const double* stats, int64_t rows, float* out,
                              void* stream) {
  using namespace pk;
  if (n < 0 || rows < 0) return PK_BAD_ARGUMENT;
  if (n == 0) return PK_OK;
  return launch(whiten_kernel, blocks_over(n, 8), false, stream, values, n, stats, rows, out);
}
