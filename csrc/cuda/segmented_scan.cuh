// Segmented scan over packed tokens. Blocks get equal numbers of tokens, independent of segment lengths; each block
// publishes an affine map, and the maps of the blocks before it give the value that a block starts from.
//
// Positions p count tokens in the order in which the recurrence y_p = x_p + w_p * y_{p-1} reads them: from the last
// token to the first if it runs in reverse. w_p is 0 where a segment begins in that order. All arithmetic is float64,
// and the order of every sum depends on the sizes and the number of blocks alone: results are bitwise reproducible.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "pk/abi.h"
#include "status.cuh"

namespace pk {

constexpr int kWarp = 32;
#ifdef PK_SMALL_TILES  // for tests: a few tokens are several blocks
constexpr int kWarps = 2;
constexpr int kItems = 2;
#else
constexpr int kWarps = 8;
constexpr int kItems = 4;  // consecutive tokens per thread
#endif
constexpr int kThreads = kWarp * kWarps;
constexpr int kTile = kThreads * kItems;

// gamma^k; exact for gamma 0 and 1.
__device__ inline double power(double gamma, int64_t k) {
  if (gamma == 1.0 || k == 0) return 1.0;
  return gamma == 0.0 ? 0.0 : exp2(static_cast<double>(k) * log2(gamma));
}

// A segment and its tokens [begin, end).
struct Segment {
  int64_t index = 0;
  int64_t begin = 0;
  int64_t end = 0;

  // Finds the segment of a token: the last one that begins at or before it, as empty segments have no tokens.
  __device__ void seek(const int64_t* cu, int64_t segments, int64_t token) {
    if (token >= begin && token < end) return;
    int64_t low = 0;
    int64_t high = segments;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      if (cu[middle] <= token) {
        low = middle;
      } else {
        high = middle;
      }
    }
    index = low;
    begin = cu[low];
    end = cu[low + 1];
  }
};

struct Packed {
  const int64_t* cu;
  int64_t segments;
  int64_t tokens;
  bool reverse;

  __device__ int64_t token(int64_t position) const { return reverse ? tokens - 1 - position : position; }
  // The position at which a segment begins.
  __device__ int64_t first(const Segment& segment) const { return reverse ? tokens - segment.end : segment.begin; }
};

// The positions [begin, end) of a block: whole tiles, as evenly as possible.
struct BlockRange {
  int64_t begin;
  int64_t end;

  __device__ BlockRange(int64_t tokens, int64_t block, int64_t blocks) {
    const int64_t tiles = (tokens + kTile - 1) / kTile;
    const int64_t size = (tiles + blocks - 1) / blocks * kTile;
    begin = min(tokens, block * size);
    end = min(tokens, begin + size);
  }
  __device__ bool empty() const { return begin == end; }
};

// The affine map y -> value + weight * y, for K recurrences that share a weight.
template <int K>
struct Affine {
  double weight;
  double value[K];
};

template <int K>
__device__ Affine<K> identity() {
  return Affine<K>{1.0, {}};
}

// The map that applies `first`, then `second`. A weight of 0 drops what came before, NaN included.
template <int K>
__device__ Affine<K> compose(const Affine<K>& first, const Affine<K>& second) {
  if (second.weight == 0.0) return second;
  Affine<K> map{first.weight * second.weight, {}};
#pragma unroll
  for (int k = 0; k < K; ++k) map.value[k] = second.value[k] + second.weight * first.value[k];
  return map;
}

template <int K>
__device__ Affine<K> shuffle_up(const Affine<K>& map, int distance) {
  Affine<K> other{__shfl_up_sync(~0u, map.weight, distance), {}};
#pragma unroll
  for (int k = 0; k < K; ++k) other.value[k] = __shfl_up_sync(~0u, map.value[k], distance);
  return other;
}

// `carry` composed with the maps of all threads before this one; afterwards `carry` is composed with all of them.
template <int K>
__device__ Affine<K> exclusive_scan(Affine<K> map, Affine<K>& carry) {
  __shared__ Affine<K> warp_results[kWarps];
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const Affine<K> before = shuffle_up(map, distance);
    if (lane >= distance) map = compose(before, map);
  }
  Affine<K> exclusive = shuffle_up(map, 1);
  if (lane == 0) exclusive = identity<K>();
  if (lane == kWarp - 1) warp_results[warp] = map;
  __syncthreads();
  Affine<K> before = carry;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w == warp) exclusive = compose(before, exclusive);
    before = compose(before, warp_results[w]);
  }
  carry = before;
  __syncthreads();
  return exclusive;
}

