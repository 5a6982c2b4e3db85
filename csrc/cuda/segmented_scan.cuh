// What the token passes share: the tokens of all segments are split evenly over the blocks, whatever the lengths of the
// segments, and what a segment brings into a block is composed from what the blocks before it published.
//
// Positions p count tokens in the order in which a recurrence y_p = x_p + w_p * y_{p-1} reads them: from the last token
// on if it runs in reverse. w_p is 0 where a segment begins in that order. Everything is float64, and sums are taken in
// an order that depends on nothing but the sizes and the number of blocks: equal bits from run to run.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "pk/abi.h"

namespace pk {

constexpr int kWarp = 32;
#ifdef PK_SMALL_TILES  // for tests: few tokens make many blocks
constexpr int kWarps = 2;
constexpr int kItems = 2;
#else
constexpr int kWarps = 8;
constexpr int kItems = 4;  // consecutive tokens of a thread
#endif
constexpr int kThreads = kWarp * kWarps;
constexpr int kTile = kThreads * kItems;

// gamma^k; exact for gamma 0 and 1.
__device__ inline double power(double gamma, int64_t k) {
  if (gamma == 1.0 || k == 0) return 1.0;
  return gamma == 0.0 ? 0.0 : exp2(static_cast<double>(k) * log2(gamma));
}

// The tokens [begin, end) of the segment that holds a token.
struct Segment {
  int64_t index = 0;
  int64_t begin = 0;
  int64_t end = 0;

  // Empty segments hold no token, so the last one that begins at or before it is the one.
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

// The positions of a block: whole tiles, as even as that allows.
struct Share {
  int64_t begin;
  int64_t end;

  __device__ Share(int64_t tokens, int64_t block, int64_t blocks) {
    const int64_t tiles = (tokens + kTile - 1) / kTile;
    const int64_t size = (tiles + blocks - 1) / blocks * kTile;
    begin = min(tokens, block * size);
    end = min(tokens, begin + size);
  }
  __device__ bool empty() const { return begin == end; }
};

// y -> value + weight * y, for K recurrences with one weight.
template <int K>
struct Link {
  double weight;
  double value[K];
};

template <int K>
__device__ Link<K> identity() {
  Link<K> link{1.0, {}};
  return link;
}

// First `a`, then `b`. A weight of 0 cuts: what lies before, NaN included, does not pass.
template <int K>
__device__ Link<K> then(const Link<K>& a, const Link<K>& b) {
  if (b.weight == 0.0) return b;
  Link<K> link{a.weight * b.weight, {}};
#pragma unroll
  for (int k = 0; k < K; ++k) link.value[k] = b.value[k] + b.weight * a.value[k];
  return link;
}

template <int K>
__device__ Link<K> shuffle_up(const Link<K>& link, int distance) {
  Link<K> other{__shfl_up_sync(~0u, link.weight, distance), {}};
#pragma unroll
  for (int k = 0; k < K; ++k) other.value[k] = __shfl_up_sync(~0u, link.value[k], distance);
  return other;
}

// Composes the links of all threads before this one onto `carry`; afterwards `carry` holds all of them.
template <int K>
__device__ Link<K> exclusive_scan(Link<K> link, Link<K>& carry) {
  __shared__ Link<K> of_warps[kWarps];
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const Link<K> before = shuffle_up(link, distance);
    if (lane >= distance) link = then(before, link);
  }
  Link<K> exclusive = shuffle_up(link, 1);
  if (lane == 0) exclusive = identity<K>();
  if (lane == kWarp - 1) of_warps[warp] = link;
  __syncthreads();
  Link<K> before = carry;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w == warp) exclusive = then(before, exclusive);
    before = then(before, of_warps[w]);
  }
  carry = before;
  __syncthreads();
  return exclusive;
}

