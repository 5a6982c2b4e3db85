// The C ABI between the Python binding and the kernels: plain structs of raw addresses, int64 sizes and strides counted
// in elements, and a status code. Nothing here depends on torch, so one build serves every torch version.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum pk_status {
  PK_OK = 0,
  PK_BAD_ARGUMENT = 1,  // a size, stride, dtype code or scalar out of range
  PK_BAD_INDEX = 2,     // an unmasked id outside [0, n_cols); *bad_row is the row
  PK_CUDA_ERROR = 3,    // a launch failed; pk_cuda_error() has the text
} pk_status;

typedef enum pk_dtype {
  PK_FLOAT32 = 0,
  PK_BFLOAT16 = 1,
  PK_FLOAT16 = 2,
  PK_FLOAT64 = 3,  // scans only
} pk_dtype;

// The constants of prime_kernels/_constants.py; a test compares the two.
#define PK_NORMALIZE_EPS 1e-6  // process rewards are divided by their largest return + this
#define PK_WHITEN_EPS 1e-8     // advantages are divided by sqrt(variance + this)
#define PK_MAX_LOG_RHO 20.0    // PPO ratios are clamped to e^20, beyond which they have no gradient

typedef enum pk_prm_kind {
  PK_PRM_CE = 0,
  PK_PRM_DPO = 1,
  PK_PRM_KTO = 2,
  PK_PRM_NCA = 3,
  PK_PRM_PREFIX = 4,  // of every token, in pk_*_prefix_loss
} pk_prm_kind;

enum { PK_MAX_MODELS = 3 };

// One model's logits and its results.
typedef struct pk_log_probs_model {
  const void* logits;  // [n_rows, n_cols], last stride 1
  int64_t stride;
  int32_t dtype;
  double temperature;
  float* logp;     // [n_rows]
  float* lse;      // [n_rows], of logits / temperature
  float* entropy;  // [n_rows] or null
} pk_log_probs_model;

// Token log-probabilities. The models share rows, ids and mask.
typedef struct pk_log_probs_args {
  pk_log_probs_model models[PK_MAX_MODELS];
  int32_t n_models;
  int32_t n_threads;    // CPU
  const int64_t* ids;   // [n_rows]
  const uint8_t* mask;  // [n_rows] or null; where 0, results are 0 and neither logits nor id are read
  int64_t n_rows;
  int64_t n_cols;
  int64_t* bad_row;  // CPU: one number, set with PK_BAD_INDEX
} pk_log_probs_args;

// The gradient of one model's logits.
typedef struct pk_log_probs_grad_args {
  const void* logits;
  int64_t logits_stride;
  int32_t dtype;
  int32_t n_threads;  // CPU
  const int64_t* ids;
  const uint8_t* mask;
  int64_t n_rows;
  int64_t n_cols;
  double temperature;
  const float* lse;
  const float* entropy;       // null if grad_entropy is null
  const float* grad_logp;     // [n_rows] or null for zero
  const float* grad_entropy;  // [n_rows] or null for zero
  void* out;                  // of the logits' dtype it may be the logits themselves
  int64_t out_stride;
  int32_t out_dtype;  // that of the logits; of float32 logits also one of 16 bits, to which the gradient is rounded
  int32_t partial;   // not 0: the columns are part of longer rows, and ids may lie outside them
  int64_t* bad_row;  // CPU, as in pk_log_probs_args
} pk_log_probs_grad_args;

// Log-probabilities of one id per row and, of the same pass, the logits with a probability of at least exp(log_min_prob).
typedef struct pk_candidates_args {
  const void* logits;  // [n_rows, n_cols], last stride 1
  int64_t stride;
  int32_t dtype;
  int32_t n_threads;
  const int64_t* ids;
  const uint8_t* mask;
  int64_t n_rows;
  int64_t n_cols;
  double temperature;
  double log_min_prob;
  int64_t n_slots;     // at most this many of a row are written
  float* logp;         // [n_rows]
  float* lse;          // [n_rows]
  int64_t* found_ids;  // [n_rows, n_slots]: ascending (on CUDA in any order), then -1
  float* found;        // [n_rows, n_slots]: their logits, then -inf
  int64_t* bad_row;    // CPU, as in pk_log_probs_args
} pk_candidates_args;

// An output layer over tokens: z = hidden @ weight.T + bias, in float32 for any operands. CPU only.
typedef struct pk_head {
  const void* hidden;  // [n_tokens, depth], unit last stride
  int64_t hidden_stride;
  const void* weight;  // [n_vocabulary, depth], unit last stride
  int64_t weight_stride;
  const void* bias;  // [n_vocabulary] or null
  int32_t dtype;     // of all three
  int32_t rounded;   // not 0: z is rounded to dtype, as a layer of that dtype leaves it
  int64_t n_tokens;
  int64_t n_vocabulary;
  int64_t depth;
  double temperature;
  double softcap;      // c in c tanh(z / c), which the temperature divides; 0 for no cap
  const int64_t* ids;  // [n_tokens, n_ids]; the log-prob of one outside the vocabulary is meaningless
  int64_t n_ids;
  // pk_cpu_head_kept_floats floats or null: the forward leaves z there, capped, and the backward need not recompute it.
  float* kept;
  int32_t n_threads;
} pk_head;

