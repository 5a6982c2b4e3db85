// The boundary between Python and the kernels: plain structs of raw addresses, int64 sizes and strides counted in
// elements, and a status code back. Nothing here knows torch, so one build serves every torch version.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum pk_status {
  PK_OK = 0,
  PK_BAD_ARGUMENT = 1,  // a size, stride, dtype code or scalar that no caller should pass
  PK_BAD_INDEX = 2,     // an unmasked id outside [0, n_cols); *bad_row says where
  PK_CUDA_ERROR = 3,    // the launch failed; cudaGetLastError has been read
} pk_status;

typedef enum pk_dtype {
  PK_FLOAT32 = 0,
  PK_BFLOAT16 = 1,
  PK_FLOAT16 = 2,
  PK_FLOAT64 = 3,  // scans only
} pk_dtype;

enum { PK_MAX_MODELS = 3 };

// One model's logits and where its results go.
typedef struct pk_log_probs_model {
  const void* logits;  // [n_rows, n_cols], unit last stride
  int64_t stride;
  int32_t dtype;
  double temperature;
  float* logp;     // [n_rows]
  float* lse;      // [n_rows], of logits / temperature
  float* entropy;  // [n_rows] or null
} pk_log_probs_model;

// The models share rows, ids and mask.
typedef struct pk_log_probs_args {
  pk_log_probs_model models[PK_MAX_MODELS];
  int32_t n_models;
  int32_t n_threads;
  const int64_t* ids;   // [n_rows]
  const uint8_t* mask;  // [n_rows] or null; 0 means: write 0, read neither logits nor id
  int64_t n_rows;
  int64_t n_cols;
  int64_t* bad_row;  // host memory for CPU kernels; null for CUDA kernels
} pk_log_probs_args;

typedef struct pk_log_probs_grad_args {
  const void* logits;
  int64_t logits_stride;
  int32_t dtype;
  int32_t n_threads;
  const int64_t* ids;
  const uint8_t* mask;
  int64_t n_rows;
  int64_t n_cols;
  double temperature;
  const float* lse;
  const float* entropy;       // null when grad_entropy is null
  const float* grad_logp;     // [n_rows] or null for zero
  const float* grad_entropy;  // [n_rows] or null for zero
  void* out;                  // dtype of logits; may be the logits themselves
  int64_t out_stride;
  int32_t partial;   // not 0: these are some of the columns of a row, and ids may lie outside them
  int64_t* bad_row;  // as in the forward
} pk_log_probs_grad_args;

// An output layer over tokens: z = hidden @ weight.T + bias, in float32 whatever the operands are.
typedef struct pk_head {
  const void* hidden;  // [n_tokens, depth], unit last stride
  int64_t hidden_stride;
  const void* weight;  // [n_vocabulary, depth], unit last stride
  int64_t weight_stride;
  const void* bias;  // [n_vocabulary] or null
  int32_t dtype;     // of all three
  int32_t round;     // not 0: z is rounded to dtype, as a layer of that dtype leaves it
  int64_t n_tokens;
  int64_t n_vocabulary;
  int64_t depth;
  double temperature;
  const int64_t* ids;  // [n_tokens]; one outside the vocabulary has no logit here
  // pk_cpu_head_kept_floats floats or null: the forward leaves z there, the backward then need not make it again.
  float* kept;
  int32_t n_threads;
} pk_head;

typedef struct pk_head_forward_args {
  pk_head head;
  float* logp;     // [n_tokens]
  float* lse;      // [n_tokens], of z / temperature
  float* entropy;  // [n_tokens] or null
} pk_head_forward_args;

typedef struct pk_head_backward_args {
  pk_head head;
  const float* lse;
  const float* entropy;       // null when grad_entropy is null
  const float* grad_logp;     // [n_tokens] or null for zero
  const float* grad_entropy;  // [n_tokens] or null for zero
  void* grad_hidden;          // [n_tokens, depth] or null; contiguous, as the next two, and of the head's dtype
  void* grad_weight;          // [n_vocabulary, depth] or null
  void* grad_bias;            // [n_vocabulary] or null
} pk_head_backward_args;

