// Gradients of log-probs and entropies by hidden states, output layer and bias. The vocabulary goes by in parts: the
// logits of a part are made again (or read, where the forward kept them), become their own gradient while they are in
// cache, and both products are taken from there. Sums are float32, over steps of tokens or vocabulary whose sizes do not
// depend on the number of threads; gradients of 16-bit inputs are rounded once.

#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "half.h"
#include "head_layout.h"
#include "pages.h"
#include "threads.h"

namespace pk {
namespace {

constexpr double kLn2 = 0.693147180559945309;
constexpr int64_t kPartRows = 1024;             // of the vocabulary, about
constexpr int64_t kGradientBytes = 4 << 20;     // of the gradients of a part's logits, about
constexpr int64_t kStripsOfTask = 16;           // packed or read again and again by one thread: they stay in its cache

double sum_of_ids(const pk_head_backward_args& args, int64_t token) {
  const int64_t n = args.head.n_ids;
  double sum = 0.0;
  for (int64_t i = token * n; args.grad_logp != nullptr && i < (token + 1) * n; ++i) sum += args.grad_logp[i];
  return sum;
}

// A token's gradient: d loss / dz of any column.
struct TokenGradients {
  Buffer bias, a, b;
  float scale, inverse_cap;

  TokenGradients(const pk_head_backward_args& args, int64_t padded) : bias(padded * 4), a(padded * 4), b(padded * 4) {
    const pk_head& head = args.head;
    scale = static_cast<float>(1.0 / (head.temperature * kLn2));
    inverse_cap = head.softcap == 0.0 ? 0.0f : static_cast<float>(1.0 / head.softcap);
    // What fills up the last panel has probability 0: its logits are those of the bias alone, which may be large.
    std::fill_n(bias.floats(), padded, -std::numeric_limits<float>::infinity());
    std::fill_n(a.floats(), padded, 0.0f);
    std::fill_n(b.floats(), padded, 0.0f);
    for (int64_t token = 0; token < head.n_tokens; ++token) {
      const double grad_logp = sum_of_ids(args, token);
      const double grad_entropy = args.grad_entropy == nullptr ? 0.0 : args.grad_entropy[token];
      const double entropy = args.grad_entropy == nullptr ? 0.0 : args.entropy[token];
      const double lse = args.lse[token];
      // As in log_probs.cpp: what rounding the bias took from log p goes back in through the factors.
      const float rounded = static_cast<float>(-lse / kLn2);
      const double residue = -lse - kLn2 * rounded;
      const double factor = -std::exp(residue) / head.temperature;
      bias.floats()[token] = rounded;
      a.floats()[token] = static_cast<float>(factor * (grad_logp + grad_entropy * (entropy + residue)));
      b.floats()[token] = static_cast<float>(factor * grad_entropy * kLn2);
    }
  }
  LaneGradient at(int64_t token, bool with_entropy) const {
    return {bias.floats(token), a.floats(token), with_entropy ? b.floats(token) : nullptr, scale,
            inverse_cap};
  }
};

// Of an id with logit z, d loss / dz in full; an id that comes several times has the sum of its gradients.
double target_gradient(const pk_head_backward_args& args, int64_t token, int64_t id, double z) {
  const int64_t n = args.head.n_ids;
  double own = 0.0;
  for (int64_t i = token * n; args.grad_logp != nullptr && i < (token + 1) * n; ++i) {
    if (args.head.ids[i] == id) own += args.grad_logp[i];
  }
  const double grad_logp = sum_of_ids(args, token);
  const double grad_entropy = args.grad_entropy == nullptr ? 0.0 : args.grad_entropy[token];
  const double entropy = args.grad_entropy == nullptr ? 0.0 : args.entropy[token];
  const double log_p = z / args.head.temperature - args.lse[token];
  const double p = std::exp(log_p);
  const double curvature = p == 0.0 ? 0.0 : p * (log_p + entropy);
  const double share = args.head.softcap == 0.0 ? 0.0 : z / args.head.softcap;
  // expm1: 1 - p has no digits left if p is near 1.
  return (own - grad_logp - grad_logp * std::expm1(log_p) - grad_entropy * curvature) / args.head.temperature * (1.0 - share * share);
}

class Backward {
 public:
  explicit Backward(const pk_head_backward_args& args)
      : args_(args),
        head_(args.head),
        layout_(head_.n_vocabulary, head_.depth, head_.dtype),
        kernels_(layout_.kernels),
        lanes_(kernels_.lanes),
        size_(kernels_.operand_bytes),
        part_blocks_(std::min(layout_.n_blocks, std::max<int64_t>(1, kPartRows / layout_.block))),
        part_(part_blocks_ * layout_.block),
        // An odd number of cache lines from panel to panel: the same row of many panels is read together.
        panel_stride_((part_ + 5) * lanes_),
        chunk_panels_(std::min(layout_.panels(head_.n_tokens),
                               std::max<int64_t>(1, kGradientBytes / (part_ * lanes_ * size_)))),
        n_panels_(layout_.panels(head_.n_tokens)),
        depth_strips_(blocks_of(head_.depth, kernels_.rows)),
        depth_panels_(blocks_of(head_.depth, lanes_)),
        threads_(thread_count(head_.n_threads, n_panels_ * part_blocks_, head_.n_tokens * head_.n_vocabulary)),
        gradients_(args, n_panels_ * lanes_),
        ids_(head_, layout_, 0, head_.n_tokens),
        rows_(chunk_panels_ * panel_stride_ * size_),
        pairs_(size_ == 2 ? chunk_panels_ * panel_stride_ * size_ : 0),
        panels_(head_.kept == nullptr ? chunk_panels_ * layout_.panel_bytes() : 0),
        columns_(args.grad_weight == nullptr ? 0 : depth_panels_ * n_panels_ * lanes_ * lanes_ * size_),
        of_hidden_(args.grad_hidden == nullptr ? 0 : n_panels_ * depth_strips_ * kernels_.rows * lanes_ * 4),
        of_weight_(args.grad_weight == nullptr ? 0 : part_ * depth_panels_ * lanes_ * 4),
        of_bias_(part_ * 4) {
    if (args.grad_weight != nullptr) {
      ask_for_huge_pages(args.grad_weight, head_.n_vocabulary * head_.depth * (head_.dtype == PK_FLOAT32 ? 4 : 2));
    }
    const int64_t scratch = std::max(layout_.tile_floats() * 4, kStripsOfTask * kernels_.rows * kMaxDepth * size_);
    for (int thread = 0; thread < threads_; ++thread) {
      blocks_.push_back(std::make_unique<BlockLogits>(head_, layout_));
      scratch_.push_back(std::make_unique<Buffer>(std::max(scratch, head_.depth * 4)));
    }
  }

