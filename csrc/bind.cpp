// The only pybind11 file. Kernels take their arguments by keyword: the name in Python is the name of the struct's
// member, addresses are integers, and every member listed here must be given. The GIL is released around the kernel,
// and a status other than PK_OK becomes an exception. Shapes, devices and lifetimes are checked in
// prime_kernels/_native.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "cpu/isa.h"
#include "cpu/pages.h"
#include "pk/abi.h"

namespace py = pybind11;

namespace {

// --- members by name -------------------------------------------------------------------------------------------------

template <typename T>
void assign(T& member, py::handle value) {
  if constexpr (std::is_pointer_v<T>) {
    member = reinterpret_cast<T>(static_cast<uintptr_t>(PyLong_AsUnsignedLongLong(value.ptr())));
  } else if constexpr (std::is_floating_point_v<T>) {
    member = PyFloat_AsDouble(value.ptr());
  } else if constexpr (std::is_unsigned_v<T>) {
    member = PyLong_AsUnsignedLongLong(value.ptr());
  } else {
    const long long number = PyLong_AsLongLong(value.ptr());
    if (number < std::numeric_limits<T>::min() || number > std::numeric_limits<T>::max()) {
      PyErr_SetNone(PyExc_OverflowError);
      return;
    }
    member = static_cast<T>(number);
  }
}

template <typename Args>
struct Member {
  const char* name;
  void (*assign)(Args&, py::handle);
};

#define PK_MEMBER(Args, member) \
  Member<Args> { #member, [](Args& args, py::handle value) { assign(args.member, value); } }
// A member of the struct `inner` inside of Args.
#define PK_INNER(Args, inner, member) \
  Member<Args> { #member, [](Args& args, py::handle value) { assign(args.inner.member, value); } }

// The keyword arguments of one kernel.
template <typename Args>
class Keywords {
 public:
  Keywords(std::string kernel, const std::vector<Member<Args>>& members) : kernel_(std::move(kernel)) {
    for (const Member<Args>& member : members) {
      names_.push_back(py::reinterpret_steal<py::object>(PyUnicode_InternFromString(member.name)));
      assign_.push_back(member.assign);
    }
  }

  const std::string& kernel() const { return kernel_; }

  // `others` keywords of the call are none of these.
  Args read(const py::dict& given, size_t others = 0) const {
    Args args{};
    for (size_t i = 0; i < names_.size(); ++i) {
      assign_[i](args, value_of(given, names_[i]));
      if (PyErr_Occurred() != nullptr) throw_wrong(names_[i]);
    }
    if (given.size() != names_.size() + others) throw_unexpected(given);
    return args;
  }

  py::handle value_of(const py::dict& given, const py::object& name) const {
    PyObject* value = PyDict_GetItemWithError(given.ptr(), name.ptr());
    if (value == nullptr) throw py::type_error(kernel_ + ": missing argument " + std::string(py::str(name)));
    return value;
  }

 private:
  [[noreturn]] void throw_wrong(const py::object& name) const {
    PyErr_Clear();
    throw py::type_error(kernel_ + ": argument " + std::string(py::str(name)) + " has the wrong type or range");
  }

  [[noreturn]] void throw_unexpected(const py::dict& given) const {
    std::string known;
    for (const py::object& name : names_) known += " " + std::string(py::str(name));
    std::string got;
    for (const auto& item : given) got += " " + std::string(py::str(item.first));
    throw py::type_error(kernel_ + ": expected the arguments" + known + ", got" + got);
  }

  std::string kernel_;
  std::vector<py::object> names_;
  std::vector<void (*)(Args&, py::handle)> assign_;
};

// --- calls -----------------------------------------------------------------------------------------------------------

void raise_on(const std::string& kernel, int status) {
  if (status == PK_OK) return;
#ifdef PK_HAS_CUDA
  if (status == PK_CUDA_ERROR) throw std::runtime_error("prime_kernels: " + kernel + ": " + pk_cuda_error());
#endif
  throw py::value_error("prime_kernels: " + kernel + " rejected its arguments (status " + std::to_string(status) + ")");
}

template <typename Kernel, typename... Args>
int without_gil(Kernel kernel, Args... args) {
  py::gil_scoped_release release;
  return kernel(args...);
}

template <typename Args>
void bind_cpu(py::module_& m, const char* name, std::vector<Member<Args>> members, int (*kernel)(const Args*)) {
  m.def(name, [keywords = Keywords<Args>(name, members), kernel](const py::kwargs& given) {
    const Args args = keywords.read(given);
    raise_on(keywords.kernel(), without_gil(kernel, &args));
  });
}

// Log-prob kernels also report the row of a bad id, as ids are readable on the CPU.
template <typename Args>
void bind_cpu_rows(py::module_& m, const char* name, std::vector<Member<Args>> members, int (*kernel)(const Args*)) {
  members.push_back(PK_MEMBER(Args, n_threads));
  m.def(name, [keywords = Keywords<Args>(name, members), kernel](const py::kwargs& given) {
    Args args = keywords.read(given);
    int64_t bad_row = -1;
    args.bad_row = &bad_row;
    const int status = without_gil(kernel, &args);
    if (status == PK_BAD_INDEX) {
      throw py::index_error("ids[" + std::to_string(bad_row) + "] is " + std::to_string(args.ids[bad_row]) +
                            ", expected a value in [0, " + std::to_string(args.n_cols) + ")");
    }
    raise_on(keywords.kernel(), status);
  });
}

#ifdef PK_HAS_CUDA
template <typename Args>
void bind_cuda(py::module_& m, const char* name, std::vector<Member<Args>> members, int (*kernel)(const Args*, void*)) {
  const py::object stream = py::reinterpret_steal<py::object>(PyUnicode_InternFromString("stream"));
  m.def((std::string("cuda_") + name).c_str(),
        [keywords = Keywords<Args>(name, members), kernel, stream](const py::kwargs& given) {
          const Args args = keywords.read(given, 1);
          void* on = nullptr;
          assign(on, keywords.value_of(given, stream));
          if (PyErr_Occurred() != nullptr) throw py::error_already_set();
          raise_on(keywords.kernel(), without_gil(kernel, &args, on));
        });
}
#endif

template <typename Args>
std::vector<Member<Args>> operator+(std::vector<Member<Args>> members, const std::vector<Member<Args>>& more) {
  members.insert(members.end(), more.begin(), more.end());
  return members;
}

// --- kernels ---------------------------------------------------------------------------------------------------------

using Model = pk_log_probs_model;

void assign_models(pk_log_probs_args& args, py::handle models) {
  static const auto* keywords = new Keywords<Model>(
      "log_probs_forward: models",
      {PK_MEMBER(Model, logits), PK_MEMBER(Model, stride), PK_MEMBER(Model, dtype), PK_MEMBER(Model, temperature),
       PK_MEMBER(Model, logp), PK_MEMBER(Model, lse), PK_MEMBER(Model, entropy)});
  for (const py::handle model : models) {
    if (args.n_models == PK_MAX_MODELS) throw py::value_error("log_probs_forward: models: expected at most 3");
    args.models[args.n_models++] = keywords->read(py::reinterpret_borrow<py::dict>(model));
  }
}

void bind_rows(py::module_& m) {
  using Forward = pk_log_probs_args;
  const std::vector<Member<Forward>> forward = {{"models", &assign_models},   PK_MEMBER(Forward, ids),
                                                PK_MEMBER(Forward, mask),     PK_MEMBER(Forward, n_rows),
                                                PK_MEMBER(Forward, n_cols)};
  using Backward = pk_log_probs_grad_args;
  const std::vector<Member<Backward>> backward = {
      PK_MEMBER(Backward, logits),  PK_MEMBER(Backward, logits_stride), PK_MEMBER(Backward, dtype),
      PK_MEMBER(Backward, ids),     PK_MEMBER(Backward, mask),          PK_MEMBER(Backward, n_rows),
      PK_MEMBER(Backward, n_cols),  PK_MEMBER(Backward, temperature),   PK_MEMBER(Backward, lse),
      PK_MEMBER(Backward, entropy), PK_MEMBER(Backward, grad_logp),     PK_MEMBER(Backward, grad_entropy),
      PK_MEMBER(Backward, out),     PK_MEMBER(Backward, out_stride),    PK_MEMBER(Backward, out_dtype),
      PK_MEMBER(Backward, partial)};
  bind_cpu_rows(m, "log_probs_forward", forward, &pk_cpu_log_probs_forward);
  bind_cpu_rows(m, "log_probs_backward", backward, &pk_cpu_log_probs_backward);
  using Search = pk_candidates_args;
  const std::vector<Member<Search>> search = {
      PK_MEMBER(Search, logits), PK_MEMBER(Search, stride), PK_MEMBER(Search, dtype),
      PK_MEMBER(Search, ids), PK_MEMBER(Search, mask), PK_MEMBER(Search, n_rows),
      PK_MEMBER(Search, n_cols), PK_MEMBER(Search, temperature), PK_MEMBER(Search, log_min_prob),
      PK_MEMBER(Search, n_slots), PK_MEMBER(Search, logp), PK_MEMBER(Search, lse),
      PK_MEMBER(Search, found_ids), PK_MEMBER(Search, found)};
  bind_cpu_rows(m, "candidates", search, &pk_cpu_candidates);
#ifdef PK_HAS_CUDA
  bind_cuda(m, "log_probs_forward", forward, &pk_cuda_log_probs_forward);
  bind_cuda(m, "log_probs_backward", backward, &pk_cuda_log_probs_backward);
  bind_cuda(m, "candidates", search, &pk_cuda_candidates);
#endif
}

template <typename Args>
std::vector<Member<Args>> head_members() {
  return {PK_INNER(Args, head, hidden),       PK_INNER(Args, head, hidden_stride), PK_INNER(Args, head, weight),
          PK_INNER(Args, head, weight_stride), PK_INNER(Args, head, bias),         PK_INNER(Args, head, dtype),
          PK_INNER(Args, head, rounded),      PK_INNER(Args, head, n_tokens),      PK_INNER(Args, head, n_vocabulary),
          PK_INNER(Args, head, depth),        PK_INNER(Args, head, temperature),   PK_INNER(Args, head, softcap),
          PK_INNER(Args, head, ids),          PK_INNER(Args, head, n_ids),         PK_INNER(Args, head, kept),
          PK_INNER(Args, head, n_threads)};
}

void bind_heads(py::module_& m) {
  using Forward = pk_head_forward_args;
  bind_cpu(m, "head_forward",
           head_members<Forward>() +
               std::vector{PK_MEMBER(Forward, logp), PK_MEMBER(Forward, lse), PK_MEMBER(Forward, entropy)},
           &pk_cpu_head_forward);
  using Search = pk_head_candidates_args;
  bind_cpu(m, "head_candidates",
           head_members<Search>() + std::vector{PK_MEMBER(Search, logp), PK_MEMBER(Search, lse),
                                                PK_MEMBER(Search, log_min_prob), PK_MEMBER(Search, n_slots),
                                                PK_MEMBER(Search, found_ids), PK_MEMBER(Search, found)},
           &pk_cpu_head_candidates);
  using Backward = pk_head_backward_args;
  bind_cpu(m, "head_backward",
           head_members<Backward>() +
               std::vector{PK_MEMBER(Backward, lse), PK_MEMBER(Backward, entropy), PK_MEMBER(Backward, grad_logp),
                           PK_MEMBER(Backward, grad_entropy), PK_MEMBER(Backward, grad_hidden),
                           PK_MEMBER(Backward, grad_weight), PK_MEMBER(Backward, grad_bias)},
           &pk_cpu_head_backward);
  m.def("head_kept_floats", &pk_cpu_head_kept_floats, py::kw_only(), py::arg("n_tokens"), py::arg("n_vocabulary"),
        py::arg("depth"), py::arg("dtype"));
}

void bind_segments(py::module_& m) {
  using Scan = pk_segment_scan_args;
  const std::vector<Member<Scan>> scan = {
      PK_MEMBER(Scan, values), PK_MEMBER(Scan, cu_seqlens), PK_MEMBER(Scan, n_segments), PK_MEMBER(Scan, n_tokens),
      PK_MEMBER(Scan, gamma),  PK_MEMBER(Scan, dtype),      PK_MEMBER(Scan, reverse),    PK_MEMBER(Scan, factor),
      PK_MEMBER(Scan, out)};
  using Sum = pk_segment_sum_args;
  const std::vector<Member<Sum>> sum = {PK_MEMBER(Sum, values), PK_MEMBER(Sum, cu_seqlens), PK_MEMBER(Sum, n_segments),
                                        PK_MEMBER(Sum, n_tokens), PK_MEMBER(Sum, out)};
  using Fill = pk_segment_fill_args;
  const std::vector<Member<Fill>> fill = {PK_MEMBER(Fill, values),     PK_MEMBER(Fill, factor),
                                          PK_MEMBER(Fill, cu_seqlens), PK_MEMBER(Fill, n_segments),
                                          PK_MEMBER(Fill, n_tokens),   PK_MEMBER(Fill, out)};
  using Pack = pk_pack_args;
  const std::vector<Member<Pack>> pack = {
      PK_MEMBER(Pack, in),       PK_MEMBER(Pack, out),    PK_MEMBER(Pack, cu_seqlens), PK_MEMBER(Pack, n_rows),
      PK_MEMBER(Pack, n_tokens), PK_MEMBER(Pack, length), PK_MEMBER(Pack, width),      PK_MEMBER(Pack, itemsize),
      PK_MEMBER(Pack, pad_left), PK_MEMBER(Pack, fill)};
  bind_cpu(m, "segment_scan", scan + std::vector{PK_MEMBER(Scan, n_threads)}, &pk_cpu_segment_scan);
  bind_cpu(m, "segment_sum", sum + std::vector{PK_MEMBER(Sum, n_threads)}, &pk_cpu_segment_sum);
  bind_cpu(m, "segment_fill", fill + std::vector{PK_MEMBER(Fill, n_threads)}, &pk_cpu_segment_fill);
  bind_cpu(m, "pack", pack + std::vector{PK_MEMBER(Pack, n_threads)}, &pk_cpu_pack);
  bind_cpu(m, "unpack", pack + std::vector{PK_MEMBER(Pack, n_threads)}, &pk_cpu_unpack);
#ifdef PK_HAS_CUDA
  bind_cuda(m, "segment_scan", scan + std::vector{PK_MEMBER(Scan, published)}, &pk_cuda_segment_scan);
  bind_cuda(m, "segment_sum", sum + std::vector{PK_MEMBER(Sum, published), PK_MEMBER(Sum, arrived)},
            &pk_cuda_segment_sum);
  bind_cuda(m, "segment_fill", fill, &pk_cuda_segment_fill);
  bind_cuda(m, "pack", pack, &pk_cuda_pack);
  bind_cuda(m, "unpack", pack, &pk_cuda_unpack);
#endif
}

void bind_rloo(py::module_& m) {
  using Sums = pk_rloo_sums_args;
  bind_cpu(m, "rloo_sums",
           std::vector{PK_MEMBER(Sums, rewards), PK_MEMBER(Sums, mask), PK_MEMBER(Sums, cu_seqlens),
                       PK_MEMBER(Sums, n_responses), PK_MEMBER(Sums, n_tokens), PK_MEMBER(Sums, sums),
                       PK_MEMBER(Sums, counts), PK_MEMBER(Sums, largest), PK_MEMBER(Sums, n_threads)},
           &pk_cpu_rloo_sums);
  using Returns = pk_rloo_returns_args;
  bind_cpu(m, "rloo_returns",
           std::vector{PK_MEMBER(Returns, rewards), PK_MEMBER(Returns, mask), PK_MEMBER(Returns, cu_seqlens),
                       PK_MEMBER(Returns, n_responses), PK_MEMBER(Returns, n_tokens), PK_MEMBER(Returns, scale),
                       PK_MEMBER(Returns, shift), PK_MEMBER(Returns, outcomes), PK_MEMBER(Returns, gamma_process),
                       PK_MEMBER(Returns, gamma_outcome), PK_MEMBER(Returns, process_coef),
                       PK_MEMBER(Returns, outcome_coef), PK_MEMBER(Returns, out), PK_MEMBER(Returns, moments),
                       PK_MEMBER(Returns, n_threads)},
           &pk_cpu_rloo_returns);
  using Whiten = pk_whiten_args;
  const std::vector<Member<Whiten>> whiten = {PK_MEMBER(Whiten, values), PK_MEMBER(Whiten, n_tokens),
                                              PK_MEMBER(Whiten, moments), PK_MEMBER(Whiten, n_parts),
                                              PK_MEMBER(Whiten, out)};
  bind_cpu(m, "whiten", whiten + std::vector{PK_MEMBER(Whiten, n_threads)}, &pk_cpu_whiten);
#ifdef PK_HAS_CUDA
  using Check = pk_cuda_rloo_check_args;
  bind_cuda(m, "rloo_check",
            std::vector{PK_MEMBER(Check, rewards), PK_MEMBER(Check, mask), PK_MEMBER(Check, outcomes),
                        PK_MEMBER(Check, cu_seqlens), PK_MEMBER(Check, cu_groups), PK_MEMBER(Check, n_responses),
                        PK_MEMBER(Check, n_groups), PK_MEMBER(Check, n_tokens)},
            &pk_cuda_rloo_check);
  using Rloo = pk_cuda_rloo_args;
  bind_cuda(m, "rloo_returns",
            std::vector{PK_MEMBER(Rloo, rewards), PK_MEMBER(Rloo, mask), PK_MEMBER(Rloo, outcomes),
                        PK_MEMBER(Rloo, cu_seqlens), PK_MEMBER(Rloo, cu_groups), PK_MEMBER(Rloo, n_responses),
                        PK_MEMBER(Rloo, n_groups), PK_MEMBER(Rloo, n_tokens), PK_MEMBER(Rloo, gamma_process),
                        PK_MEMBER(Rloo, gamma_outcome), PK_MEMBER(Rloo, process_coef), PK_MEMBER(Rloo, outcome_coef),
                        PK_MEMBER(Rloo, normalize_process), PK_MEMBER(Rloo, paper_baseline),
                        PK_MEMBER(Rloo, with_sums), PK_MEMBER(Rloo, with_returns), PK_MEMBER(Rloo, largest),
                        PK_MEMBER(Rloo, moments), PK_MEMBER(Rloo, workspace), PK_MEMBER(Rloo, out),
                        PK_MEMBER(Rloo, n_blocks)},
            &pk_cuda_rloo_returns);
  bind_cuda(m, "whiten", whiten, &pk_cuda_whiten);
#endif
}

template <typename Args>
std::vector<Member<Args>> ppo_tokens() {
  return {PK_INNER(Args, tokens, logp),     PK_INNER(Args, tokens, old_logp), PK_INNER(Args, tokens, advantages),
          PK_INNER(Args, tokens, mask),     PK_INNER(Args, tokens, weights),  PK_INNER(Args, tokens, n_tokens),
          PK_INNER(Args, tokens, clip_low), PK_INNER(Args, tokens, clip_high), PK_INNER(Args, tokens, ceiling)};
}

void bind_losses(py::module_& m) {
  using Ppo = pk_ppo_args;
  const std::vector<Member<Ppo>> forward =
      ppo_tokens<Ppo>() + std::vector{PK_MEMBER(Ppo, denominator), PK_MEMBER(Ppo, denominator_value),
                                      PK_MEMBER(Ppo, scale), PK_MEMBER(Ppo, results)};
  using Grad = pk_ppo_grad_args;
  const std::vector<Member<Grad>> backward =
      ppo_tokens<Grad>() + std::vector{PK_MEMBER(Grad, scale), PK_MEMBER(Grad, grad), PK_MEMBER(Grad, out)};
  bind_cpu(m, "ppo_loss", forward + std::vector{PK_INNER(Ppo, tokens, n_threads)}, &pk_cpu_ppo_loss);
  bind_cpu(m, "ppo_loss_backward", backward + std::vector{PK_INNER(Grad, tokens, n_threads)},
           &pk_cpu_ppo_loss_backward);
  using Prefix = pk_prefix_args;
  const std::vector<Member<Prefix>> prefix = {
      PK_MEMBER(Prefix, log_ratio),   PK_MEMBER(Prefix, outcomes), PK_MEMBER(Prefix, cu_seqlens),
      PK_MEMBER(Prefix, weights),     PK_MEMBER(Prefix, shift),    PK_MEMBER(Prefix, n_tokens),
      PK_MEMBER(Prefix, n_responses), PK_MEMBER(Prefix, beta),     PK_MEMBER(Prefix, margin),
      PK_MEMBER(Prefix, scores),      PK_MEMBER(Prefix, slope)};
  bind_cpu(m, "prefix_loss", prefix + std::vector{PK_MEMBER(Prefix, losses), PK_MEMBER(Prefix, n_threads)},
           &pk_cpu_prefix_loss);
#ifdef PK_HAS_CUDA
  bind_cuda(m, "ppo_loss", forward + std::vector{PK_MEMBER(Ppo, sums), PK_MEMBER(Ppo, arrived)}, &pk_cuda_ppo_loss);
  bind_cuda(m, "ppo_loss_backward", backward, &pk_cuda_ppo_loss_backward);
  using Prm = pk_prm_args;
  bind_cuda(m, "prm_loss",
            std::vector{PK_MEMBER(Prm, log_ratio), PK_MEMBER(Prm, outcomes), PK_MEMBER(Prm, cu_seqlens),
                        PK_MEMBER(Prm, cu_groups), PK_MEMBER(Prm, n_tokens), PK_MEMBER(Prm, n_responses),
                        PK_MEMBER(Prm, n_groups), PK_MEMBER(Prm, weights), PK_MEMBER(Prm, shift), PK_MEMBER(Prm, beta),
                        PK_MEMBER(Prm, kind), PK_MEMBER(Prm, delta), PK_MEMBER(Prm, slope), PK_MEMBER(Prm, results),
                        PK_MEMBER(Prm, published), PK_MEMBER(Prm, arrived)},
            &pk_cuda_prm_loss);
  bind_cuda(m, "prefix_loss",
            prefix + std::vector{PK_MEMBER(Prefix, cu_groups), PK_MEMBER(Prefix, n_groups), PK_MEMBER(Prefix, results),
                                 PK_MEMBER(Prefix, published), PK_MEMBER(Prefix, sums), PK_MEMBER(Prefix, arrived)},
            &pk_cuda_prefix_loss);
#endif
}

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

// Memory as torch.frombuffer takes it.
struct Memory {
  pk::Pages pages;
  int64_t bytes;
  explicit Memory(int64_t size) : pages(size), bytes(size) {}
};

void bind_memory(py::module_& m) {
  py::class_<Memory>(m, "Memory", py::buffer_protocol()).def(py::init<int64_t>()).def_buffer([](Memory& memory) {
    return py::buffer_info(reinterpret_cast<uint8_t*>(memory.pages.begin()), static_cast<py::ssize_t>(memory.bytes));
  });
  m.def("release_spare_memory", &pk::release_spare_pages);
  m.attr("LEAST_MEMORY") = pk::kLeastPages;
}

void bind_constants(py::module_& m) {
  m.attr("FLOAT32") = static_cast<int>(PK_FLOAT32);
  m.attr("BFLOAT16") = static_cast<int>(PK_BFLOAT16);
  m.attr("FLOAT16") = static_cast<int>(PK_FLOAT16);
  m.attr("FLOAT64") = static_cast<int>(PK_FLOAT64);
  m.attr("NORMALIZE_EPS") = PK_NORMALIZE_EPS;
  m.attr("WHITEN_EPS") = PK_WHITEN_EPS;
  m.attr("MAX_LOG_RHO") = PK_MAX_LOG_RHO;
  m.attr("MAX_BLOCKS") = static_cast<int>(PK_MAX_BLOCKS);
  m.attr("RLOO_WORKSPACE") = static_cast<int>(PK_RLOO_WORKSPACE);
  py::dict kinds;
  kinds["ce"] = static_cast<int>(PK_PRM_CE);
  kinds["dpo"] = static_cast<int>(PK_PRM_DPO);
  kinds["kto"] = static_cast<int>(PK_PRM_KTO);
  kinds["nca"] = static_cast<int>(PK_PRM_NCA);
  kinds["prefix"] = static_cast<int>(PK_PRM_PREFIX);
  m.attr("PRM_KINDS") = kinds;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of prime_kernels; called through prime_kernels._native.";
  pk::cpu_isa();  // an unavailable instruction set fails the import, not the first kernel
  m.def("build_info", &build_info);
  bind_constants(m);
  bind_memory(m);
  bind_rows(m);
  bind_heads(m);
  bind_segments(m);
  bind_rloo(m);
  bind_losses(m);
}
