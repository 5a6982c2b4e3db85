// One block a row: each thread keeps its own online softmax over 16-byte loads, then the block combines them.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "pk/abi.h"

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr float kLog2e = 1.44269504088896341f;
constexpr double kLn2 = 0.693147180559945309;
constexpr float kExp2Low = -126.0f;

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

// Elements of a row before its first 16-byte boundary: rows of V = 151937 or of a sliced tensor start anywhere.
template <typename T>
__device__ __forceinline__ int64_t head_of(const T* row, int64_t n_cols) {
  const int64_t misaligned = static_cast<int64_t>((reinterpret_cast<uintptr_t>(row) & 15) / sizeof(T));
  const int64_t head = misaligned == 0 ? 0 : Pack<T>::kSize - misaligned;
  return head < n_cols ? head : n_cols;
}

// NaN passes, as a clamp must not hide it; where 2^t vanishes the factor beside it stays finite (0 * -inf is NaN).
__device__ __forceinline__ float clamp_exponent(float t) { return t < kExp2Low ? kExp2Low : t; }
__device__ __forceinline__ float exp2_clamped(float t) { return t < kExp2Low ? 0.0f : exp2f(t); }

// sum of 2^t and of t * 2^t, with t = (z - highest) * scale.
struct Softmax {
  float highest;
  float sum;
  float weighted;

  __device__ __forceinline__ void raise_to(float value, float scale) {
    if (!(value > highest)) return;
    if (highest != -INFINITY) {
      const float step = (highest - value) * scale;
      const float factor = exp2_clamped(step);
      weighted = factor * (weighted + clamp_exponent(step) * sum);
      sum *= factor;
    }
    highest = value;
  }

  __device__ __forceinline__ void add(float z, float scale) {
    const float t = (z - (highest == -INFINITY ? 0.0f : highest)) * scale;
    const float e = exp2_clamped(t);
    sum += e;
    weighted += e * clamp_exponent(t);
  }

  __device__ __forceinline__ void merge(Softmax other, float scale) {
    raise_to(other.highest, scale);
    other.raise_to(highest, scale);
    sum += other.sum;
    weighted += other.weighted;
  }
};

__device__ __forceinline__ Softmax warp_combine(Softmax mine, float scale) {
  for (int offset = 16; offset > 0; offset >>= 1) {
    Softmax other;
    other.highest = __shfl_xor_sync(0xffffffffu, mine.highest, offset);
    other.sum = __shfl_xor_sync(0xffffffffu, mine.sum, offset);
    other.weighted = __shfl_xor_sync(0xffffffffu, mine.weighted, offset);
    mine.merge(other, scale);
  }
  return mine;
}

