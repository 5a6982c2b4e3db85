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
#include "cpu/isa.h"

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

void bind_head(py::module_& m) {
  py::class_<pk_head>(m, "Head")
      .def(py::init([](uintptr_t hidden, int64_t hidden_stride, uintptr_t weight, int64_t weight_stride, uintptr_t bias,
                       int dtype, bool round, int64_t n_tokens, int64_t n_vocabulary, int64_t depth, double temperature,
                       uintptr_t ids, uintptr_t kept) {
             return pk_head{pointer<const void>(hidden), hidden_stride, pointer<const void>(weight), weight_stride,
                            pointer<const void>(bias), dtype, round ? 1 : 0, n_tokens, n_vocabulary, depth, temperature,
                            pointer<const int64_t>(ids), pointer<float>(kept), 1};
           }),
           py::kw_only(), py::arg("hidden"), py::arg("hidden_stride"), py::arg("weight"), py::arg("weight_stride"),
           py::arg("bias"), py::arg("dtype"), py::arg("round"), py::arg("n_tokens"), py::arg("n_vocabulary"),
           py::arg("depth"), py::arg("temperature"), py::arg("ids"), py::arg("kept"));
  m.def("head_kept_floats", &pk_cpu_head_kept_floats, py::arg("n_tokens"), py::arg("n_vocabulary"), py::arg("depth"),
        py::arg("dtype"));
  m.def("head_forward", [](pk_head head, uintptr_t logp, uintptr_t lse, uintptr_t entropy, int n_threads) {
    head.n_threads = n_threads;
    const pk_head_forward_args args{head, pointer<float>(logp), pointer<float>(lse), pointer<float>(entropy)};
    raise_on(call(pk_cpu_head_forward, &args));
  });
  m.def("head_backward", [](pk_head head, uintptr_t lse, uintptr_t entropy, uintptr_t grad_logp, uintptr_t grad_entropy,
                            uintptr_t grad_hidden, uintptr_t grad_weight, uintptr_t grad_bias, int n_threads) {
    head.n_threads = n_threads;
    const pk_head_backward_args args{head,
                                     pointer<const float>(lse),
                                     pointer<const float>(entropy),
                                     pointer<const float>(grad_logp),
                                     pointer<const float>(grad_entropy),
                                     pointer<void>(grad_hidden),
                                     pointer<void>(grad_weight),
                                     pointer<void>(grad_bias)};
    raise_on(call(pk_cpu_head_backward, &args));
  });
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

pk_segment_scan_args scan_args(uintptr_t values, uintptr_t cu, int64_t n_segments, int64_t n_tokens, double gamma,
                               bool wide, bool reverse, uintptr_t out) {
  pk_segment_scan_args args{};
  args.values = pointer<const void>(values);
  args.cu_seqlens = pointer<const int64_t>(cu);
  args.n_segments = n_segments;
  args.n_tokens = n_tokens;
  args.gamma = gamma;
  args.dtype = wide ? PK_FLOAT64 : PK_FLOAT32;
  args.reverse = reverse ? 1 : 0;
  args.out = pointer<void>(out);
  return args;
}

pk_pack_args pack_args(uintptr_t in, uintptr_t out, uintptr_t cu, int64_t n_rows, int64_t n_tokens, int64_t length,
                       int64_t width, int itemsize, bool left, uint64_t fill) {
  pk_pack_args args{};
  args.in = pointer<const void>(in);
  args.out = pointer<void>(out);
  args.cu_seqlens = pointer<const int64_t>(cu);
  args.n_rows = n_rows;
  args.n_tokens = n_tokens;
  args.length = length;
  args.width = width;
  args.itemsize = itemsize;
  args.left = left ? 1 : 0;
  args.fill = fill;
  return args;
}

template <typename Args, typename... Fields>
void bind_on_cpu(py::module_& m, const char* name, Args (*build)(Fields...), int (*kernel)(const Args*)) {
  m.def(name, [build, kernel](Fields... fields, int n_threads) {
    Args args = build(fields...);
    args.n_threads = n_threads;
    raise_on(call(kernel, &args));
  });
}

void bind_segments(py::module_& m) {
  bind_on_cpu(m, "segment_scan", &scan_args, &pk_cpu_segment_scan);
  bind_on_cpu(m, "pack", &pack_args, &pk_cpu_pack);
  bind_on_cpu(m, "unpack", &pack_args, &pk_cpu_unpack);
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

void bind_ppo(py::module_& m) {
  m.def("ppo_loss", [](uintptr_t logp, uintptr_t old_logp, uintptr_t advantages, uintptr_t mask, uintptr_t weights,
                       int64_t n_tokens, double clip_low, double clip_high, uintptr_t sums, int n_threads) {
    pk_ppo_args args = ppo_args(logp, old_logp, advantages, mask, weights, n_tokens, clip_low, clip_high);
    args.n_threads = n_threads;
    raise_on(call(pk_cpu_ppo_loss, &args, pointer<double>(sums)));
  });
  m.def("ppo_loss_backward", [](uintptr_t logp, uintptr_t old_logp, uintptr_t advantages, uintptr_t mask,
                                uintptr_t weights, int64_t n_tokens, double clip_low, double clip_high, double factor,
                                uintptr_t out, int n_threads) {
    pk_ppo_args args = ppo_args(logp, old_logp, advantages, mask, weights, n_tokens, clip_low, clip_high);
    args.n_threads = n_threads;
    raise_on(call(pk_cpu_ppo_loss_backward, &args, factor, pointer<float>(out)));
  });
}

#ifdef PK_HAS_CUDA
void bind_cuda(py::module_& m) {
  m.attr("MAX_BLOCKS") = static_cast<int>(PK_MAX_BLOCKS);
  m.attr("RLOO_WORKSPACE") = static_cast<int>(PK_RLOO_WORKSPACE);
  m.def("cuda_segment_scan", [](uintptr_t values, uintptr_t cu, int64_t n_segments, int64_t n_tokens, double gamma,
                                bool wide, bool reverse, uintptr_t out, uintptr_t workspace, uintptr_t stream) {
    pk_segment_scan_args args = scan_args(values, cu, n_segments, n_tokens, gamma, wide, reverse, out);
    args.workspace = pointer<void>(workspace);
    raise_on(call(pk_cuda_segment_scan, &args, pointer<void>(stream)));
  });
  m.def("cuda_segment_sum", [](uintptr_t values, uintptr_t cu, int64_t n_segments, int64_t n_tokens, uintptr_t out,
                               uintptr_t left, uintptr_t arrived, uintptr_t stream) {
    raise_on(call(pk_cuda_segment_sum, pointer<const float>(values), pointer<const int64_t>(cu), n_segments, n_tokens,
                  pointer<double>(out), pointer<pk_block_left>(left), pointer<uint32_t>(arrived),
                  pointer<void>(stream)));
  });
  m.def("cuda_segment_fill", [](uintptr_t values, uintptr_t factor, uintptr_t cu, int64_t n_segments, int64_t n_tokens,
                                uintptr_t out, uintptr_t stream) {
    raise_on(call(pk_cuda_segment_fill, pointer<const double>(values), pointer<const float>(factor),
                  pointer<const int64_t>(cu), n_segments, n_tokens, pointer<float>(out), pointer<void>(stream)));
  });
  for (const auto& [name, kernel] : {std::pair{"cuda_pack", &pk_cuda_pack}, std::pair{"cuda_unpack", &pk_cuda_unpack}}) {
    m.def(name, [kernel = kernel](uintptr_t in, uintptr_t out, uintptr_t cu, int64_t n_rows, int64_t n_tokens,
                                  int64_t length, int64_t width, int itemsize, bool left, uint64_t fill,
                                  uintptr_t stream) {
      const pk_pack_args args = pack_args(in, out, cu, n_rows, n_tokens, length, width, itemsize, left, fill);
      raise_on(call(kernel, &args, pointer<void>(stream)));
    });
  }
  m.def("cuda_rloo_returns", [](uintptr_t rewards, uintptr_t mask, uintptr_t outcomes, uintptr_t cu_seqlens,
                                uintptr_t cu_groups, int64_t n_responses, int64_t n_groups, int64_t n_tokens,
                                double gamma_process, double gamma_outcome, double process_coef, double outcome_coef,
                                bool normalize_process, bool paper_baseline, bool moments, bool returns,
                                uintptr_t largest, uintptr_t stats, uintptr_t workspace, uintptr_t out,
                                uintptr_t stream) {
    pk_cuda_rloo_args args{};
    args.tokens = rloo_args(rewards, mask, cu_seqlens, n_responses, n_tokens);
    args.tokens.gamma_process = gamma_process;
    args.tokens.gamma_outcome = gamma_outcome;
    args.tokens.process_coef = process_coef;
    args.tokens.outcome_coef = outcome_coef;
    args.tokens.out = pointer<float>(out);
    args.outcomes = pointer<const double>(outcomes);
    args.cu_groups = pointer<const int64_t>(cu_groups);
    args.n_groups = n_groups;
    args.normalize_process = normalize_process ? 1 : 0;
    args.paper_baseline = paper_baseline ? 1 : 0;
    args.moments = moments ? 1 : 0;
    args.returns = returns ? 1 : 0;
    args.largest = pointer<double>(largest);
    args.stats = pointer<double>(stats);
    args.workspace = pointer<void>(workspace);
    int64_t blocks = 0;
    raise_on(call(pk_cuda_rloo_returns, &args, pointer<void>(stream), &blocks));
    return blocks;
  });
  m.def("cuda_whiten", [](uintptr_t values, int64_t n, uintptr_t stats, int64_t rows, uintptr_t out, uintptr_t stream) {
    raise_on(call(pk_cuda_whiten, pointer<const float>(values), n, pointer<const double>(stats), rows,
                  pointer<float>(out), pointer<void>(stream)));
  });
  m.def("cuda_ppo_loss", [](uintptr_t logp, uintptr_t old_logp, uintptr_t advantages, uintptr_t mask, uintptr_t weights,
                            int64_t n_tokens, double clip_low, double clip_high, uintptr_t denominator,
                            double denominator_value, uintptr_t results, uintptr_t scale, uintptr_t sums,
                            uintptr_t arrived, uintptr_t stream) {
    const pk_ppo_args args = ppo_args(logp, old_logp, advantages, mask, weights, n_tokens, clip_low, clip_high);
    auto* result = pointer<float>(results);
    const pk_ppo_results to{pointer<double>(sums), pointer<uint32_t>(arrived), pointer<const double>(denominator),
                            denominator_value, pointer<double>(scale), result, result + 1, result + 2};
    raise_on(call(pk_cuda_ppo_loss, &args, &to, pointer<void>(stream)));
  });
  m.def("cuda_ppo_loss_backward", [](uintptr_t logp, uintptr_t old_logp, uintptr_t advantages, uintptr_t mask,
                                     uintptr_t weights, int64_t n_tokens, double clip_low, double clip_high,
                                     uintptr_t scale, uintptr_t grad, uintptr_t out, uintptr_t stream) {
    const pk_ppo_args args = ppo_args(logp, old_logp, advantages, mask, weights, n_tokens, clip_low, clip_high);
    raise_on(call(pk_cuda_ppo_loss_backward, &args, pointer<const double>(scale), pointer<const float>(grad),
                  pointer<float>(out), pointer<void>(stream)));
  });
  m.def("cuda_prm_loss", [](uintptr_t log_ratio, uintptr_t outcomes, uintptr_t cu_seqlens, uintptr_t cu_groups,
                            int64_t n_tokens, int64_t n_responses, int64_t n_groups, double beta, int kind,
                            uintptr_t delta, uintptr_t slope, uintptr_t left, uintptr_t arrived, uintptr_t results,
                            uintptr_t stream) {
    auto* result = pointer<float>(results);
    const pk_prm_args args{pointer<const float>(log_ratio), pointer<const double>(outcomes),
                           pointer<const int64_t>(cu_seqlens), pointer<const int64_t>(cu_groups), n_tokens, n_responses,
                           n_groups, beta, kind, pointer<double>(delta), pointer<double>(slope),
                           pointer<pk_block_left>(left), pointer<uint32_t>(arrived), result, result + 1};
    raise_on(call(pk_cuda_prm_loss, &args, pointer<void>(stream)));
  });
}
#endif

py::dict build_info() {
  py::dict info;
  info["compiler"] = PK_BUILD_COMPILER;
  info["flags"] = PK_BUILD_FLAGS;
  info["cpu"] = pk::isa_name(pk::cpu_isa());
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
  pk::cpu_isa();  // an instruction set that is not there stops the import, not the first kernel
  m.def("build_info", &build_info);
  bind_rows(m, "log_probs_forward", &forward_args, &pk_cpu_log_probs_forward, PK_ON_CUDA(pk_cuda_log_probs_forward));
  bind_rows(m, "log_probs_backward", &backward_args, &pk_cpu_log_probs_backward,
            PK_ON_CUDA(pk_cuda_log_probs_backward));
  bind_head(m);
  bind_segments(m);
  bind_rloo(m);
  bind_ppo(m);
#ifdef PK_HAS_CUDA
  bind_cuda(m);
#endif
}
