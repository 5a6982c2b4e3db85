// Log-probability of one id per row. The loops of row_kernels read each row once and exclude the target, which is added
// here in double. Otherwise, where the target's probability is near 1, float would round away the tail of the row, and
// with it every digit of the log-probability.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "pk/abi.h"
#include "half.h"
#include "pages.h"
#include "row_kernels.h"
#include "threads.h"

namespace pk {
namespace {

constexpr double kLn2 = 0.693147180559945309;
constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr int64_t kRowsPerChunk = 4;  // small, as masked rows take no time
// Results larger than this leave the caches before they are read: they are written around the cache.
constexpr int64_t kStreamBytes = int64_t{8} << 20;

int64_t item_size(int32_t dtype) { return dtype == PK_FLOAT32 ? 4 : 2; }

bool known_dtype(int32_t dtype) { return dtype == PK_FLOAT32 || dtype == PK_BFLOAT16 || dtype == PK_FLOAT16; }

const char* at(const void* base, int64_t element, int32_t dtype) {
  return static_cast<const char*>(base) + element * item_size(dtype);
}

double value_at(const void* row, int64_t column, int32_t dtype) {
  const char* place = at(row, column, dtype);
  if (dtype == PK_FLOAT32) return *reinterpret_cast<const float*>(place);
  if (dtype == PK_BFLOAT16) return to_float(*reinterpret_cast<const bfloat16*>(place));
  return to_float(*reinterpret_cast<const float16*>(place));
}

void put_at(void* row, int64_t column, int32_t dtype, float value) {
  char* place = static_cast<char*>(row) + column * item_size(dtype);
  if (dtype == PK_FLOAT32) {
    *reinterpret_cast<float*>(place) = value;
  } else if (dtype == PK_BFLOAT16) {
    *reinterpret_cast<bfloat16*>(place) = from_float<bfloat16>(value);
  } else {
    *reinterpret_cast<float16*>(place) = from_float<float16>(value);
  }
}

// Gradients have the dtype of their logits; those of float32 logits may be rounded to another one.
bool known_gradient(const pk_log_probs_grad_args& args) {
  return known_dtype(args.dtype) && known_dtype(args.out_dtype) &&
         (args.out_dtype == args.dtype || args.dtype == PK_FLOAT32);
}

bool read_row(const uint8_t* mask, int64_t row) { return mask == nullptr || mask[row] != 0; }

// Checked before the parallel loop, so that the lowest bad row is reported for any number of threads.
template <typename Args>
int check_rows(const Args& args, bool ids_may_lie_outside = false) {
  if (args.n_rows < 0 || args.n_cols < 1 || args.bad_row == nullptr) return PK_BAD_ARGUMENT;
  if (ids_may_lie_outside) return PK_OK;
  for (int64_t row = 0; row < args.n_rows; ++row) {
    if (!read_row(args.mask, row)) continue;
    if (args.ids[row] < 0 || args.ids[row] >= args.n_cols) {
      *args.bad_row = row;
      return PK_BAD_INDEX;
    }
  }
  return PK_OK;
}

struct RowResult {
  double logp;
  double lse;
  double entropy;
};

// For rows where float arithmetic would overflow or an infinity leaves no distribution.
RowResult forward_in_double(const void* z, int64_t n, int64_t id, int32_t dtype, double temperature) {
  double highest = -kInf;
  for (int64_t i = 0; i < n; ++i) highest = std::max(highest, value_at(z, i, dtype) / temperature);
  double sum = 0.0;
  double weighted = 0.0;
  for (int64_t i = 0; i < n; ++i) {
    const double t = value_at(z, i, dtype) / temperature - highest;
    const double e = std::exp(t);
    sum += e;
    weighted += e == 0.0 ? 0.0 : t * e;
  }
  const double log_sum = std::log(sum);
  return {value_at(z, id, dtype) / temperature - highest - log_sum, highest + log_sum, log_sum - weighted / sum};
}

// The softmax sums of a row without its target; false if the row must be computed in double.
bool take_rest(const void* z, int64_t n, int64_t id, int32_t dtype, double target, bool weighted, RowSoftmax& rest) {
  if (std::isfinite(target)) {
    // Initial estimate of the maximum.
    const float shift = static_cast<float>(target) * rest.scale;
    if (!(std::fabs(shift) < kFarthest)) return false;
    rest.highest = static_cast<float>(target);
    rest.offset = weighted ? 0.0 : target * rest.scale - shift;
  }
  const auto take = row_kernels().softmax[dtype][weighted];
  return take(z, id, &rest) && take(at(z, id + 1, dtype), n - id - 1, &rest);
}

// The sums of a row's blocks: those before the target, then those after it. Not known where a row is computed in double.
struct RowBlocks {
  std::vector<BlockTotal> totals;
  bool known = false;
  explicit RowBlocks(int64_t n) : totals(static_cast<size_t>(n / kSoftmaxBlock + 2)) {}
};

RowResult forward_row(const void* z, int64_t n, int64_t id, int32_t dtype, double temperature, bool with_entropy,
                      RowBlocks* blocks = nullptr) {
  const double log2_scale = 1.0 / (temperature * kLn2);
  const float infinity = std::numeric_limits<float>::infinity();
  const RowSoftmax nothing{static_cast<float>(log2_scale), -infinity, 0.0, 0.0, 0.0, nullptr};
  RowSoftmax rest = nothing;
  if (blocks != nullptr) rest.blocks = blocks->totals.data();
  const double target = value_at(z, id, dtype);
  // A target of +inf has no log-probability: the double path gives NaN, as for +inf anywhere else in the row.
  if (target == kInf) return forward_in_double(z, n, id, dtype, temperature);
  if (!take_rest(z, n, id, dtype, target, false, rest)) return forward_in_double(z, n, id, dtype, temperature);
  if (rest.highest == -infinity) {
    // Only -inf (or NaN, which is in the sum): no distribution.
    return {kNaN, std::isnan(rest.sum) || std::isnan(target) ? kNaN : -kInf, kNaN};
  }
  if (blocks != nullptr) blocks->known = true;
  // The sums are relative to the rounded bias; this corrects its rounding error.
  const double others = rest.sum * std::exp2(-rest.offset);
  const double t = (target - rest.highest) * log2_scale;
  const double p = std::exp2(t);
  const double log_sum = std::log(others + p);
  // log1p keeps the digits of `others` if p is near 1; if p vanishes, the direct formula is exact enough.
  const double logp = p > 1e-280 ? -std::log1p(others / p) : kLn2 * t - log_sum;
  RowResult result{logp, rest.highest / temperature + log_sum, 0.0};
  if (with_entropy) {
    // A second pass over the row, which is still in the cache: the log-prob has the same bits with and without entropy.
    RowSoftmax all = nothing;
    if (!take_rest(z, n, id, dtype, target, true, all)) return forward_in_double(z, n, id, dtype, temperature);
    const double own_t = (target - all.highest) * log2_scale;
    const double own_p = std::exp2(own_t);
    const double sum = all.sum + own_p;
    const double weighted = all.weighted + (own_p == 0.0 ? 0.0 : own_p * own_t);
    result.entropy = std::log(sum) - kLn2 * weighted / sum;
  }
  return result;
}

// Finds the candidates of a row: ids and logits with z / temperature >= lse + log_min_prob, ascending.
class RowSearch {
 public:
  RowSearch(const pk_candidates_args& args, int64_t row, const void* z, double lse)
      : args_(args), z_(z), ids_(args.found_ids + row * args.n_slots), found_(args.found + row * args.n_slots) {
    constexpr double kSlack = 1e-5;  // nats: the caller decides with the lse of the whole vocabulary
    log_least_ = lse + args.log_min_prob - kSlack;
    const float least = static_cast<float>(log_least_ * args.temperature);
    threshold_ = std::nextafterf(least, -std::numeric_limits<float>::infinity());
  }

