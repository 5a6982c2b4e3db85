// Log-probabilities of one id a row and, of the same pass, the columns of at least a given probability: one block per row.
// A thread looks again at its columns only if its maximum is probable enough. At most 1 / min_prob of them do.

#include "pk/abi.h"
#include "row_softmax.cuh"
#include "status.cuh"

namespace {

using namespace pk::rows;

// Nats, and twice the relative error of a float: the caller decides in double.
constexpr double kSlack = 1e-5;
constexpr double kRounding = 2.4e-7;

// Four blocks of 256 threads keep enough loads under way; left to itself the compiler spills to fit more of them.
template <typename T, int kBlock>
__global__ void __launch_bounds__(kBlock, kBlock == kThreads ? 4 : 1) candidates_kernel(pk_candidates_args args) {
  __shared__ int count;
  __shared__ float bound;
  const int64_t row = blockIdx.x;
  for (int i = threadIdx.x; i < args.n_slots; i += kBlock) {
    args.found_ids[row * args.n_slots + i] = -1;
    args.found[row * args.n_slots + i] = -INFINITY;
  }
  const bool masked = args.mask != nullptr && args.mask[row] == 0;
  const int64_t label = masked ? 0 : args.ids[row];
  if (masked || label < 0 || label >= args.n_cols) {
    if (threadIdx.x == 0) args.logp[row] = args.lse[row] = masked ? 0.0f : NAN;
    return;
  }
  const int id = static_cast<int>(label), n_cols = static_cast<int>(args.n_cols);
  const T* z = static_cast<const T*>(args.logits) + row * args.stride;
  const double inverse_temperature = 1.0 / args.temperature;
  const float scale = static_cast<float>(inverse_temperature * kLog2e);
  const Softmax mine = sweep<T, kBlock, false>(z, n_cols, id, scale);
  const Softmax rest = block_combine<kBlock>(mine, scale);
  if (threadIdx.x == 0) {
    const Results of_row = with_target(rest, to_float(z[id]), inverse_temperature);
    args.logp[row] = static_cast<float>(of_row.logp);
    args.lse[row] = static_cast<float>(of_row.lse);
    count = 0;
    // Comparisons with NaN are false: without a distribution there is no candidate.
    const double lowest = args.log_min_prob + of_row.lse - kSlack - kRounding * fabs(of_row.lse);
    bound = isfinite(of_row.lse) ? static_cast<float>(lowest) : NAN;
  }
  __syncthreads();  // the free slots are written, too
  const float inverse = static_cast<float>(inverse_temperature);
  const auto consider = [&](float value, int column) {
    if (!(value * inverse >= bound)) return;
    const int place = atomicAdd(&count, 1);
    if (place >= args.n_slots) return;
    args.found_ids[row * args.n_slots + place] = column;
    args.found[row * args.n_slots + place] = value;
  };
  if (threadIdx.x == 0) consider(to_float(z[id]), id);
  if (!(mine.highest * inverse >= bound)) return;
  const auto one = [&](float value, int column) {
    if (column != id) consider(value, column);
  };
  visit<T, kBlock, 2>(
      z, n_cols,
      [&](const Pack<T>& pack, int column) {
#pragma unroll
        for (int k = 0; k < Pack<T>::kSize; ++k) one(to_float(pack.value[k]), column + k);
      },
      one);
}

template <typename T>
void launch_candidates(const pk_candidates_args& args, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(args.n_rows));
  if (args.n_rows < kFewRows) {
    launch(candidates_kernel<T, kManyThreads>, grid, kManyThreads, stream, args);
  } else {
    launch(candidates_kernel<T, kThreads>, grid, kThreads, stream, args);
  }
}

}  // namespace

extern "C" int pk_cuda_candidates(const pk_candidates_args* args, void* stream) {
  if (args == nullptr || !valid_sizes(args->n_rows, args->n_cols) || !known_dtype(args->dtype)) return PK_BAD_ARGUMENT;
  if (!(args->temperature > 0.0) || args->n_slots < 1 || args->n_slots > INT32_MAX) return PK_BAD_ARGUMENT;
  if (args->n_rows == 0) return PK_OK;
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  switch (args->dtype) {
    case PK_FLOAT32:
      launch_candidates<float>(*args, on);
      break;
    case PK_BFLOAT16:
      launch_candidates<__nv_bfloat16>(*args, on);
      break;
    default:
      launch_candidates<__half>(*args, on);
  }
  return pk::launch_status("candidates_kernel");
}
