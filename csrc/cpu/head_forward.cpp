// Log-probs of tokens from hidden states and an output layer. A task is a segment of the vocabulary for some panels of
// tokens; it packs one block of the vocabulary after another and takes each tile of logits, while it is in cache, into the
// softmax of its tokens. The segments of a token are then joined in their order, whoever made them. As in log_probs.cpp
// the target is left out of the sums and joined in double. Of several ids a token the first is the target; the logits of
// the others wait in place of their log-probs for the sum, from which these follow as everywhere (ops/_several_ids.py).

#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "half.h"
#include "head_layout.h"
#include "threads.h"

namespace pk {
namespace {

constexpr double kLn2 = 0.693147180559945309;
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

float element(const void* data, int64_t i, int32_t dtype) {
  if (dtype == PK_FLOAT32) return static_cast<const float*>(data)[i];
  if (dtype == PK_BFLOAT16) return to_float(static_cast<const bfloat16*>(data)[i]);
  return to_float(static_cast<const float16*>(data)[i]);
}

// The softmax of [segment][panel][lane], without each token's target, and the targets.
class Partials {
 public:
  Partials(const HeadLayout& layout, int64_t panels, bool weighted)
      : lanes_(layout.kernels.lanes),
        panels_(panels),
        columns_(weighted ? 3 : 2),
        state_(layout.n_segments * panels * columns_ * lanes_ * 4),
        target_(panels * lanes_ * 4) {}

  LaneSoftmax at(int64_t segment, int64_t panel) const {
    float* begin = state_.floats((segment * panels_ + panel) * columns_ * lanes_);
    return {begin, begin + lanes_, columns_ == 3 ? begin + 2 * lanes_ : nullptr, nullptr};
  }
  void clear(int64_t segment, int64_t panel) const {
    const LaneSoftmax state = at(segment, panel);
    std::fill_n(state.highest, lanes_, -kInf);
    std::fill_n(state.sum, (columns_ - 1) * lanes_, 0.0f);
  }
  float* targets(int64_t panel) const { return target_.floats(panel * lanes_); }