// True where the row is to be computed; an id out of range is reported and the row left to the caller.
template <typename Args>
__device__ __forceinline__ bool id_is_valid(const Args& args, int64_t row) {
  const int64_t id = args.ids[row];
  if (id >= 0 && id < args.n_cols) return true;
  if (threadIdx.x == 0 && args.bad_row != nullptr) *args.bad_row = row;
  return false;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) forward_kernel(pk_log_probs_args args) {
  const int64_t row = blockIdx.x;
  const bool masked = args.mask != nullptr && args.mask[row] == 0;
  if (masked || !id_is_valid(args, row)) {
    if (threadIdx.x == 0) {
      const float value = masked ? 0.0f : NAN;
      args.logp[row] = value;
      args.lse[row] = value;
      if (args.entropy != nullptr) args.entropy[row] = value;
    }
    return;
  }
  const T* z = static_cast<const T*>(args.logits) + row * args.logits_stride;
  const double inverse_temperature = 1.0 / args.temperature;
  const float scale = static_cast<float>(inverse_temperature) * kLog2e;
  const int64_t head = head_of(z, args.n_cols);
  const int64_t packs = (args.n_cols - head) / Pack<T>::kSize;
  const Pack<T>* body = reinterpret_cast<const Pack<T>*>(z + head);

  Softmax softmax{-INFINITY, 0.0f, 0.0f};
  const auto add_one = [&](int64_t column) {
    const float value = to_float(z[column]);
    softmax.raise_to(value, scale);
    softmax.add(value, scale);
  };
  for (int64_t i = threadIdx.x; i < head; i += kThreads) add_one(i);
  for (int64_t i = threadIdx.x; i < packs; i += kThreads) {
    const Pack<T> pack = body[i];
    float highest = to_float(pack.value[0]);
#pragma unroll
    for (int k = 1; k < Pack<T>::kSize; ++k) highest = fmaxf(highest, to_float(pack.value[k]));
    softmax.raise_to(highest, scale);
#pragma unroll
    for (int k = 0; k < Pack<T>::kSize; ++k) softmax.add(to_float(pack.value[k]), scale);
  }
  for (int64_t i = head + packs * Pack<T>::kSize + threadIdx.x; i < args.n_cols; i += kThreads) add_one(i);

  __shared__ Softmax partial[kWarps];
  softmax = warp_combine(softmax, scale);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = softmax;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int warp = 1; warp < kWarps; ++warp) softmax.merge(partial[warp], scale);

  const double highest = softmax.highest;
  const double log_sum = log(static_cast<double>(softmax.sum));
  const double target = to_float(z[args.ids[row]]);
  args.lse[row] = static_cast<float>(highest * inverse_temperature + log_sum);
  args.logp[row] = static_cast<float>((target - highest) * inverse_temperature - log_sum);
  if (args.entropy != nullptr) {
    args.entropy[row] = static_cast<float>(log_sum - kLn2 * softmax.weighted / softmax.sum);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) backward_kernel(pk_log_probs_grad_args args) {
  const int64_t row = blockIdx.x;
  T* out = static_cast<T*>(args.out) + row * args.out_stride;
  const bool masked = args.mask != nullptr && args.mask[row] == 0;
  if (masked || !id_is_valid(args, row)) {
    const T value = from_float<T>(masked ? 0.0f : NAN);
    for (int64_t i = threadIdx.x; i < args.n_cols; i += kThreads) out[i] = value;
    return;
  }
  const T* z = static_cast<const T*>(args.logits) + row * args.logits_stride;
  const int64_t id = args.ids[row];
  const float grad_logp = args.grad_logp == nullptr ? 0.0f : args.grad_logp[row];
  const float grad_entropy = args.grad_entropy == nullptr ? 0.0f : args.grad_entropy[row];
  const float entropy = args.entropy == nullptr ? 0.0f : args.entropy[row];
  const float lse = args.lse[row];
  const float inverse_temperature = static_cast<float>(1.0 / args.temperature);

  // p_j * (a + b * t) with log p_j = t * ln 2, as in the CPU kernel; the target adds its own term.
  const float scale = inverse_temperature * kLog2e;
  const float shift = static_cast<float>(lse * args.temperature);
  const float a = -(grad_logp + grad_entropy * entropy) * inverse_temperature;
  const float b = -grad_entropy * static_cast<float>(kLn2) * inverse_temperature;
  const auto gradient = [&](float value, int64_t column) {
    const float t = (value - shift) * scale;
    const float others = exp2_clamped(t) * (a + b * clamp_exponent(t));
    if (column != id) return others;
    const float log_p = value * inverse_temperature - lse;
    const float p = expf(log_p);
    const float curvature = p == 0.0f ? 0.0f : p * (log_p + entropy);
    return (-grad_logp * expm1f(log_p) - grad_entropy * curvature) * inverse_temperature;
  };

  const int64_t head = head_of(z, args.n_cols);
  const bool packable = ((reinterpret_cast<uintptr_t>(z) ^ reinterpret_cast<uintptr_t>(out)) & 15) == 0;
  const int64_t packs = packable ? (args.n_cols - head) / Pack<T>::kSize : 0;
  const Pack<T>* body = reinterpret_cast<const Pack<T>*>(z + head);
  Pack<T>* out_body = reinterpret_cast<Pack<T>*>(out + head);
  for (int64_t i = threadIdx.x; i < head; i += kThreads) out[i] = from_float<T>(gradient(to_float(z[i]), i));
  for (int64_t i = threadIdx.x; i < packs; i += kThreads) {
    Pack<T> pack = body[i];
    const int64_t column = head + i * Pack<T>::kSize;
#pragma unroll
    for (int k = 0; k < Pack<T>::kSize; ++k) {
      pack.value[k] = from_float<T>(gradient(to_float(pack.value[k]), column + k));
    }
    out_body[i] = pack;
  }
  for (int64_t i = head + packs * Pack<T>::kSize + threadIdx.x; i < args.n_cols; i += kThreads) {
    out[i] = from_float<T>(gradient(to_float(z[i]), i));
  }
}

template <typename Args>
bool valid(const Args* args) {
  return args != nullptr && args->n_rows >= 0 && args->n_rows <= INT32_MAX && args->n_cols >= 1 &&
         args->temperature > 0.0;
}

int launch_status() { return cudaGetLastError() == cudaSuccess ? PK_OK : PK_CUDA_ERROR; }

}  // namespace

extern "C" int pk_cuda_log_probs_forward(const pk_log_probs_args* args, void* stream) {
  if (!valid(args)) return PK_BAD_ARGUMENT;
  if (args->n_rows == 0) return PK_OK;
  const unsigned rows = static_cast<unsigned>(args->n_rows);
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  switch (args->dtype) {
    case PK_FLOAT32:
      forward_kernel<float><<<rows, kThreads, 0, on>>>(*args);
      break;
    case PK_BFLOAT16:
      forward_kernel<__nv_bfloat16><<<rows, kThreads, 0, on>>>(*args);
      break;
    case PK_FLOAT16:
      forward_kernel<__half><<<rows, kThreads, 0, on>>>(*args);
      break;
    default:
      return PK_BAD_ARGUMENT;
  }
  return launch_status();
}

extern "C" int pk_cuda_log_probs_backward(const pk_log_probs_grad_args* args, void* stream) {
  if (!valid(args) || (args->grad_entropy != nullptr && args->entropy == nullptr)) return PK_BAD_ARGUMENT;
  if (args->n_rows == 0) return PK_OK;
  const unsigned rows = static_cast<unsigned>(args->n_rows);
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  switch (args->dtype) {
    case PK_FLOAT32:
      backward_kernel<float><<<rows, kThreads, 0, on>>>(*args);
      break;
    case PK_BFLOAT16:
      backward_kernel<__nv_bfloat16><<<rows, kThreads, 0, on>>>(*args);
      break;
    case PK_FLOAT16:
      backward_kernel<__half><<<rows, kThreads, 0, on>>>(*args);
      break;
    default:
      return PK_BAD_ARGUMENT;
  }
  return launch_status();
}