  void in(int64_t begin, int64_t end) {
    while (begin < end) {
      begin += row_kernels().search[args_.dtype](at(z_, begin, args_.dtype), end - begin, threshold_);
      const int64_t stop = std::min(end, begin + kSearchBlock);
      for (; begin < stop && count_ < args_.n_slots; ++begin) {
        const double value = value_at(z_, begin, args_.dtype);
        if (!(value >= threshold_)) continue;
        ids_[count_] = begin;
        found_[count_++] = static_cast<float>(value);
      }
      if (count_ == args_.n_slots) return;
    }
  }

  // In those of the blocks from `begin` on whose sum is that of a candidate at least; returns the first one not used.
  const BlockTotal* in_blocks(const BlockTotal* block, int64_t begin, int64_t end) {
    const double scale = 1.0 / (args_.temperature * kLn2);
    for (; begin < end; begin += kSoftmaxBlock, ++block) {
      const double highest = block->highest * scale;
      const double total = std::log2(block->sum) + highest - block->offset;
      // Exponents in float are off by the rounding of large logits.
      if (total >= log_least_ / kLn2 - 1e-3 - std::fabs(highest) * 0x1p-21) {
        in(begin, std::min(end, begin + kSoftmaxBlock));
      }
    }
    return block;
  }

 private:
  const pk_candidates_args& args_;
  const void* z_;
  int64_t* ids_;
  float* found_;
  int64_t count_ = 0;
  double log_least_;
  float threshold_;
};

// The same formulas in double, one element at a time, for rows that the float loops cannot handle.
void backward_in_double(const pk_log_probs_grad_args& args, const char* z, char* out, int64_t row, double entropy) {
  const double grad_logp = args.grad_logp == nullptr ? 0.0 : args.grad_logp[row];
  const double grad_entropy = args.grad_entropy == nullptr ? 0.0 : args.grad_entropy[row];
  for (int64_t i = 0; i < args.n_cols; ++i) {
    const double log_p = value_at(z, i, args.dtype) / args.temperature - args.lse[row];
    const double p = std::exp(log_p);
    const double curvature = p == 0.0 ? 0.0 : p * (log_p + entropy);
    const double others = i == args.ids[row] ? -grad_logp * std::expm1(log_p) : -grad_logp * p;
    put_at(out, i, args.dtype, static_cast<float>((others - grad_entropy * curvature) / args.temperature));
  }
}

// The gradient of a row in the dtype of its logits.
void backward_row(const pk_log_probs_grad_args& args, int64_t row, bool stream, char* out) {
  const char* z = at(args.logits, row * args.logits_stride, args.dtype);
  const double grad_logp = args.grad_logp == nullptr ? 0.0 : args.grad_logp[row];
  const double grad_entropy = args.grad_entropy == nullptr ? 0.0 : args.grad_entropy[row];
  const double lse = args.lse[row];
  // With a finite lse the row has no NaN and no +inf that a zero gradient could hide.
  if (grad_logp == 0.0 && grad_entropy == 0.0 && std::isfinite(lse)) {
    std::memset(out, 0, static_cast<size_t>(args.n_cols * item_size(args.dtype)));
    return;
  }
  const double entropy = args.grad_entropy == nullptr ? 0.0 : args.entropy[row];
  const double log2_scale = 1.0 / (args.temperature * kLn2);

  // d/dz_j = p_j * (-grad_logp - grad_entropy * (log p_j + H)) / temperature, plus the target's own term;
  // log p_j is t * ln 2, so the bracket is a + b * t.
  RowGradient by;
  by.scale = static_cast<float>(log2_scale);
  by.bias = static_cast<float>(-lse / kLn2);
  // The rounding error of the bias is corrected in the factors, which are computed once per row.
  const double residue = -lse - kLn2 * by.bias;
  const double factor = -std::exp(residue) / args.temperature;
  by.a = static_cast<float>(factor * (grad_logp + grad_entropy * (entropy + residue)));
  by.b = static_cast<float>(factor * grad_entropy * kLn2);
  const int64_t id = args.ids[row];
  const bool has_target = id >= 0 && id < args.n_cols;
  const double log_p = has_target ? value_at(z, id, args.dtype) / args.temperature - lse : 0.0;
  if (!std::isfinite(by.scale) || !(std::fabs(by.bias) < kFarthest) || !std::isfinite(by.a) || !std::isfinite(by.b)) {
    return backward_in_double(args, z, out, row, entropy);
  }
  row_kernels().gradient[args.dtype][args.grad_entropy != nullptr](z, args.n_cols, by, stream, out);
  if (!has_target) return;
  // expm1: 1 - p has no digits left if p is near 1.
  const double p = std::exp(log_p);
  const double curvature = p == 0.0 ? 0.0 : p * (log_p + entropy);
  const double target = -grad_logp * std::expm1(log_p) - grad_entropy * curvature;
  put_at(out, id, args.dtype, static_cast<float>(target / args.temperature));
}

}  // namespace
}  // namespace pk