// Scans the tokens of a block and calls visit(token, segment, y) for each. input(token, segment) is the map of a token
// inside a segment. Starts from `carry`; returns `carry` composed with the maps of all tokens of the block.
template <int K, typename Input, typename Visit>
__device__ Affine<K> scan_block(const Packed& packed, const BlockRange& range, Affine<K> carry, Input input,
                                Visit visit) {
  Segment segment;
  for (int64_t tile = range.begin; tile < range.end; tile += kTile) {
    const int64_t start = tile + static_cast<int64_t>(threadIdx.x) * kItems;
    Affine<K> maps[kItems];
    Affine<K> all = identity<K>();
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (start + i < range.end) {
        const int64_t token = packed.token(start + i);
        segment.seek(packed.cu, packed.segments, token);
        maps[i] = input(token, segment);
        if (start + i == packed.first(segment)) maps[i].weight = 0.0;
      } else {
        maps[i] = identity<K>();
      }
      all = compose(all, maps[i]);
    }
    Affine<K> y = exclusive_scan(all, carry);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (start + i >= range.end) break;
      y = compose(y, maps[i]);
      const int64_t token = packed.token(start + i);
      segment.seek(packed.cu, packed.segments, token);
      visit(token, segment, y.value);
    }
  }
  return carry;
}

// The value that a block starts from: the maps that the blocks before it published, composed back to the first map
// with weight 0.
template <int K, typename Published>
__device__ Affine<K> carry_into(int64_t block, Published published) {
  Affine<K> carry{0.0, {}};
  double weight = 1.0;
  while (block-- > 0 && weight != 0.0) {
    const Affine<K> map = published(block);
#pragma unroll
    for (int k = 0; k < K; ++k) carry.value[k] += weight * map.value[k];
    weight *= map.weight;
  }
  return carry;
}

// The sum over the threads of a block, returned to each of them, always in the same order.
__device__ inline double block_sum(double value) {
  __shared__ double warp_results[kWarps];
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(~0u, value, distance);
  if (threadIdx.x % kWarp == 0) warp_results[threadIdx.x / kWarp] = value;
  __syncthreads();
  double sum = 0.0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sum += warp_results[w];
  __syncthreads();
  return sum;
}

__device__ inline double block_max(double value) {
  __shared__ double warp_results[kWarps];
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value = fmax(value, __shfl_xor_sync(~0u, value, distance));
  }
  if (threadIdx.x % kWarp == 0) warp_results[threadIdx.x / kWarp] = value;
  __syncthreads();
  double highest = warp_results[0];
#pragma unroll
  for (int w = 1; w < kWarps; ++w) highest = fmax(highest, warp_results[w]);
  __syncthreads();
  return highest;
}

// True in the last block to arrive, which sees what the others wrote before they arrived. Resets the counter to 0 for
// the next launch.
__device__ inline bool arrives_last(uint32_t* arrived) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(arrived, 1u) == gridDim.x - 1;
    if (last) *arrived = 0;
  }
  __syncthreads();
  if (last) __threadfence();
  return last;
}

inline int multiprocessors() {
  int device = 0;
  int count = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count < 1 ? 1 : count;
}

// At most one block per multiprocessor: all are resident at once, as grid-wide barriers require.
inline unsigned blocks_for(int64_t tokens) {
  const int64_t tiles = (tokens + kTile - 1) / kTile;
  const int64_t most = multiprocessors() < PK_MAX_BLOCKS ? multiprocessors() : PK_MAX_BLOCKS;
  return static_cast<unsigned>(tiles < 1 ? 1 : (tiles < most ? tiles : most));
}

// Keeps the arguments of `launch` from taking part in template deduction (std::type_identity_t of C++20).
template <typename T>
struct identity_type {
  using type = T;
};
template <typename T>
using identity_t = typename identity_type<T>::type;

// Launches a kernel; cooperatively for kernels with a grid-wide barrier. `name` is for the error message.
template <typename... Parameters>
int launch(const char* name, void (*kernel)(Parameters...), unsigned blocks, bool cooperative, void* stream,
           identity_t<Parameters>... arguments) {
  void* addresses[] = {&arguments...};
  const auto on = static_cast<cudaStream_t>(stream);
  if (cooperative) {
    cudaLaunchCooperativeKernel(kernel, dim3(blocks), dim3(kThreads), addresses, 0, on);
  } else {
    cudaLaunchKernel(kernel, dim3(blocks), dim3(kThreads), addresses, 0, on);
  }
  return launch_status(name);
}

// Blocks for a grid-stride loop over elements: at most `each` per multiprocessor.
inline unsigned blocks_over(int64_t elements, int64_t each) {
  const int64_t blocks = (elements + kThreads - 1) / kThreads;
  const int64_t most = each * multiprocessors();
  return static_cast<unsigned>(blocks < 1 ? 1 : (blocks < most ? blocks : most));
}

}  // namespace pk
