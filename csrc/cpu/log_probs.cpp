// Log-probability of one id per row, with an online softmax: each row is read once, block by block.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "pk/abi.h"
#include "pk/numeric.h"
#include "pk/row_blocks.h"
#include "pk/threads.h"

namespace pk {
namespace {

constexpr double kLn2 = 0.693147180559945309;
constexpr int64_t kRowsPerChunk = 4;  // masked rows cost nothing, so rows are handed out in small chunks

const char* row_at(const void* base, int64_t row, int64_t stride, int64_t item_size) {
  return static_cast<const char*>(base) + row * stride * item_size;
}

bool read_row(const uint8_t* mask, int64_t row) { return mask == nullptr || mask[row] != 0; }

// Checked ahead of the parallel loop: the lowest offending row is reported whatever the threads do.
template <typename Args>
int check(const Args* args) {
  if (args == nullptr || args->n_rows < 0 || args->n_cols < 1 || !(args->temperature > 0.0)) return PK_BAD_ARGUMENT;
  if (dtype_ops(args->dtype) == nullptr || args->bad_row == nullptr) return PK_BAD_ARGUMENT;
  for (int64_t row = 0; row < args->n_rows; ++row) {
    if (!read_row(args->mask, row)) continue;
    if (args->ids[row] < 0 || args->ids[row] >= args->n_cols) {
      *args->bad_row = row;
      return PK_BAD_INDEX;
    }
  }
  return PK_OK;
}

template <typename Args>
int threads_for(const Args& args) {
  return thread_count(args.n_threads, args.n_rows, args.n_rows * args.n_cols);
}

void forward_row(const pk_log_probs_args& args, const DtypeOps& ops, int64_t row) {
  const char* logits = row_at(args.logits, row, args.logits_stride, ops.item_size);
  const int64_t id = args.ids[row];
  const double inverse_temperature = 1.0 / args.temperature;
  const float scale = static_cast<float>(inverse_temperature / kLn2);
  const bool with_entropy = args.entropy != nullptr;

  // sum and weighted are relative to `shift`: sum of 2^t and of t * 2^t with t = (z - shift) * scale.
  float highest = -std::numeric_limits<float>::infinity();
  double sum = 0.0;
  double weighted = 0.0;
  float target = 0.0f;
  alignas(64) float block[kBlock];

  for (int64_t start = 0; start < args.n_cols; start += kBlock) {
    const int64_t n = std::min(kBlock, args.n_cols - start);
    const float block_highest = ops.load(logits + start * ops.item_size, n, block);
    if (id >= start && id < start + n) target = block[id - start];
    if (block_highest > highest) {
      // Nothing is accumulated while every logit so far was -inf, and -inf - -inf must not be formed.
      const double step = std::isinf(highest) ? 0.0 : (double{highest} - double{block_highest}) * scale;
      const double factor = std::exp2(step);
      weighted = std::isinf(step) ? weighted * factor : factor * (weighted + step * sum);
      sum *= factor;
      highest = block_highest;
    }
    // The maxima count as 1 each, outside the float sums: beside a 1 the tail of a peaked row would be rounded away,
    // and with it every digit of the log-prob of a token the model is sure of.
    if (block_highest == highest && std::isfinite(highest)) sum += static_cast<double>(take_equal(block, n, highest));
    const float shift = highest == -std::numeric_limits<float>::infinity() ? 0.0f : highest;
    if (with_entropy) {
      const BlockSums part = sum_exp2_weighted(block, n, shift, scale);
      sum += part.exp;
      weighted += part.weighted;
    } else {
      sum += sum_exp2(block, n, shift, scale);
    }
  }

  const double log_sum = std::log(sum);
  args.lse[row] = static_cast<float>(double{highest} * inverse_temperature + log_sum);
  // Not target / temperature - lse: the float lse would cost the log-prob its last digits.
  args.logp[row] = static_cast<float>((double{target} - double{highest}) * inverse_temperature - log_sum);
  if (with_entropy) args.entropy[row] = static_cast<float>(log_sum - kLn2 * weighted / sum);
}

void backward_row(const pk_log_probs_grad_args& args, const DtypeOps& ops, int64_t row) {
  const char* logits = row_at(args.logits, row, args.logits_stride, ops.item_size);
  char* out = const_cast<char*>(row_at(args.out, row, args.out_stride, ops.item_size));
  const double grad_logp = args.grad_logp == nullptr ? 0.0 : args.grad_logp[row];
  const double grad_entropy = args.grad_entropy == nullptr ? 0.0 : args.grad_entropy[row];
  const double lse = args.lse[row];
  // A finite lse vouches for the row: no NaN and no infinity hides behind the zero gradient.
  if (grad_logp == 0.0 && grad_entropy == 0.0 && std::isfinite(lse)) {
    std::memset(out, 0, static_cast<size_t>(args.n_cols * ops.item_size));
    return;
  }
  const int64_t id = args.ids[row];
  const double inverse_temperature = 1.0 / args.temperature;
  const double entropy = args.entropy == nullptr ? 0.0 : args.entropy[row];

  // d/dz_j = p_j * (-grad_logp - grad_entropy * (log p_j + H)) / temperature, plus the target's own term;
  // log p_j is t * ln 2, so the bracket is a + b * t.
  const float scale = static_cast<float>(inverse_temperature / kLn2);
  const float shift = static_cast<float>(lse * args.temperature);
  // What rounding the shift to float took from log p goes back in through the factors, which are computed once a row.
  const double residue = std::isfinite(lse) ? shift * inverse_temperature - lse : 0.0;
  const double factor = -std::exp(residue) * inverse_temperature;
  const float a = static_cast<float>(factor * (grad_logp + grad_entropy * (entropy + residue)));
  const float b = static_cast<float>(factor * grad_entropy * kLn2);
  alignas(64) float block[kBlock];

  for (int64_t start = 0; start < args.n_cols; start += kBlock) {
    const int64_t n = std::min(kBlock, args.n_cols - start);
    ops.load(logits + start * ops.item_size, n, block);
    const bool has_target = id >= start && id < start + n;
    const double target = has_target ? block[id - start] : 0.0;
    scale_exp2(block, n, shift, scale, a, b);
    if (has_target) {
      // expm1, because 1 - p loses every digit where the model is sure.
      const double log_p = target * inverse_temperature - lse;
      const double p = std::exp(log_p);
      const double curvature = p == 0.0 ? 0.0 : p * (log_p + entropy);
      const double gradient = -grad_logp * std::expm1(log_p) - grad_entropy * curvature;
      block[id - start] = static_cast<float>(gradient * inverse_temperature);
    }
    ops.store(block, n, out + start * ops.item_size);
  }
}

}  // namespace
}  // namespace pk