// visit(token, segment, y) for every token of the share. input(token, segment) gives a token's link with the weight that
// holds inside a segment. Starts from `carry` and returns what the share leaves.
template <int K, typename Input, typename Visit>
__device__ Link<K> scan_share(const Packed& packed, const Share& share, Link<K> carry, Input input, Visit visit) {
  Segment segment;
  for (int64_t tile = share.begin; tile < share.end; tile += kTile) {
    const int64_t start = tile + static_cast<int64_t>(threadIdx.x) * kItems;
    Link<K> links[kItems];
    Link<K> all = identity<K>();
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (start + i < share.end) {
        const int64_t token = packed.token(start + i);
        segment.seek(packed.cu, packed.segments, token);
        links[i] = input(token, segment);
        if (start + i == packed.first(segment)) links[i].weight = 0.0;
      } else {
        links[i] = identity<K>();
      }
      all = then(all, links[i]);
    }
    Link<K> y = exclusive_scan(all, carry);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (start + i >= share.end) break;
      y = then(y, links[i]);
      const int64_t token = packed.token(start + i);
      segment.seek(packed.cu, packed.segments, token);
      visit(token, segment, y.value);
    }
  }
  return carry;
}

// What comes into a block from the links that the blocks before it left: back to the first that cuts.
template <int K, typename Left>
__device__ Link<K> carried_into(int64_t block, Left left) {
  Link<K> carry{0.0, {}};
  double weight = 1.0;
  while (block-- > 0 && weight != 0.0) {
    const Link<K> link = left(block);
#pragma unroll
    for (int k = 0; k < K; ++k) carry.value[k] += weight * link.value[k];
    weight *= link.weight;
  }
  return carry;
}

// The sum over the threads of a block, in each of them, always in the same order.
__device__ inline double block_sum(double value) {
  __shared__ double of_warps[kWarps];
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(~0u, value, distance);
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = value;
  __syncthreads();
  double sum = 0.0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sum += of_warps[w];
  __syncthreads();
  return sum;
}

__device__ inline double block_max(double value) {
  __shared__ double of_warps[kWarps];
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value = fmax(value, __shfl_xor_sync(~0u, value, distance));
  }
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = value;
  __syncthreads();
  double highest = of_warps[0];
#pragma unroll
  for (int w = 1; w < kWarps; ++w) highest = fmax(highest, of_warps[w]);
  __syncthreads();
  return highest;
}

// True in the threads of the block that comes here last, which sees what the others wrote before they came. Leaves the
// counter at 0 for the next launch.
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

// One block a multiprocessor at most: all of them are resident together, as barriers over the grid need.
inline unsigned blocks_for(int64_t tokens) {
  const int64_t tiles = (tokens + kTile - 1) / kTile;
  const int64_t most = multiprocessors() < PK_MAX_BLOCKS ? multiprocessors() : PK_MAX_BLOCKS;
  return static_cast<unsigned>(tiles < 1 ? 1 : (tiles < most ? tiles : most));
}

template <typename T>
struct Same {
  using type = T;
};

// One launch; `resident` for kernels with a barrier over the grid.
template <typename... Parameters>
int launch(void (*kernel)(Parameters...), unsigned blocks, bool resident, void* stream,
           typename Same<Parameters>::type... arguments) {
  void* addresses[] = {&arguments...};
  const auto on = static_cast<cudaStream_t>(stream);
  if (resident) {
    cudaLaunchCooperativeKernel(kernel, dim3(blocks), dim3(kThreads), addresses, 0, on);
  } else {
    cudaLaunchKernel(kernel, dim3(blocks), dim3(kThreads), addresses, 0, on);
  }
  return cudaGetLastError() == cudaSuccess ? PK_OK : PK_CUDA_ERROR;
}

// Blocks of a kernel that needs no share: one an `elements` / kThreads, at most `each` a multiprocessor.
inline unsigned blocks_over(int64_t elements, int64_t each) {
  const int64_t blocks = (elements + kThreads - 1) / kThreads;
  const int64_t most = each * multiprocessors();
  return static_cast<unsigned>(blocks < 1 ? 1 : (blocks < most ? blocks : most));
}

}  // namespace pk
