// The only pybind11 file: addresses come in as integers, the GIL is released around the kernel, and a status becomes
// an exception. Shapes, devices and lifetimes are the caller's business (prime_kernels/_native.py).

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "pk/abi.h"
#include "pk/row_kernels.h"

#ifdef PK_HAS_CUDA
#define PK_ON_CUDA(function) (&function)
#else
#define PK_ON_CUDA(function) static_cast<decltype(&function)>(nullptr)
#endif

namespace py = pybind11;

namespace {

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void raise_on(int status) {
  if (status == PK_OK) return;
  if (status == PK_CUDA_ERROR) throw std::runtime_error("prime_kernels: a CUDA kernel could not be launched");
  throw py::value_error("prime_kernels: the kernel rejected its arguments (status " + std::to_string(status) + ")");
}

// For CPU kernels, whose ids are readable here.
void raise_on(int status, int64_t bad_row, const int64_t* ids, int64_t n_cols) {
  if (status != PK_BAD_INDEX) return raise_on(status);
  throw py::index_error("ids[" + std::to_string(bad_row) + "] is " + std::to_string(ids[bad_row]) +
                        ", expected a value in [0, " + std::to_string(n_cols) + ")");
}

template <typename Kernel, typename... Args>
int call(Kernel kernel, Args... args) {
  py::gil_scoped_release release;
  return kernel(args...);
}

// (logits, row stride, dtype, temperature, logp, lse, entropy) of one model.
using Model = std::tuple<uintptr_t, int64_t, int, double, uintptr_t, uintptr_t, uintptr_t>;

pk_log_probs_args forward_args(const std::vector<Model>& models, uintptr_t ids, uintptr_t mask, int64_t n_rows,
                               int64_t n_cols) {
  pk_log_probs_args args{};
  if (models.size() > PK_MAX_MODELS) raise_on(PK_BAD_ARGUMENT);
  for (const auto& [logits, stride, dtype, temperature, logp, lse, entropy] : models) {
    args.models[args.n_models++] = {pointer<const void>(logits), stride, dtype, temperature, pointer<float>(logp),
                                    pointer<float>(lse), pointer<float>(entropy)};
  }
  args.ids = pointer<const int64_t>(ids);
  args.mask = pointer<const uint8_t>(mask);
  args.n_rows = n_rows;
  args.n_cols = n_cols;
  return args;
}

pk_log_probs_grad_args backward_args(uintptr_t logits, int64_t logits_stride, int dtype, double temperature,
                                     uintptr_t ids, uintptr_t mask, int64_t n_rows, int64_t n_cols, uintptr_t lse,
                                     uintptr_t entropy, uintptr_t grad_logp, uintptr_t grad_entropy, uintptr_t out,
                                     int64_t out_stride, bool partial) {
  pk_log_probs_grad_args args{};
  args.logits = pointer<const void>(logits);
  args.logits_stride = logits_stride;
  args.dtype = dtype;
  args.temperature = temperature;
  args.ids = pointer<const int64_t>(ids);
  args.mask = pointer<const uint8_t>(mask);
  args.n_rows = n_rows;
  args.n_cols = n_cols;
  args.lse = pointer<const float>(lse);
  args.entropy = pointer<const float>(entropy);
  args.grad_logp = pointer<const float>(grad_logp);
  args.grad_entropy = pointer<const float>(grad_entropy);
  args.out = pointer<void>(out);
  args.out_stride = out_stride;
  args.partial = partial ? 1 : 0;
  return args;
}

pk_segment_scan_args scan_args(uintptr_t values, uintptr_t cu_seqlens, int64_t n_segments, int64_t n_tokens,
                               double gamma, bool reverse, uintptr_t out) {
  pk_segment_scan_args args{};
  args.values = pointer<const float>(values);
  args.cu_seqlens = pointer<const int64_t>(cu_seqlens);
  args.n_segments = n_segments;
  args.n_tokens = n_tokens;
  args.gamma = gamma;
  args.reverse = reverse ? 1 : 0;
  args.n_threads = 1;
  args.out = pointer<float>(out);
  return args;
}

// Every function has the arguments of its *_args builder above, in that order, then what the device needs: a number of
// threads or a stream.
template <typename Args, typename... Fields>
void bind_rows(py::module_& m, const std::string& name, Args (*build)(Fields...), int (*on_cpu)(const Args*),
               [[maybe_unused]] int (*on_cuda)(const Args*, void*)) {
  m.def(name.c_str(), [build, on_cpu](Fields... fields, int n_threads) {
    int64_t bad_row = -1;
    Args args = build(fields...);
    args.n_threads = n_threads;
    args.bad_row = &bad_row;
    const int status = call(on_cpu, &args);
    raise_on(status, bad_row, args.ids, args.n_cols);
  });
#ifdef PK_HAS_CUDA
  m.def(("cuda_" + name).c_str(), [build, on_cuda](Fields... fields, uintptr_t stream) {
    Args args = build(fields...);
    raise_on(call(on_cuda, &args, pointer<void>(stream)));
  });
#endif
}

template <typename... Fields>
void bind_segment_scan(py::module_& m, pk_segment_scan_args (*build)(Fields...)) {
  m.def("segment_scan", [build](Fields... fields, int n_threads) {
    pk_segment_scan_args args = build(fields...);
    args.n_threads = n_threads;
    raise_on(call(pk_cpu_segment_scan, &args));
  });
#ifdef PK_HAS_CUDA
  m.def("cuda_segment_scan", [build](Fields... fields, uintptr_t stream) {
    pk_segment_scan_args args = build(fields...);
    raise_on(call(pk_cuda_segment_scan, &args, pointer<void>(stream)));
  });
#endif
}

pk_rloo_args rloo_args(uintptr_t rewards, uintptr_t mask, uintptr_t cu_seqlens, int64_t n_responses, int64_t n_tokens) {
  pk_rloo_args args{};
  args.rewards = pointer<const float>(rewards);
  args.mask = pointer<const uint8_t>(mask);
  args.cu_seqlens = pointer<const int64_t>(cu_seqlens);
  args.n_responses = n_responses;
  args.n_tokens = n_tokens;
  return args;
}

void bind_rloo(py::module_& m) {
  m.def("rloo_moments", [](uintptr_t rewards, uintptr_t mask, uintptr_t cu_seqlens, int64_t n_responses,
                           int64_t n_tokens, uintptr_t sums, uintptr_t counts, uintptr_t largest, int n_threads) {
    pk_rloo_args args = rloo_args(rewards, mask, cu_seqlens, n_responses, n_tokens);
    args.n_threads = n_threads;
    raise_on(call(pk_cpu_rloo_moments, &args, pointer<double>(sums), pointer<double>(counts),
                  pointer<double>(largest)));
  });
  m.def("rloo_returns", [](uintptr_t rewards, uintptr_t mask, uintptr_t cu_seqlens, int64_t n_responses,
                           int64_t n_tokens, uintptr_t scale, uintptr_t shift, uintptr_t outcomes,
                           double gamma_process, double gamma_outcome, double process_coef, double outcome_coef,
                           uintptr_t out, int n_threads) {
    pk_rloo_args args = rloo_args(rewards, mask, cu_seqlens, n_responses, n_tokens);
    args.scale = pointer<const double>(scale);
    args.shift = pointer<const double>(shift);
    args.outcomes = pointer<const double>(outcomes);
    args.gamma_process = gamma_process;
    args.gamma_outcome = gamma_outcome;
    args.process_coef = process_coef;
    args.outcome_coef = outcome_coef;
    args.n_threads = n_threads;
    args.out = pointer<float>(out);
    double total = 0.0;
    raise_on(call(pk_cpu_rloo_returns, &args, &total));
    return total;
  });
  m.def("centred_squares", [](uintptr_t values, int64_t n, double mean, int n_threads) {
    double total = 0.0;
    raise_on(call(pk_cpu_centred_squares, pointer<const float>(values), n, mean, n_threads, &total));
    return total;
  });
  m.def("whiten", [](uintptr_t values, int64_t n, double mean, double factor, uintptr_t out, int n_threads) {
    raise_on(call(pk_cpu_whiten, pointer<const float>(values), n, mean, factor, n_threads, pointer<float>(out)));
  });
}

void bind_segments(py::module_& m) {
  m.def("segment_sum", [](uintptr_t values, uintptr_t cu, int64_t n_segments, int64_t n_tokens, uintptr_t out,
                          int n_threads) {
    raise_on(call(pk_cpu_segment_sum, pointer<const float>(values), pointer<const int64_t>(cu), n_segments, n_tokens,
                  n_threads, pointer<double>(out)));
  });
  m.def("segment_fill", [](uintptr_t values, uintptr_t cu, int64_t n_segments, int64_t n_tokens, uintptr_t out,
                           int n_threads) {
    raise_on(call(pk_cpu_segment_fill, pointer<const double>(values), pointer<const int64_t>(cu), n_segments, n_tokens,
                  n_threads, pointer<float>(out)));
  });
}

pk_ppo_args ppo_args(uintptr_t logp, uintptr_t old_logp, uintptr_t advantages, uintptr_t mask, uintptr_t weights,
                     int64_t n_tokens, double clip_low, double clip_high) {
  pk_ppo_args args{};
  args.logp = pointer<const float>(logp);
  args.old_logp = pointer<const float>(old_logp);
  args.advantages = pointer<const float>(advantages);
  args.mask = pointer<const uint8_t>(mask);
  args.weights = pointer<const float>(weights);
  args.n_tokens = n_tokens;
  args.clip_low = clip_low;
  args.clip_high = clip_high;
  return args;
}

template <typename... Fields>
void bind_ppo(py::module_& m, pk_ppo_args (*build)(Fields...)) {
  m.def("ppo_loss", [build](Fields... fields, uintptr_t sums, int n_threads) {
    pk_ppo_args args = build(fields...);
    args.n_threads = n_threads;
    raise_on(call(pk_cpu_ppo_loss, &args, pointer<double>(sums)));
  });
  m.def("ppo_loss_backward", [build](Fields... fields, double factor, uintptr_t out, int n_threads) {
    pk_ppo_args args = build(fields...);
    args.n_threads = n_threads;
    raise_on(call(pk_cpu_ppo_loss_backward, &args, factor, pointer<float>(out)));
  });
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = PK_BUILD_COMPILER;
  info["flags"] = PK_BUILD_FLAGS;
  info["cpu"] = pk::row_kernels().name;
#ifdef _OPENMP
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
#ifdef PK_HAS_CUDA
  info["cuda"] = true;
#else
  info["cuda"] = false;
#endif
  info["cuda_detail"] = PK_BUILD_CUDA_DETAIL;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of prime_kernels; called through prime_kernels._native.";
  m.attr("FLOAT32") = static_cast<int>(PK_FLOAT32);
  m.attr("BFLOAT16") = static_cast<int>(PK_BFLOAT16);
  m.attr("FLOAT16") = static_cast<int>(PK_FLOAT16);
  pk::row_kernels();  // an instruction set that is not there stops the import, not the first kernel
  m.def("build_info", &build_info);
  bind_rows(m, "log_probs_forward", &forward_args, &pk_cpu_log_probs_forward, PK_ON_CUDA(pk_cuda_log_probs_forward));
  bind_rows(m, "log_probs_backward", &backward_args, &pk_cpu_log_probs_backward,
            PK_ON_CUDA(pk_cuda_log_probs_backward));
  bind_segment_scan(m, &scan_args);
  bind_segments(m);
  bind_rloo(m);
  bind_ppo(m, &ppo_args);
}
