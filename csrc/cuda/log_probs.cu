// One block per row and model. Each thread keeps an online softmax over 16-byte loads, and the block combines them. The
// target is excluded from that pass and added at the end in double, as in the CPU kernels: in a float sum near 1 the
// tail of a peaked row would be rounded away.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "pk/abi.h"
#include "status.cuh"

namespace {

constexpr int kWarp = 32;
#ifdef PK_SMALL_TILES  // for tests: short rows take every path, and few threads are emulated
constexpr int kThreads = 64;
constexpr int kManyThreads = 128;
constexpr int64_t kFewRows = 8;
#else
constexpr int kThreads = 256;
// Threads per row where there are too few rows to fill the device.
constexpr int kManyThreads = 1024;
constexpr int64_t kFewRows = 512;
#endif
// Outstanding loads per thread: latency times bandwidth requires about 40 KiB in flight per multiprocessor.
constexpr int kUnroll = 4;
constexpr double kLn2 = 0.693147180559945309;
constexpr double kLog2e = 1.44269504088896340736;
constexpr float kLowest = -126.0f;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

template <typename T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  T value[kSize];
};

// Elements of a row before its first 16-byte boundary: rows of odd length or of a slice start at any element. Columns
// are int32 throughout, as comparing an int64 with the target takes two instructions for each element.
template <typename T>
__device__ __forceinline__ int head_of(const T* row, int n_cols) {
  const int misaligned = static_cast<int>((reinterpret_cast<uintptr_t>(row) & 15) / sizeof(T));
  const int head = misaligned == 0 ? 0 : Pack<T>::kSize - misaligned;
  return head < n_cols ? head : n_cols;
}

// 2^t in one instruction, without the scaling by which exp2f keeps results below 2^-126: next to a sum of 1 or more they
// are nothing.
__device__ __forceinline__ float power_of_two(float t) {
#ifdef __CUDA_ARCH__
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(t));
  return result;
#else
  return exp2f(t);
#endif
}

// Keeps the factor of a vanished 2^t finite (0 * -inf is NaN); NaN stays NaN.
__device__ __forceinline__ float clamp_exponent(float t) { return t < kLowest ? kLowest : t; }

// sum of 2^t and of t * 2^t, with t = (z - highest) * scale.
struct Softmax {
  float highest;
  float sum;
  float weighted;

  __device__ __forceinline__ void raise_to(float value, float scale) {
    if (!(value > highest)) return;
    if (highest != -INFINITY) {
      const float step = (highest - value) * scale;
      const float factor = power_of_two(step);
      weighted = factor * (weighted + clamp_exponent(step) * sum);
      sum *= factor;
    }
    highest = value;
  }

  template <bool kEntropy>
  __device__ __forceinline__ void add(float z, float scale) {
    const float t = (z - (highest == -INFINITY ? 0.0f : highest)) * scale;
    const float e = power_of_two(t);
    sum += e;
    if (kEntropy) weighted += e * clamp_exponent(t);
  }

  __device__ __forceinline__ void merge(Softmax other, float scale) {
    raise_to(other.highest, scale);
    other.raise_to(highest, scale);
    sum += other.sum;
    weighted += other.weighted;
  }
};

__device__ __forceinline__ Softmax warp_combine(Softmax mine, float scale) {
  for (int offset = kWarp / 2; offset > 0; offset >>= 1) {
    Softmax other;
    other.highest = __shfl_xor_sync(0xffffffffu, mine.highest, offset);
    other.sum = __shfl_xor_sync(0xffffffffu, mine.sum, offset);
    other.weighted = __shfl_xor_sync(0xffffffffu, mine.weighted, offset);
    mine.merge(other, scale);
  }
  return mine;
}

// Adds a pack of logits, with the target replaced by -inf.
template <typename T, bool kEntropy>
__device__ __forceinline__ void take_pack(Softmax& softmax, const Pack<T>& pack, int column, int id, float scale) {
  float z[Pack<T>::kSize];
#pragma unroll
  for (int k = 0; k < Pack<T>::kSize; ++k) z[k] = column + k == id ? -INFINITY : to_float(pack.value[k]);
  float highest = z[0];
#pragma unroll
  for (int k = 1; k < Pack<T>::kSize; ++k) highest = fmaxf(highest, z[k]);
  softmax.raise_to(highest, scale);
#pragma unroll
  for (int k = 0; k < Pack<T>::kSize; ++k) softmax.add<kEntropy>(z[k], scale);
}