typedef struct pk_head_forward_args {
  pk_head head;
  float* logp;     // [n_tokens, n_ids]
  float* lse;      // [n_tokens], of z / temperature
  float* entropy;  // [n_tokens] or null
} pk_head_forward_args;

// Log-probabilities of one id per token and the logits with a probability of at least exp(log_min_prob).
typedef struct pk_head_candidates_args {
  pk_head head;  // n_ids 1, nothing kept
  float* logp;   // [n_tokens]
  float* lse;    // [n_tokens]
  double log_min_prob;
  int64_t n_slots;     // at most this many of a token are written
  int64_t* found_ids;  // [n_tokens, n_slots]: ascending, then -1
  float* found;        // [n_tokens, n_slots]: their logits, then -inf
} pk_head_candidates_args;

typedef struct pk_head_backward_args {
  pk_head head;
  const float* lse;
  const float* entropy;       // null if grad_entropy is null
  const float* grad_logp;     // [n_tokens, n_ids] or null for zero
  const float* grad_entropy;  // [n_tokens] or null for zero
  void* grad_hidden;          // [n_tokens, depth] or null; contiguous, as the next two, and of the head's dtype
  void* grad_weight;          // [n_vocabulary, depth] or null
  void* grad_bias;            // [n_vocabulary] or null
} pk_head_backward_args;

// CUDA kernels over packed tokens get scratch memory from the caller: `published` holds what each block publishes for
// the blocks after it, `arrived` counts blocks and is 0 before and after every launch.
enum { PK_MAX_BLOCKS = 1024, PK_RLOO_WORKSPACE = 6 * 8 * PK_MAX_BLOCKS };

// The affine map y -> value + weight * y of a block's tokens, as far as the block's last open segment is concerned.
typedef struct pk_affine {
  double weight;
  double value;
} pk_affine;

typedef struct pk_segment_scan_args {
  const void* values;         // [n_tokens]
  const int64_t* cu_seqlens;  // [n_segments + 1], from 0 to n_tokens
  int64_t n_segments;
  int64_t n_tokens;
  double gamma;
  int32_t dtype;    // PK_FLOAT32 or PK_FLOAT64
  int32_t reverse;  // not 0: from the last token of each segment to the first
  const float* factor;  // one number that all results are multiplied by, or null for 1
  void* out;            // [n_tokens]; may be the values themselves
  int32_t n_threads;     // CPU
  pk_affine* published;  // CUDA: [PK_MAX_BLOCKS]
} pk_segment_scan_args;

typedef struct pk_segment_sum_args {
  const float* values;        // [n_tokens]
  const int64_t* cu_seqlens;  // [n_segments + 1]
  int64_t n_segments;
  int64_t n_tokens;
  double* out;           // [n_segments]
  int32_t n_threads;     // CPU
  pk_affine* published;  // CUDA: [PK_MAX_BLOCKS]
  uint32_t* arrived;     // CUDA
} pk_segment_sum_args;

// The gradient of a segment sum: each token gets its segment's value times `factor`.
typedef struct pk_segment_fill_args {
  const double* values;  // [n_segments]
  const float* factor;   // one number, or null for 1
  const int64_t* cu_seqlens;
  int64_t n_segments;
  int64_t n_tokens;
  float* out;         // [n_tokens]
  int32_t n_threads;  // CPU
} pk_segment_fill_args;

// Copies between padded rows [n_rows, length, width] and packed tokens [n_tokens, width].
typedef struct pk_pack_args {
  const void* in;
  void* out;
  const int64_t* cu_seqlens;  // [n_rows + 1]
  int64_t n_rows;
  int64_t n_tokens;
  int64_t length;
  int64_t width;      // elements of a token
  int32_t itemsize;   // 1, 2, 4 or 8 bytes
  int32_t pad_left;   // not 0: the padding comes first
  uint64_t fill;      // unpack: the bits of a padding element, in the low bytes
  int32_t n_threads;  // CPU
} pk_pack_args;

// RLOO on the CPU, step 1: sum and count of each response's process rewards, and the largest |suffix sum| of all.
typedef struct pk_rloo_sums_args {
  const float* rewards;  // [n_tokens]
  const uint8_t* mask;   // [n_tokens] or null; where 0, the token has no process reward and it is not read
  const int64_t* cu_seqlens;
  int64_t n_responses;
  int64_t n_tokens;
  double* sums;     // [n_responses]
  double* counts;   // [n_responses]
  double* largest;  // one number
  int32_t n_threads;
} pk_rloo_sums_args;