  void run() {
#pragma omp parallel num_threads(threads_) if (threads_ > 1)
    {
      const Session session(kernels_);
      if (args_.grad_hidden != nullptr) clear_hidden();
      if (args_.grad_weight != nullptr) pack_columns();
      for (int64_t first = 0; first < layout_.n_blocks; first += part_blocks_) {
        const int64_t n_blocks = std::min(part_blocks_, layout_.n_blocks - first);
        for (int64_t panel = 0; panel < n_panels_; panel += chunk_panels_) {
          const int64_t count = std::min(chunk_panels_, n_panels_ - panel);
          if (head_.kept == nullptr && (first == 0 || count < n_panels_)) pack_panels(panel, count);
          logit_gradients(first, n_blocks, panel, count);
          if (args_.grad_hidden != nullptr) add_to_hidden(first * layout_.block, n_blocks * layout_.block, panel, count);
          if (args_.grad_weight != nullptr) add_to_weight(n_blocks * layout_.block, panel, count);
          if (args_.grad_bias != nullptr) add_to_bias(n_blocks * layout_.block, panel, count);
        }
        write_weight(first * layout_.block, n_blocks * layout_.block);
      }
      if (args_.grad_hidden != nullptr) write_hidden();
    }
  }

 private:
  char* row(int64_t panel, int64_t row) const { return rows_.bytes((panel * panel_stride_ + row * lanes_) * size_); }
  // Rows as an operand whose k is the vocabulary.
  char* pair(int64_t panel, int64_t row) const {
    return size_ == 4 ? this->row(panel, row) : pairs_.bytes((panel * panel_stride_ + row * lanes_) * size_);
  }
  float* hidden_sums(int64_t panel, int64_t row) const {
    return of_hidden_.floats((panel * depth_strips_ * kernels_.rows + row) * lanes_);
  }
  float* weight_sums(int64_t row) const { return of_weight_.floats(row * depth_panels_ * lanes_); }
  char* columns_of_tokens(int64_t depth_panel, int64_t panel) const {
    return columns_.bytes((depth_panel * n_panels_ + panel) * lanes_ * lanes_ * size_);
  }
  Buffer& scratch() const { return *scratch_[static_cast<size_t>(thread_index())]; }
  // Tasks of a loop over `total` things that each hold `size` of them, or fewer for every thread to have some.
  int64_t groups(int64_t total, int64_t others) const {
    return std::max<int64_t>(1, std::min(total, blocks_of(2 * threads_, std::max<int64_t>(1, others))));
  }

