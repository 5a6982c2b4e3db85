// Log-probabilities, entropies and gradients of rows of logits: one block per row and model.

#include "pk/abi.h"
#include "row_softmax.cuh"
#include "status.cuh"

namespace {

using namespace pk::rows;

__device__ __forceinline__ void store_results(const pk_log_probs_model& model, int64_t row, Results of_row) {
  model.logp[row] = static_cast<float>(of_row.logp);
  model.lse[row] = static_cast<float>(of_row.lse);
  if (model.entropy != nullptr) model.entropy[row] = static_cast<float>(of_row.entropy);
}

template <typename T, int kBlock, bool kEntropy>
__global__ void __launch_bounds__(kBlock) forward_kernel(pk_log_probs_args args, int first_model) {
  const int64_t row = blockIdx.x;
  const pk_log_probs_model model = args.models[first_model + blockIdx.y];
  const bool masked = args.mask != nullptr && args.mask[row] == 0;
  const int64_t label = masked ? 0 : args.ids[row];
  if (masked || label < 0 || label >= args.n_cols) {
    if (threadIdx.x == 0) {
      const double value = masked ? 0.0 : NAN;
      store_results(model, row, {value, value, value});
    }
    return;
  }
  const int id = static_cast<int>(label);
  const T* z = static_cast<const T*>(model.logits) + row * model.stride;
  const double inverse_temperature = 1.0 / model.temperature;
  const float scale = static_cast<float>(inverse_temperature * kLog2e);
  const Softmax mine = sweep<T, kBlock, kEntropy>(z, static_cast<int>(args.n_cols), id, scale);
  const Softmax rest = block_combine<kBlock>(mine, scale);
  if (threadIdx.x == 0) store_results(model, row, with_target(rest, to_float(z[id]), inverse_temperature));
}

template <typename T, typename Out, int kBlock>
__global__ void __launch_bounds__(kBlock) backward_kernel(pk_log_probs_grad_args args) {
  const int64_t row = blockIdx.x;
  Out* out = static_cast<Out*>(args.out) + row * args.out_stride;
  const bool masked = args.mask != nullptr && args.mask[row] == 0;
  const int64_t label = masked ? 0 : args.ids[row];
  const int n_cols = static_cast<int>(args.n_cols);
  const double grad_logp = args.grad_logp == nullptr ? 0.0 : args.grad_logp[row];
  const double grad_entropy = args.grad_entropy == nullptr ? 0.0 : args.grad_entropy[row];
  const double lse = args.lse[row];
  const bool has_target = label >= 0 && label < args.n_cols;
  const int id = has_target ? static_cast<int>(label) : -1;
  const bool valid = has_target || args.partial != 0;
  // With a finite lse the row has no NaN and no +inf that a zero gradient could hide.
  const bool nothing = masked || (valid && grad_logp == 0.0 && grad_entropy == 0.0 && isfinite(lse));
  const T* z = static_cast<const T*>(args.logits) + row * args.logits_stride;
  const int first = head_of(z, n_cols);
  const bool packable = (reinterpret_cast<uintptr_t>(out + first) & (alignof(Rounded<T, Out>) - 1)) == 0;
  const int head = packable ? first : n_cols;
  const int packs = (n_cols - head) / Pack<T>::kSize;
  Rounded<T, Out>* out_body = reinterpret_cast<Rounded<T, Out>*>(out + head);
  const int tail = head + packs * Pack<T>::kSize;

  if (nothing || !valid) {
    const Out value = from_float<Out>(nothing ? 0.0f : NAN);
    Rounded<T, Out> pack;
#pragma unroll
    for (int k = 0; k < Pack<T>::kSize; ++k) pack.value[k] = value;
    for (int i = threadIdx.x; i < head; i += kBlock) out[i] = value;
    for (int i = threadIdx.x; i < packs; i += kBlock) out_body[i] = pack;
    for (int i = tail + threadIdx.x; i < n_cols; i += kBlock) out[i] = value;
    return;
  }

  // p_j * (a + b * t) with log p_j = t * ln 2 + residue, as in the CPU kernel. Every thread computes the target's
  // gradient before any thread writes, as in place its logit is then overwritten.
  const double inverse_temperature = 1.0 / args.temperature;
  const double entropy = args.grad_entropy == nullptr ? 0.0 : args.entropy[row];
  const float scale = static_cast<float>(inverse_temperature * kLog2e);
  const float bias = static_cast<float>(-lse * kLog2e);
  const double residue = isfinite(lse) ? -lse - kLn2 * bias : 0.0;
  const double factor = -exp(residue) * inverse_temperature;
  const float a = static_cast<float>(factor * (grad_logp + grad_entropy * (entropy + residue)));
  const float b = static_cast<float>(factor * grad_entropy * kLn2);
  const double log_p = has_target ? to_float(z[id]) * inverse_temperature - lse : 0.0;
  const double p = exp(log_p);
  const double curvature = p == 0.0 ? 0.0 : p * (log_p + entropy);
  const float target =
      static_cast<float>((-grad_logp * expm1(log_p) - grad_entropy * curvature) * inverse_temperature);
  __syncthreads();

  const auto gradient = [&](float value, int column) {
    const float t = fmaf(value, scale, bias);
    const float others = power_of_two(t) * (a + b * clamp_exponent(t));
    return column == id ? target : others;
  };
  const Pack<T>* body = reinterpret_cast<const Pack<T>*>(z + head);
  for (int i = threadIdx.x; i < head; i += kBlock) out[i] = from_float<Out>(gradient(to_float(z[i]), i));
  const auto put_pack = [&](Pack<T> pack, int i) {
    const int column = head + i * Pack<T>::kSize;
    Rounded<T, Out> rounded;
#pragma unroll
    for (int k = 0; k < Pack<T>::kSize; ++k) {
      rounded.value[k] = from_float<Out>(gradient(to_float(pack.value[k]), column + k));
    }
    out_body[i] = rounded;
  };
  int i = threadIdx.x;
  for (; i + (kUnroll - 1) * kBlock < packs; i += kUnroll * kBlock) {
    Pack<T> pack[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) pack[u] = body[i + u * kBlock];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) put_pack(pack[u], i + u * kBlock);
  }
  for (; i < packs; i += kBlock) put_pack(body[i], i);
  for (int c = tail + threadIdx.x; c < n_cols; c += kBlock) {
    out[c] = from_float<Out>(gradient(to_float(z[c]), c));
  }
}