// RLOO on the CPU, step 2: out[t] = process_coef * P_t + outcome_coef * O_t. In each response r, P is the discounted
// return of scale[r] * rewards[t] + shift[r] at tokens with a process reward, O that of outcomes[r] on the last token.
typedef struct pk_rloo_returns_args {
  const float* rewards;  // [n_tokens] or null for outcomes alone
  const uint8_t* mask;
  const int64_t* cu_seqlens;
  int64_t n_responses;
  int64_t n_tokens;
  const double* scale;     // [n_responses]
  const double* shift;     // [n_responses]
  const double* outcomes;  // [n_responses], less their baselines
  double gamma_process;
  double gamma_outcome;
  double process_coef;
  double outcome_coef;
  float* out;       // [n_tokens]
  double* moments;  // [3]: count, mean and sum of squares about the mean of the returns
  int32_t n_threads;
} pk_rloo_returns_args;

// Checks of a batch's values on CUDA: those that fail are device-side assertions.
typedef struct pk_cuda_rloo_check_args {
  const float* rewards;  // [n_tokens] or null for outcomes alone, whose n_tokens is not known yet
  const uint8_t* mask;
  const double* outcomes;     // [n_responses]
  const int64_t* cu_seqlens;  // [n_responses + 1]
  const int64_t* cu_groups;   // [n_groups + 1]
  int64_t n_responses;
  int64_t n_groups;
  int64_t n_tokens;
} pk_cuda_rloo_check_args;

// RLOO on CUDA: both steps in one launch, or one each where `largest` is combined over ranks between them.
typedef struct pk_cuda_rloo_args {
  const float* rewards;  // [n_tokens] or null for outcomes alone
  const uint8_t* mask;
  const double* outcomes;     // [n_responses]
  const int64_t* cu_seqlens;  // [n_responses + 1]
  const int64_t* cu_groups;   // [n_groups + 1]
  int64_t n_responses;
  int64_t n_groups;
  int64_t n_tokens;
  double gamma_process;
  double gamma_outcome;
  double process_coef;
  double outcome_coef;
  int32_t normalize_process;
  int32_t paper_baseline;
  int32_t with_sums;     // step 1: sums of the responses' process rewards
  int32_t with_returns;  // step 2: returns; needs `largest`, or step 1 in the same launch
  double* largest;       // null if both steps are in one launch
  double* moments;       // [PK_MAX_BLOCKS, 3]: count, mean and sum of squares about it of each block's returns
  void* workspace;       // PK_RLOO_WORKSPACE + 8 * (PK_MAX_BLOCKS + 5 * n_responses) bytes
  float* out;            // [n_tokens]
  int64_t* n_blocks;     // host memory: rows of `moments` that the launch writes
} pk_cuda_rloo_args;

// out = (values - mean) / sqrt(unbiased variance + PK_WHITEN_EPS), with the moments of parts of a whole batch.
typedef struct pk_whiten_args {
  const float* values;  // [n_tokens]
  int64_t n_tokens;
  const double* moments;  // [n_parts, 3]: count, mean and sum of squares about it
  int64_t n_parts;
  float* out;         // [n_tokens]
  int32_t n_threads;  // CPU
} pk_whiten_args;

typedef struct pk_ppo_tokens {
  const float* logp;
  const float* old_logp;
  const float* advantages;
  const uint8_t* mask;   // or null
  const float* weights;  // or null
  int64_t n_tokens;
  double clip_low;
  double clip_high;
  double ceiling;     // of the ratio where the advantage is negative; infinite for none
  int32_t n_threads;  // CPU
} pk_ppo_tokens;

typedef struct pk_ppo_args {
  pk_ppo_tokens tokens;
  const double* denominator;  // one number, or null
  double denominator_value;   // used if `denominator` is null; at most 0 stands for the number of valid tokens
  double* scale;              // 1 / denominator
  float* results;             // [3]: loss, clip fraction, approximate KL
  double* sums;               // CUDA: [PK_MAX_BLOCKS, 4]
  uint32_t* arrived;          // CUDA
} pk_ppo_args;

typedef struct pk_ppo_grad_args {
  pk_ppo_tokens tokens;
  const double* scale;  // of the forward pass
  const float* grad;    // d objective / d loss, one number
  float* out;           // [n_tokens]
} pk_ppo_grad_args;