typedef struct pk_segment_scan_args {
  const void* values;         // [n_tokens]
  const int64_t* cu_seqlens;  // [n_segments + 1], from 0 to n_tokens
  int64_t n_segments;
  int64_t n_tokens;
  double gamma;
  int32_t dtype;  // PK_FLOAT32 or PK_FLOAT64
  int32_t reverse;
  int32_t n_threads;
  void* workspace;  // CUDA: [PK_MAX_BLOCKS] pk_block_left
  void* out;        // [n_tokens]; may be the values themselves
} pk_segment_scan_args;

// Token passes of RLOO advantages. out[t] = process_coef * P_t + outcome_coef * O_t with, in each response r, the
// discounted returns P of scale[r] * rewards[t] + shift[r] where the mask is set, and O of outcomes[r] on the last token.
typedef struct pk_rloo_args {
  const float* rewards;  // [n_tokens] or null for outcomes alone
  const uint8_t* mask;   // [n_tokens] or null; 0 means: no process reward, not read
  const int64_t* cu_seqlens;
  const double* scale;     // [n_responses]
  const double* shift;     // [n_responses]
  const double* outcomes;  // [n_responses], centred
  int64_t n_responses;
  int64_t n_tokens;
  double gamma_process;
  double gamma_outcome;
  double process_coef;
  double outcome_coef;
  int32_t n_threads;
  float* out;  // [n_tokens]
} pk_rloo_args;

typedef struct pk_ppo_args {
  const float* logp;
  const float* old_logp;
  const float* advantages;
  const uint8_t* mask;   // or null
  const float* weights;  // or null
  int64_t n_tokens;
  double clip_low;
  double clip_high;
  int32_t n_threads;
} pk_ppo_args;

// What padded rows and packed tokens are copied between: [n_rows, length, width] and [n_tokens, width].
typedef struct pk_pack_args {
  const void* in;
  void* out;
  const int64_t* cu_seqlens;  // [n_rows + 1]
  int64_t n_rows;
  int64_t n_tokens;
  int64_t length;
  int64_t width;     // elements
  int32_t itemsize;  // 1, 2, 4 or 8 bytes
  int32_t left;      // not 0: padding comes first
  int32_t n_threads;
  uint64_t fill;  // the bits of an element of padding, in the low bytes
} pk_pack_args;

int pk_cpu_log_probs_forward(const pk_log_probs_args* args);
int pk_cpu_log_probs_backward(const pk_log_probs_grad_args* args);
int pk_cpu_head_forward(const pk_head_forward_args* args);
int pk_cpu_head_backward(const pk_head_backward_args* args);
int64_t pk_cpu_head_kept_floats(int64_t n_tokens, int64_t n_vocabulary, int64_t depth, int32_t dtype);
int pk_cpu_segment_scan(const pk_segment_scan_args* args);
int pk_cpu_segment_sum(const float* values, const int64_t* cu, int64_t n_segments, int64_t n_tokens, int n_threads,
                       double* out);
int pk_cpu_segment_fill(const double* values, const int64_t* cu, int64_t n_segments, int64_t n_tokens, int n_threads,
                        float* out);
// Sum and number of each response's process rewards, and the largest |sum of a response's rewards from a token on|.
int pk_cpu_rloo_moments(const pk_rloo_args* args, double* sums, double* counts, double* largest);
int pk_cpu_rloo_returns(const pk_rloo_args* args, double* total);
int pk_cpu_centred_squares(const float* values, int64_t n, double mean, int n_threads, double* total);
int pk_cpu_whiten(const float* values, int64_t n, double mean, double factor, int n_threads, float* out);
// sums: of weighted token losses, of tokens that are clipped, of log ratios, and of tokens that count.
int pk_cpu_ppo_loss(const pk_ppo_args* args, double* sums);
int pk_cpu_ppo_loss_backward(const pk_ppo_args* args, double factor, float* out);
int pk_cpu_pack(const pk_pack_args* args);
int pk_cpu_unpack(const pk_pack_args* args);