 private:
  int64_t lanes_, panels_, columns_;
  Buffer state_, target_;
};

void take_tile(const pk_head_forward_args& args, const HeadLayout& layout, const IdsOfBlocks& ids, int64_t b,
               const BlockLogits& block, int64_t first_token, float* tile, const LaneSoftmax& state, float* targets) {
  const pk_head& head = args.head;
  const int64_t lanes = layout.kernels.lanes, end = first_token + lanes;
  const auto logit = [&](int64_t token, int64_t place) -> float& {
    return tile[(head.ids[place] - block.first()) * lanes + token - first_token];
  };
  // The others first: one of them may be the target, too.
  ids.each(b, first_token, end, [&](int64_t token, int64_t place) {
    if (place != token * head.n_ids) args.logp[place] = logit(token, place);
  });
  ids.each(b, first_token, end, [&](int64_t token, int64_t place) {
    if (place != token * head.n_ids) return;
    targets[token - first_token] = logit(token, place);
    logit(token, place) = -kInf;
  });
  const float scale = static_cast<float>(1.0 / (head.temperature * kLn2));
  layout.kernels.softmax(tile, block.n_rows(), scale, state);
  if (head.kept == nullptr) return;
  ids.each(b, first_token, end, [&](int64_t token, int64_t place) {
    if (place == token * head.n_ids) logit(token, place) = targets[token - first_token];
  });
}

void finish_token(const pk_head_forward_args& args, int64_t token, double highest, double others, double weighted,
                  double target) {
  const double log2_scale = 1.0 / (args.head.temperature * kLn2);
  const int64_t at = token * args.head.n_ids;
  const double top = std::max(highest, target);
  if (top == -kInf || std::isnan(others) || std::isnan(target)) {
    // Nothing but -inf: no distribution. Or a NaN somewhere.
    std::fill_n(args.logp + at, args.head.n_ids, static_cast<float>(kNaN));
    args.lse[token] = std::isnan(others) || std::isnan(target) ? static_cast<float>(kNaN) : -kInf;
    if (args.entropy != nullptr) args.entropy[token] = static_cast<float>(kNaN);
    return;
  }
  const double step = highest == -kInf ? 0.0 : (highest - top) * log2_scale;
  const double factor = std::exp2(step);
  others *= factor;
  const double t = (target - top) * log2_scale;
  const double p = std::exp2(t);
  const double sum = others + p;
  const double log_sum = std::log(sum);
  // log1p, because beside a 1 the others would lose their digits; where the target vanishes there is nothing to lose.
  args.logp[at] = static_cast<float>(p > 1e-280 ? -std::log1p(others / p) : kLn2 * t - log_sum);
  args.lse[token] = static_cast<float>(top / args.head.temperature + log_sum);
  for (int64_t i = at + 1; i < at + args.head.n_ids; ++i) {
    args.logp[i] = static_cast<float>(args.logp[i] / args.head.temperature - static_cast<double>(args.lse[token]));
  }
  if (args.entropy == nullptr) return;
  const double moved = (factor == 0.0 ? 0.0 : factor * weighted + step * others) + (p == 0.0 ? 0.0 : p * t);
  args.entropy[token] = static_cast<float>(log_sum - kLn2 * moved / sum);
}

void finish_panel(const pk_head_forward_args& args, const HeadLayout& layout, const Partials& partials, int64_t panel,
                  int64_t first_token) {
  const float scale = static_cast<float>(1.0 / (args.head.temperature * kLn2));
  const LaneSoftmax all = partials.at(0, panel);
  for (int64_t segment = 1; segment < layout.n_segments; ++segment) {
    layout.kernels.merge(partials.at(segment, panel), scale, all);
  }
  const int64_t there = std::min<int64_t>(layout.kernels.lanes, args.head.n_tokens - first_token);
  for (int64_t lane = 0; lane < there; ++lane) {
    finish_token(args, first_token + lane, all.highest[lane], all.sum[lane],
                 all.weighted == nullptr ? 0.0 : all.weighted[lane], partials.targets(panel)[lane]);
  }
}

}  // namespace

void head_forward(const pk_head_forward_args& args, float* highest) {
  const pk_head& head = args.head;
  const HeadLayout layout(head.n_vocabulary, head.depth, head.dtype);
  const int64_t lanes = layout.kernels.lanes;
  const int64_t chunk_panels = std::min(layout.chunk_panels(), layout.panels(head.n_tokens));
  const int threads = thread_count(head.n_threads, layout.n_segments * chunk_panels, head.n_tokens * head.n_vocabulary);
  const Buffer panels(chunk_panels * layout.panel_bytes());
  const Partials partials(layout, chunk_panels, args.entropy != nullptr);
  std::vector<std::unique_ptr<BlockLogits>> blocks(static_cast<size_t>(threads));
  std::vector<std::unique_ptr<Buffer>> tiles(static_cast<size_t>(threads));
  for (auto& each : blocks) each = std::make_unique<BlockLogits>(head, layout);
  for (auto& each : tiles) each = std::make_unique<Buffer>(layout.tile_floats() * 4);
  for (int64_t first = 0; first < head.n_tokens; first += chunk_panels * lanes) {
    const int64_t count = std::min(chunk_panels, layout.panels(head.n_tokens - first));
    // More tokens share a packed block the fewer groups there are; enough of them to keep every thread busy.
    const int64_t groups = std::min(count, blocks_of(4 * threads, layout.n_segments));
    const IdsOfBlocks ids(head, layout, first, std::min(head.n_tokens, first + count * lanes));
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      const Session session(layout.kernels);
      BlockLogits& block = *blocks[static_cast<size_t>(thread_index())];
      float* scratch = tiles[static_cast<size_t>(thread_index())]->floats();
#pragma omp for schedule(static)
      for (int64_t panel = 0; panel < count; ++panel) {
        layout.kernels.panel_of_rows(hidden_of(head), first + panel * lanes, 0, layout.depth,
                                     panels.bytes(panel * layout.panel_bytes()));
        std::fill_n(partials.targets(panel), lanes, -kInf);
      }
#pragma omp for schedule(dynamic, 1)
      for (int64_t task = 0; task < groups * layout.n_segments; ++task) {
        const int64_t segment = task / groups, group = task % groups;
        const int64_t begin = count * group / groups, end = count * (group + 1) / groups;
        for (int64_t panel = begin; panel < end; ++panel) partials.clear(segment, panel);
        for (int64_t b = layout.first_block(segment); b < layout.first_block(segment + 1); ++b) {
          block.take(b, true);
          for (int64_t panel = begin; panel < end; ++panel) {
            float* tile = scratch;
            if (head.kept != nullptr) {
              tile = head.kept + (first / lanes + panel) * layout.kept_floats() + b * layout.tile_floats();
            }
            block.logits(panels.bytes(panel * layout.panel_bytes()), tile);
            LaneSoftmax state = partials.at(segment, panel);
            if (highest != nullptr) {
              state.of_tile = highest + b * layout.panels(head.n_tokens) * lanes + first + panel * lanes;
            }
            take_tile(args, layout, ids, b, block, first + panel * lanes, tile, state, partials.targets(panel));
          }
        }
      }
#pragma omp for schedule(static)
      for (int64_t panel = 0; panel < count; ++panel) {
        finish_panel(args, layout, partials, panel, first + panel * lanes);
      }
    }
  }
}