typedef struct pk_prm_args {
  const float* log_ratio;     // [n_tokens]
  const double* outcomes;     // [n_responses]
  const int64_t* cu_seqlens;  // [n_responses + 1]
  const int64_t* cu_groups;   // [n_groups + 1] or null
  int64_t n_tokens;
  int64_t n_responses;
  int64_t n_groups;
  const double* weights;  // [n_responses] or null for 1: factors of the responses' losses; only with PK_PRM_CE
  const double* shift;    // [n_responses] or null for 0: added to beta * delta; only with PK_PRM_CE
  double beta;
  int32_t kind;          // pk_prm_kind
  double* delta;         // [n_responses]: sums of log-ratios, scratch
  double* slope;         // [n_responses]: d loss / d delta
  float* results;        // [2]: loss, and pair accuracy, which is NaN without groups
  pk_affine* published;  // [PK_MAX_BLOCKS]
  uint32_t* arrived;
} pk_prm_args;

// The loss of every prefix of a response, whose value is beta * (mean of the log-ratios so far) + shift.
typedef struct pk_prefix_args {
  const float* log_ratio;     // [n_tokens]
  const double* outcomes;     // [n_responses]
  const int64_t* cu_seqlens;  // [n_responses + 1]
  const int64_t* cu_groups;   // CUDA: [n_groups + 1] or null
  const double* weights;      // [n_responses] or null for 1
  const double* shift;        // [n_responses] or null for 0
  int64_t n_tokens;
  int64_t n_responses;
  int64_t n_groups;  // CUDA
  double beta;
  double margin;
  double* scores;        // [n_responses]: mean log-ratio of each response that has tokens
  float* slope;          // [n_tokens]: d loss / d (sum of the log-ratios so far)
  double* losses;        // CPU: [n_responses], the summands of the loss
  float* results;        // CUDA: [2], as in pk_prm_args
  pk_affine* published;  // CUDA: [PK_MAX_BLOCKS]
  double* sums;          // CUDA: [PK_MAX_BLOCKS]
  uint32_t* arrived;     // CUDA
  int32_t n_threads;     // CPU
} pk_prefix_args;

int pk_cpu_log_probs_forward(const pk_log_probs_args* args);
int pk_cpu_log_probs_backward(const pk_log_probs_grad_args* args);
int pk_cpu_candidates(const pk_candidates_args* args);
int pk_cpu_head_forward(const pk_head_forward_args* args);
int pk_cpu_head_candidates(const pk_head_candidates_args* args);
int pk_cpu_head_backward(const pk_head_backward_args* args);
int64_t pk_cpu_head_kept_floats(int64_t n_tokens, int64_t n_vocabulary, int64_t depth, int32_t dtype);
int pk_cpu_segment_scan(const pk_segment_scan_args* args);
int pk_cpu_segment_sum(const pk_segment_sum_args* args);
int pk_cpu_segment_fill(const pk_segment_fill_args* args);
int pk_cpu_pack(const pk_pack_args* args);
int pk_cpu_unpack(const pk_pack_args* args);
int pk_cpu_rloo_sums(const pk_rloo_sums_args* args);
int pk_cpu_rloo_returns(const pk_rloo_returns_args* args);
int pk_cpu_whiten(const pk_whiten_args* args);
int pk_cpu_ppo_loss(const pk_ppo_args* args);
int pk_cpu_ppo_loss_backward(const pk_ppo_grad_args* args);
int pk_cpu_prefix_loss(const pk_prefix_args* args);

// `stream` is a cudaStream_t. The launch is asynchronous, and all addresses are device addresses unless noted.
int pk_cuda_log_probs_forward(const pk_log_probs_args* args, void* stream);
int pk_cuda_log_probs_backward(const pk_log_probs_grad_args* args, void* stream);
int pk_cuda_candidates(const pk_candidates_args* args, void* stream);
int pk_cuda_segment_scan(const pk_segment_scan_args* args, void* stream);
int pk_cuda_segment_sum(const pk_segment_sum_args* args, void* stream);
int pk_cuda_segment_fill(const pk_segment_fill_args* args, void* stream);
int pk_cuda_pack(const pk_pack_args* args, void* stream);
int pk_cuda_unpack(const pk_pack_args* args, void* stream);
int pk_cuda_rloo_check(const pk_cuda_rloo_check_args* args, void* stream);
int pk_cuda_rloo_returns(const pk_cuda_rloo_args* args, void* stream);
int pk_cuda_whiten(const pk_whiten_args* args, void* stream);
int pk_cuda_ppo_loss(const pk_ppo_args* args, void* stream);
int pk_cuda_ppo_loss_backward(const pk_ppo_grad_args* args, void* stream);
int pk_cuda_prm_loss(const pk_prm_args* args, void* stream);
int pk_cuda_prefix_loss(const pk_prefix_args* args, void* stream);

// After PK_CUDA_ERROR, in the same thread: which launch failed and cudaGetErrorString of its error.
const char* pk_cuda_error(void);

#ifdef __cplusplus
}
#endif
