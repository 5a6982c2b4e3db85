// The hot loops over one row of logits, one set per instruction set, chosen once when the extension is loaded. They see
// logits, never ids: what belongs to the target is done in double by the caller (log_probs.cpp).
#pragma once

#include <cstdint>

namespace pk {

// |logit * scale| from which on a float exponent has no digits left: such rows are computed in double.
constexpr float kFarthest = 1e8f;

// sum of 2^t and of t 2^t over what was taken so far, t = (z - highest) * scale + offset. `highest` is a logit of the
// row: with `weighted` the highest so far, else never so much lower that a sum would lose digits; -inf while every logit
// was -inf. The offset is what float arithmetic adds to t, known exactly, below 2^-24 of the largest exponent.
struct RowSoftmax {
  float scale;
  float highest;
  double offset;
  double sum;
  double weighted;
};

struct RowGradient {
  float scale;
  float bias;
  float a;
  float b;
};

struct RowKernels {
  const char* name;
  // Takes n logits. False where they are out of the range that float arithmetic covers (infinite, or near the largest
  // float): the caller then computes the row in double. Indexed by dtype and by whether `weighted` is wanted.
  bool (*softmax[3][2])(const void* logits, int64_t n, RowSoftmax* state);
  // out = 2^t (a + b t), 0 where 2^t is 0; in place if out is logits. All of a, b, scale and bias are finite. `stream`
  // asks for writes around the cache. Indexed by dtype and by whether b is not 0.
  void (*gradient[3][2])(const void* logits, int64_t n, const RowGradient& by, bool stream, void* out);
};

extern const RowKernels row_kernels_portable;
#if defined(__x86_64__)
extern const RowKernels row_kernels_avx2;
extern const RowKernels row_kernels_avx512;
#endif

// Those of the instruction set in use (isa.h).
const RowKernels& row_kernels();

}  // namespace pk
