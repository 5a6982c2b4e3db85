// CUDA kernels on a CPU, for tests of what they compute: each thread of a block is a fiber, and a barrier or a shuffle
// hands over to the next one. All threads of a block must meet at the same ones, which is checked. Blocks run one after
// another, from the first on or from the last on in turns, and up to a barrier over the grid.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(...)
#define __forceinline__ inline

using std::isfinite;
using std::max;
using std::min;

struct dim3 {
  unsigned x, y;
  dim3(unsigned x = 1, unsigned y = 1) : x(x), y(y) {}
};
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorAssert = 710 };
enum { cudaDevAttrMultiProcessorCount };

namespace emulator {

constexpr size_t kStack = 64 * 1024;

enum class At { start, barrier, shuffle, grid, end };

struct Thread {
  jmp_buf resumes;
  std::unique_ptr<char[]> stack;
  At at = At::start;
};

struct State {
  jmp_buf scheduler;
  std::vector<std::unique_ptr<char[]>> free_stacks;
  Thread* running = nullptr;
  dim3 thread, block, grid;
  unsigned threads = 0;
  uint64_t rounds = 0;
  std::vector<uint64_t> slots[2];
  std::function<void()>* body = nullptr;
  unsigned launches = 0;
  bool assertion_failed = false;
};

inline State& state() {
  static State shared;
  return shared;
}

inline void wait(At at) {
  State& s = state();
  s.running->at = at;
  if (_setjmp(s.running->resumes) == 0) _longjmp(s.scheduler, 1);
}

inline void enter() {
  State& s = state();
  (*s.body)();
  s.running->at = At::end;
  _longjmp(s.scheduler, 1);
}

// Until the thread waits or ends. Only its start is a switch of contexts, which calls the system each time.
__attribute__((noinline)) inline void resume(Thread& thread) {
  State& s = state();
  s.running = &thread;
  if (_setjmp(s.scheduler) != 0) return;
  if (thread.at != At::start) _longjmp(thread.resumes, 1);
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = thread.stack.get();
  context.uc_stack.ss_size = kStack;
  context.uc_link = nullptr;
  makecontext(&context, enter, 0);
  setcontext(&context);
}

inline std::vector<Thread> start_block(unsigned threads) {
  State& s = state();
  std::vector<Thread> block(threads);
  for (Thread& thread : block) {
    if (s.free_stacks.empty()) s.free_stacks.emplace_back(new char[kStack]);
    thread.stack = std::move(s.free_stacks.back());
    s.free_stacks.pop_back();
  }
  return block;
}

inline void end_block(std::vector<Thread>& block) {
  for (Thread& thread : block) state().free_stacks.push_back(std::move(thread.stack));
  block.clear();
}

// Runs the threads of a block until all have ended or wait for the grid.
inline At run_block(std::vector<Thread>& threads) {
  State& s = state();
  for (;;) {
    ++s.rounds;
    for (unsigned i = 0; i < threads.size(); ++i) {
      if (threads[i].at == At::end) continue;
      s.thread = dim3(i);
      resume(threads[i]);
    }
    // Only at a shuffle, which is a warp's own affair, may threads have ended, and then whole warps.
    for (unsigned i = 0; i < threads.size(); ++i) {
      const bool ended = threads[i].at == At::end && threads[0].at == At::shuffle && threads[i - i % 32].at == At::end;
      if (threads[i].at != threads[0].at && !ended) {
        std::fprintf(stderr, "emulator: threads of a block wait at different places\n");
        std::abort();
      }
    }
    if (threads[0].at == At::end || threads[0].at == At::grid) return threads[0].at;
  }
}

inline void run(dim3 shape, unsigned threads, bool cooperative, std::function<void()> body) {
  State& s = state();
  const unsigned blocks = shape.x * shape.y;
  s.grid = shape;
  s.threads = threads;
  s.body = &body;
  for (auto& slots : s.slots) slots.assign(threads, 0);
  std::vector<unsigned> order(blocks);
  for (unsigned b = 0; b < blocks; ++b) order[b] = s.launches % 2 == 0 ? b : blocks - 1 - b;
  ++s.launches;
  std::vector<std::vector<Thread>> grid(blocks);
  bool waiting = true;
  while (waiting) {
    waiting = false;
    for (const unsigned b : order) {
      s.block = dim3(b % shape.x, b / shape.x);
      if (grid[b].empty()) grid[b] = start_block(threads);
      if (run_block(grid[b]) == At::grid) {
        if (!cooperative) std::abort();
        waiting = true;
      } else if (!cooperative) {
        end_block(grid[b]);
      }
    }
  }
  for (auto& block : grid) end_block(block);
}

template <typename... P, size_t... I>
void call(void (*kernel)(P...), void** arguments, std::index_sequence<I...>) {
  kernel(*static_cast<P*>(arguments[I])...);
}

template <typename... P>
cudaError_t launch(void (*kernel)(P...), dim3 blocks, dim3 threads, void** arguments, bool cooperative) {
  run(blocks, threads.x, cooperative, [=] { call(kernel, arguments, std::index_sequence_for<P...>()); });
  return cudaSuccess;
}

template <typename T>
T shuffle(T value, unsigned from) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  State& s = state();
  std::vector<uint64_t>& slots = s.slots[s.rounds % 2];
  std::memcpy(&slots[s.thread.x], &value, sizeof value);
  wait(At::shuffle);
  T other;
  std::memcpy(&other, &slots[from], sizeof other);
  return other;
}

}  // namespace emulator