// CUDA kernels. Scratch memory comes from the caller; a counter `arrived` is 0 before and after every launch.
enum { PK_MAX_BLOCKS = 1024, PK_RLOO_WORKSPACE = 6 * 8 * PK_MAX_BLOCKS };

// What a block leaves to the next of the segment that is open at its end.
typedef struct pk_block_left {
  double weight;
  double value;
} pk_block_left;

typedef struct pk_cuda_rloo_args {
  pk_rloo_args tokens;        // without scale, shift and outcomes
  const double* outcomes;     // [n_responses]
  const int64_t* cu_groups;   // [n_groups + 1]
  int64_t n_groups;
  int32_t normalize_process;
  int32_t paper_baseline;
  int32_t moments;   // what to do in this launch: sums of responses, and
  int32_t returns;   // what comes after the largest return is known
  double* largest;   // null if both are done
  double* stats;     // [PK_MAX_BLOCKS, 3]: count, mean and squares around it of each block's returns
  void* workspace;   // PK_RLOO_WORKSPACE bytes, and 8 * (PK_MAX_BLOCKS + 5 * n_responses)
} pk_cuda_rloo_args;

typedef struct pk_ppo_results {
  double* sums;  // [PK_MAX_BLOCKS, 4]
  uint32_t* arrived;
  const double* denominator;  // or null
  double denominator_value;   // then; at most 0 means: the tokens that count
  double* scale;              // 1 / denominator
  float* loss;
  float* clip_fraction;
  float* approx_kl;
} pk_ppo_results;

typedef enum pk_prm_kind { PK_PRM_CE = 0, PK_PRM_DPO = 1, PK_PRM_KTO = 2, PK_PRM_NCA = 3 } pk_prm_kind;

typedef struct pk_prm_args {
  const float* log_ratio;     // [n_tokens]
  const double* outcomes;     // [n_responses]
  const int64_t* cu_seqlens;  // [n_responses + 1]
  const int64_t* cu_groups;   // [n_groups + 1] or null
  int64_t n_tokens;
  int64_t n_responses;
  int64_t n_groups;
  double beta;
  int32_t kind;
  double* delta;  // [n_responses], scratch
  double* slope;  // [n_responses]: d loss / d delta
  pk_block_left* left;  // [PK_MAX_BLOCKS]
  uint32_t* arrived;
  float* loss;
  float* accuracy;  // NaN without groups
} pk_prm_args;

// `stream` is a cudaStream_t; the launch is asynchronous and all addresses are device addresses.
int pk_cuda_log_probs_forward(const pk_log_probs_args* args, void* stream);
int pk_cuda_log_probs_backward(const pk_log_probs_grad_args* args, void* stream);
int pk_cuda_segment_scan(const pk_segment_scan_args* args, void* stream);
int pk_cuda_segment_sum(const float* values, const int64_t* cu, int64_t n_segments, int64_t n_tokens, double* out,
                        pk_block_left* left, uint32_t* arrived, void* stream);
// `factor` is one number, or null for 1.
int pk_cuda_segment_fill(const double* values, const float* factor, const int64_t* cu, int64_t n_segments,
                         int64_t n_tokens, float* out, void* stream);
int pk_cuda_pack(const pk_pack_args* args, void* stream);
int pk_cuda_unpack(const pk_pack_args* args, void* stream);
// *blocks: how many rows of the statistics are written.
int pk_cuda_rloo_returns(const pk_cuda_rloo_args* args, void* stream, int64_t* blocks);
int pk_cuda_whiten(const float* values, int64_t n, const double* stats, int64_t rows, float* out, void* stream);
int pk_cuda_ppo_loss(const pk_ppo_args* args, const pk_ppo_results* results, void* stream);
int pk_cuda_ppo_loss_backward(const pk_ppo_args* args, const double* scale, const float* grad, float* out,
                              void* stream);
int pk_cuda_prm_loss(const pk_prm_args* args, void* stream);

#ifdef __cplusplus
}
#endif