extern "C" int pk_cpu_log_probs_forward(const pk_log_probs_args* args) {
  using namespace pk;
  if (args == nullptr || args->n_models < 1 || args->n_models > PK_MAX_MODELS) return PK_BAD_ARGUMENT;
  for (int m = 0; m < args->n_models; ++m) {
    if (!known_dtype(args->models[m].dtype) || !(args->models[m].temperature > 0.0)) return PK_BAD_ARGUMENT;
  }
  if (const int status = check_rows(*args)) return status;
  const int64_t tasks = args->n_rows * args->n_models;
  const int threads = thread_count(args->n_threads, tasks, tasks * args->n_cols);
  (void)threads;
  // One thread handles a row of a model: results do not depend on the number of threads.
#pragma omp parallel for schedule(dynamic, kRowsPerChunk) num_threads(threads) if (threads > 1)
  for (int64_t task = 0; task < tasks; ++task) {
    const int64_t row = task / args->n_models;
    const pk_log_probs_model& model = args->models[task % args->n_models];
    RowResult result{0.0, 0.0, 0.0};
    if (read_row(args->mask, row)) {
      const char* z = at(model.logits, row * model.stride, model.dtype);
      result = forward_row(z, args->n_cols, args->ids[row], model.dtype, model.temperature, model.entropy != nullptr);
    }
    model.logp[row] = static_cast<float>(result.logp);
    model.lse[row] = static_cast<float>(result.lse);
    if (model.entropy != nullptr) model.entropy[row] = static_cast<float>(result.entropy);
  }
  return PK_OK;
}