  void clear_hidden() const {
#pragma omp for schedule(static)
    for (int64_t panel = 0; panel < n_panels_; ++panel) {
      std::fill_n(hidden_sums(panel, 0), depth_strips_ * kernels_.rows * lanes_, 0.0f);
    }
  }

  void pack_columns() const {
#pragma omp for schedule(static)
    for (int64_t column = 0; column < depth_panels_; ++column) {
      kernels_.panel_of_columns(hidden_of(head_), column * lanes_, 0, n_panels_ * lanes_, columns_of_tokens(column, 0));
    }
  }

  void pack_panels(int64_t first, int64_t count) const {
#pragma omp for schedule(static)
    for (int64_t panel = 0; panel < count; ++panel) {
      kernels_.panel_of_rows(hidden_of(head_), (first + panel) * lanes_, 0, layout_.depth,
                             panels_.bytes(panel * layout_.panel_bytes()));
    }
  }

  void logit_gradients(int64_t first_block, int64_t n_blocks, int64_t first_panel, int64_t count) const {
    const int64_t n_groups = groups(count, n_blocks);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < n_blocks * n_groups; ++task) {
      const int64_t b = task / n_groups, group = task % n_groups;
      BlockLogits& block = *blocks_[static_cast<size_t>(thread_index())];
      block.take(first_block + b, head_.kept == nullptr);
      for (int64_t panel = count * group / n_groups; panel < count * (group + 1) / n_groups; ++panel) {
        float* tile = scratch().floats();
        if (head_.kept != nullptr) {
          tile = head_.kept + (first_panel + panel) * layout_.kept_floats() + (first_block + b) * layout_.tile_floats();
        } else {
          block.logits(panels_.bytes(panel * layout_.panel_bytes()), tile);
        }
        tile_gradient(block, tile, first_panel + panel, panel, b * layout_.block);
      }
    }
  }

  // The gradient of a tile, into rows [at, at + block) of a panel. Rows that fill up the last strip become 0.
  void tile_gradient(const BlockLogits& block, const float* tile, int64_t panel, int64_t slot, int64_t at) const {
    const int64_t there = block.n_rows(), even = rounded_up(there, 2);
    const LaneGradient by = gradients_.at(panel * lanes_, args_.grad_entropy != nullptr);
    kernels_.gradient(tile, even, by, row(slot, at), pair(slot, at));
    for (int64_t r = there; r < layout_.block; ++r) put_row_of_zeros(slot, at + r);
    const int64_t first = panel * lanes_;
    ids_.each(block.first() / layout_.block, first, first + lanes_, [&](int64_t token, int64_t place) {
      const int64_t id = head_.ids[place], r = id - block.first(), lane = token - first;
      put(slot, at + r, lane, static_cast<float>(target_gradient(args_, token, id, tile[r * lanes_ + lane])));
    });
  }

  void put(int64_t slot, int64_t r, int64_t lane, float value) const {
    if (size_ == 4) {
      reinterpret_cast<float*>(row(slot, r))[lane] = value;
      return;
    }
    const bfloat16 bits = from_float<bfloat16>(value);
    reinterpret_cast<bfloat16*>(row(slot, r))[lane] = bits;
    reinterpret_cast<bfloat16*>(pair(slot, r / 2 * 2))[2 * lane + r % 2] = bits;
  }

  void put_row_of_zeros(int64_t slot, int64_t r) const {
    for (int64_t lane = 0; lane < lanes_; ++lane) put(slot, r, lane, 0.0f);
  }

  // Rows are columns of the width, lanes tokens.
  void add_to_hidden(int64_t first_row, int64_t n_rows, int64_t first_panel, int64_t count) const {
    const int64_t n_blocks = blocks_of(depth_strips_, kStripsOfTask), n_groups = groups(count, n_blocks);
    const int64_t step = HeadLayout::even_step(n_rows);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < n_blocks * n_groups; ++task) {
      const int64_t b = task / n_groups, group = task % n_groups;
      const int64_t begin = b * kStripsOfTask, end = std::min(depth_strips_, begin + kStripsOfTask);
      for (int64_t k = 0; k < n_rows; k += step) {
        const int64_t depth = std::min(step, n_rows - k), strip_bytes = depth * kernels_.rows * size_;
        for (int64_t strip = begin; strip < end; ++strip) {
          kernels_.strip_of_columns(weight_of(head_), strip * kernels_.rows, first_row + k, depth,
                                    scratch().bytes((strip - begin) * strip_bytes));
        }
        for (int64_t panel = count * group / n_groups; panel < count * (group + 1) / n_groups; ++panel) {
          for (int64_t strip = begin; strip < end; ++strip) {
            kernels_.product(scratch().bytes((strip - begin) * strip_bytes), pair(panel, k), depth,
                             hidden_sums(first_panel + panel, strip * kernels_.rows), lanes_, true);
          }
        }
      }
    }
  }