extern "C" int pk_cpu_log_probs_forward(const pk_log_probs_args* args) {
  using namespace pk;
  if (const int status = check(args)) return status;
  const DtypeOps& ops = *dtype_ops(args->dtype);
  const int threads = threads_for(*args);
  (void)threads;
#pragma omp parallel for schedule(dynamic, kRowsPerChunk) num_threads(threads) if (threads > 1)
  for (int64_t row = 0; row < args->n_rows; ++row) {
    if (read_row(args->mask, row)) {
      forward_row(*args, ops, row);
    } else {
      args->logp[row] = 0.0f;
      args->lse[row] = 0.0f;
      if (args->entropy != nullptr) args->entropy[row] = 0.0f;
    }
  }
  return PK_OK;
}

extern "C" int pk_cpu_log_probs_backward(const pk_log_probs_grad_args* args) {
  using namespace pk;
  if (const int status = check(args)) return status;
  if (args->grad_entropy != nullptr && args->entropy == nullptr) return PK_BAD_ARGUMENT;
  const DtypeOps& ops = *dtype_ops(args->dtype);
  const int threads = threads_for(*args);
  (void)threads;
#pragma omp parallel for schedule(dynamic, kRowsPerChunk) num_threads(threads) if (threads > 1)
  for (int64_t row = 0; row < args->n_rows; ++row) {
    if (read_row(args->mask, row)) {
      backward_row(*args, ops, row);
    } else {
      char* out = const_cast<char*>(row_at(args->out, row, args->out_stride, ops.item_size));
      std::memset(out, 0, static_cast<size_t>(args->n_cols * ops.item_size));
    }
  }
  return PK_OK;
}