template <typename T>
void launch_forward(const pk_log_probs_args& args, int first_model, int n_models, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(args.n_rows), static_cast<unsigned>(n_models));
  const bool entropy = args.models[first_model].entropy != nullptr;
  const bool few = args.n_rows * n_models < kFewRows;
  if (few && entropy) {
    launch(forward_kernel<T, kManyThreads, true>, grid, kManyThreads, stream, args, first_model);
  } else if (few) {
    launch(forward_kernel<T, kManyThreads, false>, grid, kManyThreads, stream, args, first_model);
  } else if (entropy) {
    launch(forward_kernel<T, kThreads, true>, grid, kThreads, stream, args, first_model);
  } else {
    launch(forward_kernel<T, kThreads, false>, grid, kThreads, stream, args, first_model);
  }
}

template <typename T, typename Out>
void launch_backward(const pk_log_probs_grad_args& args, cudaStream_t stream) {
  const unsigned rows = static_cast<unsigned>(args.n_rows);
  if (args.n_rows < kFewRows) {
    launch(backward_kernel<T, Out, kManyThreads>, dim3(rows), kManyThreads, stream, args);
  } else {
    launch(backward_kernel<T, Out, kThreads>, dim3(rows), kThreads, stream, args);
  }
}

}  // namespace

extern "C" int pk_cuda_log_probs_forward(const pk_log_probs_args* args, void* stream) {
  if (args == nullptr || args->n_models < 1 || args->n_models > PK_MAX_MODELS) return PK_BAD_ARGUMENT;
  if (!valid_sizes(args->n_rows, args->n_cols)) return PK_BAD_ARGUMENT;
  for (int m = 0; m < args->n_models; ++m) {
    if (!known_dtype(args->models[m].dtype) || !(args->models[m].temperature > 0.0)) return PK_BAD_ARGUMENT;
  }
  if (args->n_rows == 0) return PK_OK;
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  // One launch per run of models with the same dtype: usually one in all.
  for (int first = 0; first < args->n_models;) {
    int next = first + 1;
    while (next < args->n_models && args->models[next].dtype == args->models[first].dtype) ++next;
    switch (args->models[first].dtype) {
      case PK_FLOAT32:
        launch_forward<float>(*args, first, next - first, on);
        break;
      case PK_BFLOAT16:
        launch_forward<__nv_bfloat16>(*args, first, next - first, on);
        break;
      default:
        launch_forward<__half>(*args, first, next - first, on);
    }
    first = next;
  }
  return pk::launch_status("forward_kernel");
}

extern "C" int pk_cuda_log_probs_backward(const pk_log_probs_grad_args* args, void* stream) {
  if (args == nullptr || !valid_sizes(args->n_rows, args->n_cols)) return PK_BAD_ARGUMENT;
  const int32_t from = args->dtype, to = args->out_dtype;
  if (!known_dtype(from) || !known_dtype(to) || (from != to && from != PK_FLOAT32)) return PK_BAD_ARGUMENT;
  if (!(args->temperature > 0.0)) return PK_BAD_ARGUMENT;
  if (args->grad_entropy != nullptr && args->entropy == nullptr) return PK_BAD_ARGUMENT;
  if (args->n_rows == 0) return PK_OK;
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  if (from == PK_BFLOAT16) {
    launch_backward<__nv_bfloat16, __nv_bfloat16>(*args, on);
  } else if (from == PK_FLOAT16) {
    launch_backward<__half, __half>(*args, on);
  } else if (to == PK_FLOAT32) {
    launch_backward<float, float>(*args, on);
  } else if (to == PK_BFLOAT16) {
    launch_backward<float, __nv_bfloat16>(*args, on);
  } else {
    launch_backward<float, __half>(*args, on);
  }
  return pk::launch_status("backward_kernel");
}
