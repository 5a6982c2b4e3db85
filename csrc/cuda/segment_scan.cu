// One block a segment: a tile of kThreads tokens is scanned by doubling, and the carry goes from tile to tile.

#include <cuda_runtime.h>

#include "pk/abi.h"

namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) scan_kernel(pk_segment_scan_args args) {
  const int64_t begin = args.cu_seqlens[blockIdx.x];
  const int64_t end = args.cu_seqlens[blockIdx.x + 1];
  const int lane = static_cast<int>(threadIdx.x);
  __shared__ double tile[kThreads];

  // gamma^(lane + 1), the weight of the carry at this place of the tile.
  double carry_weight = 1.0;
  for (int i = 0; i <= lane; ++i) carry_weight *= args.gamma;

  double carry = 0.0;
  for (int64_t start = 0; start < end - begin; start += kThreads) {
    const int64_t place = start + lane;
    const bool inside = place < end - begin;
    const int64_t token = args.reverse ? end - 1 - place : begin + place;
    double y = inside ? static_cast<double>(args.values[token]) : 0.0;
    double weight = args.gamma;
    for (int distance = 1; distance < kThreads; distance <<= 1) {
      tile[lane] = y;
      __syncthreads();
      if (lane >= distance) y += weight * tile[lane - distance];
      __syncthreads();
      weight *= weight;
    }
    y += carry_weight * carry;
    if (inside) args.out[token] = static_cast<float>(y);
    tile[lane] = y;
    __syncthreads();
    carry = tile[kThreads - 1];
    __syncthreads();
  }
}

}  // namespace

extern "C" int pk_cuda_segment_scan(const pk_segment_scan_args* args, void* stream) {
  if (args == nullptr || args->n_segments < 0 || args->n_segments > INT32_MAX) return PK_BAD_ARGUMENT;
  if (args->n_segments == 0) return PK_OK;
  scan_kernel<<<static_cast<unsigned>(args->n_segments), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(*args);
  return cudaGetLastError() == cudaSuccess ? PK_OK : PK_CUDA_ERROR;
}
