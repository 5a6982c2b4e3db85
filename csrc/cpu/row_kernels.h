// The inner loops over one row of logits, one table per instruction set, selected once when the extension is loaded.
// They process logits only; the caller (log_probs.cpp) handles the target in double.
#pragma once

#include <cstdint>

namespace pk {

// From this |logit * scale| on, float exponents have no fractional digits: such rows are computed in double.
constexpr float kFarthest = 1e8f;
constexpr int64_t kSoftmaxBlock = 4096;  // logits between two checks of the sum
constexpr int64_t kSearchBlock = 256;

// Sums of 2^t and t 2^t over the logits so far, with t = (z - highest) * scale + offset. `highest` is a logit of the
// row: with `weighted` the maximum so far, otherwise one near enough that sums keep their digits; -inf while all logits
// were -inf. `offset` is the rounding error of t in float, known exactly and below 2^-24 of the largest exponent.
struct RowSoftmax {
  float scale;
  float highest;
  double offset;
  double sum;
  double weighted;
  struct BlockTotal* blocks;  // or null: where the next block's own sum is written
};

// The sum of one block of kSoftmaxBlock logits, with `highest` and `offset` as they were.
struct BlockTotal {
  float highest;
  double offset;
  double sum;
};

struct RowGradient {
  float scale;
  float bias;
  float a;
  float b;
};

struct RowKernels {
  const char* name;
  // Adds n logits to the sums. False if they are out of range for float arithmetic (infinite, or near the largest
  // float): the caller then computes the row in double. Indexed by dtype and by whether `weighted` is wanted.
  bool (*softmax[3][2])(const void* logits, int64_t n, RowSoftmax* state);
  // out = 2^t (a + b t), 0 where 2^t is 0; in place if out is logits. a, b, scale and bias are finite. `stream` writes
  // around the cache. Indexed by dtype and by whether b is not 0.
  void (*gradient[3][2])(const void* logits, int64_t n, const RowGradient& by, bool stream, void* out);
  // The start of the first kSearchBlock logits of which one is at least `threshold`, or n. Indexed by dtype.
  int64_t (*search[3])(const void* logits, int64_t n, float threshold);
};

extern const RowKernels row_kernels_portable;
#if defined(__x86_64__)
extern const RowKernels row_kernels_avx2;
extern const RowKernels row_kernels_avx512;
#endif

// Those of the instruction set in use (isa.h).
const RowKernels& row_kernels();

}  // namespace pk