bool valid_head(const pk_head& head) {
  return head.n_tokens >= 0 && head.n_vocabulary >= 1 && head.depth >= 1 && head.n_ids >= 1 && head.temperature > 0.0 && head.softcap >= 0.0 &&
         (head.dtype == PK_FLOAT32 || head.dtype == PK_BFLOAT16 || head.dtype == PK_FLOAT16);
}

IdsOfBlocks::IdsOfBlocks(const pk_head& head, const HeadLayout& layout, int64_t first_token, int64_t last_token)
    : begin_(static_cast<size_t>(layout.n_blocks + 1)) {
  const int64_t first = first_token * head.n_ids, last = last_token * head.n_ids;
  const auto block_of = [&](int64_t place) {
    const int64_t id = head.ids[place];
    return id < 0 || id >= head.n_vocabulary ? -1 : id / layout.block;
  };
  for (int64_t place = first; place < last; ++place) {
    if (block_of(place) >= 0) ++begin_[static_cast<size_t>(block_of(place) + 1)];
  }
  for (size_t block = 1; block < begin_.size(); ++block) begin_[block] += begin_[block - 1];
  ids_.resize(static_cast<size_t>(begin_.back()));
  std::vector<int64_t> next(begin_);
  for (int64_t place = first; place < last; ++place) {
    if (block_of(place) < 0) continue;
    ids_[static_cast<size_t>(next[static_cast<size_t>(block_of(place))]++)] = {place / head.n_ids, place};
  }
}

BlockLogits::BlockLogits(const pk_head& head, const HeadLayout& layout)
    : head_(head), layout_(layout), strips_(layout.block_bytes()), bias_(layout.block * 4) {}

void BlockLogits::take(int64_t block, bool pack) {
  first_ = block * layout_.block;
  n_rows_ = std::min(layout_.block, head_.n_vocabulary - first_);
  if (!pack) return;
  for (int64_t row = 0; row < n_rows_; row += layout_.kernels.rows) {
    layout_.kernels.strip_of_rows(weight_of(head_), first_ + row, 0, layout_.depth,
                                  strips_.bytes(row / layout_.kernels.rows * layout_.strip_bytes()));
  }
  if (head_.bias == nullptr) return;
  for (int64_t row = 0; row < n_rows_; ++row) bias_.floats()[row] = element(head_.bias, first_ + row, head_.dtype);
}

void BlockLogits::logits(const char* panel, float* tile) const {
  const HeadKernels& kernels = layout_.kernels;
  const int64_t size = kernels.operand_bytes;
  for (int64_t k = 0; k < layout_.depth; k += layout_.step) {
    const int64_t depth = std::min(layout_.step, layout_.depth - k);
    for (int64_t row = 0; row < n_rows_; row += kernels.rows) {
      const char* strip = strips_.bytes(row / kernels.rows * layout_.strip_bytes() + k * kernels.rows * size);
      kernels.product(strip, panel + k * kernels.lanes * size, depth, tile + row * kernels.lanes, kernels.lanes, k > 0);
    }
  }
  const bool rounds = head_.rounded != 0 && head_.dtype != PK_FLOAT32;
  if (head_.bias == nullptr && !rounds && head_.softcap == 0.0) return;
  kernels.finish(tile, n_rows_, head_.bias == nullptr ? nullptr : bias_.floats(), rounds ? head_.dtype : PK_FLOAT32,
                 static_cast<float>(head_.softcap));
}

}  // namespace pk

extern "C" int pk_cpu_head_forward(const pk_head_forward_args* args) {
  if (args == nullptr || !pk::valid_head(args->head)) return PK_BAD_ARGUMENT;
  pk::head_forward(*args, nullptr);
  return PK_OK;
}

extern "C" int64_t pk_cpu_head_kept_floats(int64_t n_tokens, int64_t n_vocabulary, int64_t depth, int32_t dtype) {
  const pk::HeadLayout layout(n_vocabulary, depth, dtype);
  return layout.panels(n_tokens) * layout.kept_floats();
}