  // Rows are of the vocabulary, lanes columns of the width.
  void add_to_weight(int64_t n_rows, int64_t first_panel, int64_t count) const {
    const int64_t rows = kStripsOfTask * kernels_.rows, n_blocks = blocks_of(n_rows, rows);
    const int64_t n_groups = groups(depth_panels_, n_blocks);
    const int64_t step = std::max<int64_t>(1, kMaxDepth / lanes_);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < n_blocks * n_groups; ++task) {
      const int64_t b = task / n_groups, group = task % n_groups;
      const int64_t end = std::min(n_rows, (b + 1) * rows);
      for (int64_t panel = 0; panel < count; panel += step) {
        const int64_t n = std::min(step, count - panel);
        for (int64_t c = depth_panels_ * group / n_groups; c < depth_panels_ * (group + 1) / n_groups; ++c) {
          for (int64_t r = b * rows; r < end; r += kernels_.rows) {
            kernels_.product_of_tiles(row(panel, r), panel_stride_, n, columns_of_tokens(c, first_panel + panel),
                                      weight_sums(r) + c * lanes_, depth_panels_ * lanes_, first_panel + panel > 0);
          }
        }
      }
    }
  }

  void add_to_bias(int64_t n_rows, int64_t first_panel, int64_t count) const {
#pragma omp for schedule(static)
    for (int64_t r = 0; r < n_rows; ++r) {
      float sum = first_panel == 0 ? 0.0f : of_bias_.floats()[r];
      for (int64_t panel = 0; panel < count; ++panel) {
        for (int64_t lane = 0; lane < lanes_; ++lane) {
          sum += size_ == 4 ? reinterpret_cast<const float*>(row(panel, r))[lane]
                            : to_float(reinterpret_cast<const bfloat16*>(row(panel, r))[lane]);
        }
      }
      of_bias_.floats()[r] = sum;
    }
  }

  char* result(void* base, int64_t i) const {
    return static_cast<char*>(base) + i * (head_.dtype == PK_FLOAT32 ? 4 : 2);
  }

  void write_weight(int64_t first_row, int64_t n_rows) const {
    const int64_t there = std::min(n_rows, head_.n_vocabulary - first_row);
    if (args_.grad_weight != nullptr) {
#pragma omp for schedule(static) nowait
      for (int64_t r = 0; r < there; ++r) {
        kernels_.convert(weight_sums(r), head_.depth, head_.dtype,
                         result(args_.grad_weight, (first_row + r) * head_.depth));
      }
    }
    if (args_.grad_bias != nullptr) {
#pragma omp single nowait
      kernels_.convert(of_bias_.floats(), there, head_.dtype, result(args_.grad_bias, first_row));
    }
#pragma omp barrier
  }

  void write_hidden() const {
#pragma omp for schedule(static)
    for (int64_t token = 0; token < head_.n_tokens; ++token) {
      float* line = scratch().floats();
      const float* sums = hidden_sums(token / lanes_, 0) + token % lanes_;
      for (int64_t d = 0; d < head_.depth; ++d) line[d] = sums[d * lanes_];
      kernels_.convert(line, head_.depth, head_.dtype, result(args_.grad_hidden, token * head_.depth));
    }
  }

  const pk_head_backward_args& args_;
  const pk_head& head_;
  const HeadLayout layout_;
  const HeadKernels& kernels_;
  const int64_t lanes_, size_, part_blocks_, part_, panel_stride_, chunk_panels_, n_panels_, depth_strips_,
      depth_panels_;
  const int threads_;
  const TokenGradients gradients_;
  const IdsOfBlocks ids_;
  // The gradients of a part's logits: [panel][row][lane], and with 16-bit operands also by pairs of rows.
  const Buffer rows_, pairs_;
  const Buffer panels_, columns_;                // hidden states, packed for the logits and for the gradient of the head
  const Buffer of_hidden_, of_weight_, of_bias_;  // sums
  std::vector<std::unique_ptr<BlockLogits>> blocks_;
  std::vector<std::unique_ptr<Buffer>> scratch_;
};

}  // namespace
}  // namespace pk

extern "C" int pk_cpu_head_backward(const pk_head_backward_args* args) {
  if (args == nullptr || !pk::valid_head(args->head)) return PK_BAD_ARGUMENT;
  if (args->grad_entropy != nullptr && args->entropy == nullptr) return PK_BAD_ARGUMENT;
  if (args->head.n_tokens > 0) pk::Backward(*args).run();
  return PK_OK;
}