__device__ __forceinline__ void store_results(const pk_log_probs_model& model, int64_t row, double logp, double lse,
                                              double entropy) {
  model.logp[row] = static_cast<float>(logp);
  model.lse[row] = static_cast<float>(lse);
  if (model.entropy != nullptr) model.entropy[row] = static_cast<float>(entropy);
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
      store_results(model, row, value, value, value);
    }
    return;
  }
  const int id = static_cast<int>(label);
  const int n_cols = static_cast<int>(args.n_cols);
  const T* z = static_cast<const T*>(model.logits) + row * model.stride;
  const double inverse_temperature = 1.0 / model.temperature;
  const float scale = static_cast<float>(inverse_temperature * kLog2e);
  const int head = head_of(z, n_cols);
  const int packs = (n_cols - head) / Pack<T>::kSize;
  const Pack<T>* body = reinterpret_cast<const Pack<T>*>(z + head);

  Softmax softmax{-INFINITY, 0.0f, 0.0f};
  const auto take_one = [&](int column) {
    const float value = column == id ? -INFINITY : to_float(z[column]);
    softmax.raise_to(value, scale);
    softmax.add<kEntropy>(value, scale);
  };
  for (int i = threadIdx.x; i < head; i += kBlock) take_one(i);
  int i = threadIdx.x;
  for (; i + (kUnroll - 1) * kBlock < packs; i += kUnroll * kBlock) {
    Pack<T> pack[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) pack[u] = body[i + u * kBlock];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      take_pack<T, kEntropy>(softmax, pack[u], head + (i + u * kBlock) * Pack<T>::kSize, id, scale);
    }
  }
  for (; i < packs; i += kBlock) {
    const Pack<T> pack = body[i];  // one 16-byte load
    take_pack<T, kEntropy>(softmax, pack, head + i * Pack<T>::kSize, id, scale);
  }
  for (int c = head + packs * Pack<T>::kSize + threadIdx.x; c < n_cols; c += kBlock) take_one(c);

  __shared__ Softmax partial[kBlock / kWarp];
  softmax = warp_combine(softmax, scale);
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = softmax;
  __syncthreads();
  if (threadIdx.x >= kWarp) return;
  softmax = threadIdx.x < kBlock / kWarp ? partial[threadIdx.x] : Softmax{-INFINITY, 0.0f, 0.0f};
  softmax = warp_combine(softmax, scale);
  if (threadIdx.x != 0) return;

  const double target = to_float(z[id]);
  const double highest = fmax(static_cast<double>(softmax.highest), target);
  const double exact_scale = inverse_temperature * kLog2e;
  const double step = softmax.highest == -INFINITY ? 0.0 : (softmax.highest - highest) * exact_scale;
  const double factor = exp2(step);
  const double rest = factor * softmax.sum;
  const double t = (target - highest) * exact_scale;
  const double p = exp2(t);
  const double sum = rest + p;
  const double log_sum = log(sum);
  // log1p keeps the digits of `rest` if p is near 1; if p vanishes, the direct formula is exact enough.
  const double logp = p > 1e-280 ? -log1p(rest / p) : kLn2 * t - log_sum;
  const double weighted = factor == 0.0 ? 0.0 : factor * (softmax.weighted + step * softmax.sum);
  const double entropy = log_sum - kLn2 * (weighted + (p == 0.0 ? 0.0 : p * t)) / sum;
  store_results(model, row, logp, highest * inverse_temperature + log_sum, entropy);
}

template <typename T, int kBlock>
__global__ void __launch_bounds__(kBlock) backward_kernel(pk_log_probs_grad_args args) {
  const int64_t row = blockIdx.x;
  T* out = static_cast<T*>(args.out) + row * args.out_stride;
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
  const bool packable = ((reinterpret_cast<uintptr_t>(z) ^ reinterpret_cast<uintptr_t>(out)) & 15) == 0;
  const int head = packable ? head_of(z, n_cols) : n_cols;
  const int packs = (n_cols - head) / Pack<T>::kSize;
  Pack<T>* out_body = reinterpret_cast<Pack<T>*>(out + head);
  const int tail = head + packs * Pack<T>::kSize;

  if (nothing || !valid) {
    const T value = from_float<T>(nothing ? 0.0f : NAN);
    Pack<T> pack;
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
  for (int i = threadIdx.x; i < head; i += kBlock) out[i] = from_float<T>(gradient(to_float(z[i]), i));
  const auto put_pack = [&](Pack<T> pack, int i) {
    const int column = head + i * Pack<T>::kSize;
#pragma unroll
    for (int k = 0; k < Pack<T>::kSize; ++k) {
      pack.value[k] = from_float<T>(gradient(to_float(pack.value[k]), column + k));
    }
    out_body[i] = pack;
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
    out[c] = from_float<T>(gradient(to_float(z[c]), c));
  }
}

template <typename... Parameters>
void launch(void (*kernel)(Parameters...), dim3 grid, int threads, cudaStream_t stream, Parameters... arguments) {
  void* addresses[] = {&arguments...};
  cudaLaunchKernel(kernel, grid, dim3(threads), addresses, 0, stream);
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

template <typename T>
void launch_backward(const pk_log_probs_grad_args& args, cudaStream_t stream) {
  const unsigned rows = static_cast<unsigned>(args.n_rows);
  if (args.n_rows < kFewRows) {
    launch(backward_kernel<T, kManyThreads>, dim3(rows), kManyThreads, stream, args);
  } else {
    launch(backward_kernel<T, kThreads>, dim3(rows), kThreads, stream, args);
  }
}

// Columns are int32, with room for one loop step beyond the last.
constexpr int64_t kMaxColumns = int64_t{1} << 30;

bool valid_sizes(int64_t n_rows, int64_t n_cols) {
  return n_rows >= 0 && n_rows <= INT32_MAX && n_cols >= 1 && n_cols <= kMaxColumns;
}

bool known_dtype(int32_t dtype) { return dtype == PK_FLOAT32 || dtype == PK_BFLOAT16 || dtype == PK_FLOAT16; }

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
  if (args == nullptr || !valid_sizes(args->n_rows, args->n_cols) || !known_dtype(args->dtype)) return PK_BAD_ARGUMENT;
  if (!(args->temperature > 0.0)) return PK_BAD_ARGUMENT;
  if (args->grad_entropy != nullptr && args->entropy == nullptr) return PK_BAD_ARGUMENT;
  if (args->n_rows == 0) return PK_OK;
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  switch (args->dtype) {
    case PK_FLOAT32:
      launch_backward<float>(*args, on);
      break;
    case PK_BFLOAT16:
      launch_backward<__nv_bfloat16>(*args, on);
      break;
    default:
      launch_backward<__half>(*args, on);
  }
  return pk::launch_status("backward_kernel");
}