extern "C" int pk_cpu_candidates(const pk_candidates_args* args) {
  using namespace pk;
  if (args == nullptr || !known_dtype(args->dtype) || !(args->temperature > 0.0)) return PK_BAD_ARGUMENT;
  if (args->n_slots < 1 || !(args->log_min_prob <= 0.0)) return PK_BAD_ARGUMENT;
  if (const int status = check_rows(*args)) return status;
  const int threads = thread_count(args->n_threads, args->n_rows, args->n_rows * args->n_cols);
  (void)threads;
#pragma omp parallel for schedule(dynamic, kRowsPerChunk) num_threads(threads) if (threads > 1)
  for (int64_t row = 0; row < args->n_rows; ++row) {
    int64_t* ids = args->found_ids + row * args->n_slots;
    float* found = args->found + row * args->n_slots;
    std::fill(ids, ids + args->n_slots, int64_t{-1});
    std::fill(found, found + args->n_slots, -std::numeric_limits<float>::infinity());
    RowResult result{0.0, 0.0, 0.0};
    if (read_row(args->mask, row)) {
      const char* z = at(args->logits, row * args->stride, args->dtype);
      const int64_t id = args->ids[row];
      RowBlocks blocks(args->n_cols);
      result = forward_row(z, args->n_cols, id, args->dtype, args->temperature, false, &blocks);
      RowSearch search(*args, row, z, result.lse);
      if (!std::isfinite(result.lse)) {
        // No distribution: nothing to find.
      } else if (!blocks.known) {
        search.in(0, args->n_cols);
      } else {
        const BlockTotal* rest = search.in_blocks(blocks.totals.data(), 0, id);
        search.in(id, id + 1);
        search.in_blocks(rest, id + 1, args->n_cols);
      }
    }
    args->logp[row] = static_cast<float>(result.logp);
    args->lse[row] = static_cast<float>(result.lse);
  }
  return PK_OK;
}

extern "C" int pk_cpu_log_probs_backward(const pk_log_probs_grad_args* args) {
  using namespace pk;
  if (args == nullptr || !known_gradient(*args) || !(args->temperature > 0.0)) return PK_BAD_ARGUMENT;
  if (args->grad_entropy != nullptr && args->entropy == nullptr) return PK_BAD_ARGUMENT;
  if (const int status = check_rows(*args, args->partial != 0)) return status;
  const int threads = thread_count(args->n_threads, args->n_rows, args->n_rows * args->n_cols);
  (void)threads;
  const int64_t bytes = args->n_rows * args->n_cols * item_size(args->out_dtype);
  const bool stream = args->out != args->logits && bytes > kStreamBytes;
  if (stream && args->out_stride == args->n_cols) ask_for_huge_pages(args->out, bytes);
  const bool rounded = args->out_dtype != args->dtype;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    std::vector<float> wide(rounded ? static_cast<size_t>(args->n_cols) : 0);
#pragma omp for schedule(dynamic, kRowsPerChunk)
    for (int64_t row = 0; row < args->n_rows; ++row) {
      char* out = const_cast<char*>(at(args->out, row * args->out_stride, args->out_dtype));
      if (!read_row(args->mask, row)) {
        std::memset(out, 0, static_cast<size_t>(args->n_cols * item_size(args->out_dtype)));
      } else if (rounded) {
        backward_row(*args, row, false, reinterpret_cast<char*>(wide.data()));
        for (int64_t i = 0; i < args->n_cols; ++i) put_at(out, i, args->out_dtype, wide[static_cast<size_t>(i)]);
      } else {
        backward_row(*args, row, stream, out);
      }
    }
  }
  return PK_OK;
}