#define threadIdx (emulator::state().thread)
#define blockIdx (emulator::state().block)
#define gridDim (emulator::state().grid)

inline void __syncthreads() { emulator::wait(emulator::At::barrier); }
inline void __threadfence() {}
inline double __shfl_up_sync(unsigned, double value, int distance) {
  const unsigned thread = threadIdx.x;
  const unsigned lane = thread % 32;
  return emulator::shuffle(value, lane < static_cast<unsigned>(distance) ? thread : thread - distance);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  const unsigned thread = threadIdx.x;
  return emulator::shuffle(value, thread ^ static_cast<unsigned>(mask));
}
template <typename T>
T atomicAdd(T* at, std::common_type_t<T> value) {
  const T before = *at;
  *at += value;
  return before;
}
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }

template <typename... P>
cudaError_t cudaLaunchKernel(void (*kernel)(P...), dim3 blocks, dim3 threads, void** arguments, size_t, cudaStream_t) {
  return emulator::launch(kernel, blocks, threads, arguments, false);
}
template <typename... P>
cudaError_t cudaLaunchCooperativeKernel(void (*kernel)(P...), dim3 blocks, dim3 threads, void** arguments, size_t,
                                        cudaStream_t) {
  return emulator::launch(kernel, blocks, threads, arguments, true);
}
// Printed as on a GPU, and an error of the launch; there it is one of what synchronises next.
inline void __assertfail(const char* message, const char*, unsigned, const char*, size_t) {
  std::fprintf(stderr, "Assertion `%s` failed.\n", message);
  emulator::state().assertion_failed = true;
}
// A launch fails if the environment variable PK_EMULATED_FAILURE is set.
inline cudaError_t cudaGetLastError() {
  if (std::exchange(emulator::state().assertion_failed, false)) return cudaErrorAssert;
  return std::getenv("PK_EMULATED_FAILURE") == nullptr ? cudaSuccess : cudaErrorInvalidValue;
}
inline const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaErrorAssert) return "device-side assert triggered";
  return error == cudaSuccess ? "no error" : "invalid argument";
}
inline const char* cudaGetErrorName(cudaError_t error) {
  if (error == cudaErrorAssert) return "cudaErrorAssert";
  return error == cudaSuccess ? "cudaSuccess" : "cudaErrorInvalidValue";
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, int, int) {
  const char* set = std::getenv("PK_EMULATED_MULTIPROCESSORS");
  *value = set == nullptr ? 3 : std::atoi(set);
  return cudaSuccess;
}
