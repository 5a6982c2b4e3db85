// Probable tokens from hidden states and an output layer. The scoring pass leaves the largest logit of each block of the
// vocabulary. Once a token's sum is known, the blocks that hold a candidate are made again, for the tokens that have one
// there: a few in a hundred. A logit depends on its own operands alone, so it has the bits that were scored.

#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "head_layout.h"
#include "threads.h"

namespace pk {
namespace {

constexpr double kSlack = 1e-5;  // nats: the caller decides, this only has to find enough
constexpr float kInf = std::numeric_limits<float>::infinity();

struct Found {
  int64_t token;
  int64_t id;
  float logit;
};

// What a thread needs to make the logits of some tokens again.
struct Scratch {
  BlockLogits block;
  Buffer hidden, panel, tile;
  std::vector<int64_t> tokens;
  Scratch(const pk_head& head, const HeadLayout& layout)
      : block(head, layout),
        hidden(layout.kernels.lanes * head.depth * 4),
        panel(layout.panel_bytes()),
        tile(layout.tile_floats() * 4) {}
};

class HeadSearch {
 public:
  HeadSearch(const pk_head_candidates_args& args, const HeadLayout& layout, const float* highest)
      : args_(args),
        head_(args.head),
        layout_(layout),
        highest_(highest),
        padded_(layout.panels(head_.n_tokens) * layout.kernels.lanes),
        least_(args.log_min_prob - kSlack) {
    for (int64_t token = 0; token < head_.n_tokens; ++token) {
      const double lse = args.lse[token];
      // Without a distribution there is nothing to find: no logit is at least NaN.
      const float threshold = std::isfinite(lse) ? static_cast<float>((lse + least_) * head_.temperature)
                                                 : std::numeric_limits<float>::quiet_NaN();
      thresholds_.push_back(std::nextafterf(threshold, -kInf));
    }
  }

  std::vector<Found> in_block(int64_t b, Scratch& scratch) const {
    std::vector<Found> found;
    scratch.tokens.clear();
    const int64_t first = b * layout_.block, end = std::min(head_.n_vocabulary, first + layout_.block);
    for (int64_t token = 0; token < head_.n_tokens; ++token) {
      const bool own = head_.ids[token] >= first && head_.ids[token] < end && args_.logp[token] >= least_;
      if (own || highest_[b * padded_ + token] >= thresholds_[static_cast<size_t>(token)]) {
        scratch.tokens.push_back(token);
      }
    }
    if (scratch.tokens.empty()) return found;
    scratch.block.take(b, true);
    const int64_t lanes = layout_.kernels.lanes, n = static_cast<int64_t>(scratch.tokens.size());
    for (int64_t at = 0; at < n; at += lanes) {
      search(scratch, scratch.tokens.data() + at, std::min(lanes, n - at), first, &found);
    }
    return found;
  }

 private:
  void search(Scratch& scratch, const int64_t* tokens, int64_t n, int64_t first, std::vector<Found>* found) const {
    const int64_t size = head_.dtype == PK_FLOAT32 ? 4 : 2, row_bytes = head_.depth * size;
    const char* hidden = static_cast<const char*>(head_.hidden);
    for (int64_t i = 0; i < n; ++i) {
      std::memcpy(scratch.hidden.bytes(i * row_bytes), hidden + tokens[i] * head_.hidden_stride * size,
                  static_cast<size_t>(row_bytes));
    }
    const HeadMatrix rows{scratch.hidden.bytes(), head_.depth, n, head_.depth, head_.dtype};
    layout_.kernels.panel_of_rows(rows, 0, 0, layout_.depth, scratch.panel.bytes());
    scratch.block.logits(scratch.panel.bytes(), scratch.tile.floats());
    const float* tile = scratch.tile.floats();
    for (int64_t row = 0; row < scratch.block.n_rows(); ++row, tile += layout_.kernels.lanes) {
      for (int64_t i = 0; i < n; ++i) {
        if (tile[i] >= thresholds_[static_cast<size_t>(tokens[i])]) found->push_back({tokens[i], first + row, tile[i]});
      }
    }
  }

  const pk_head_candidates_args& args_;
  const pk_head& head_;
  const HeadLayout& layout_;
  const float* highest_;
  int64_t padded_;
  double least_;
  std::vector<float> thresholds_;
};

void of_some_tokens(const pk_head_candidates_args& args, const HeadLayout& layout) {
  const pk_head& head = args.head;
  const Buffer highest(layout.n_blocks * layout.panels(head.n_tokens) * layout.kernels.lanes * 4);
  head_forward({head, args.logp, args.lse, nullptr}, highest.floats());
  const HeadSearch search(args, layout, highest.floats());
  const int threads = thread_count(head.n_threads, layout.n_blocks, head.n_tokens * head.n_vocabulary);
  std::vector<std::unique_ptr<Scratch>> scratch;
  for (int thread = 0; thread < threads; ++thread) scratch.push_back(std::make_unique<Scratch>(head, layout));
  std::vector<std::vector<Found>> of_blocks(static_cast<size_t>(layout.n_blocks));
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const Session session(layout.kernels);
#pragma omp for schedule(dynamic, 1)
    for (int64_t b = 0; b < layout.n_blocks; ++b) {
      of_blocks[static_cast<size_t>(b)] = search.in_block(b, *scratch[static_cast<size_t>(thread_index())]);
    }
  }
  std::fill_n(args.found_ids, head.n_tokens * args.n_slots, int64_t{-1});
  std::fill_n(args.found, head.n_tokens * args.n_slots, -kInf);
  std::vector<int64_t> counts(static_cast<size_t>(head.n_tokens));
  for (const std::vector<Found>& of_block : of_blocks) {
    for (const Found& each : of_block) {
      int64_t& count = counts[static_cast<size_t>(each.token)];
      if (count == args.n_slots) continue;
      args.found_ids[each.token * args.n_slots + count] = each.id;
      args.found[each.token * args.n_slots + count++] = each.logit;
    }
  }
}

// As many tokens at a time as the scoring pass takes: what is kept of them is small at any number of tokens.
void candidates(const pk_head_candidates_args& args) {
  const HeadLayout layout(args.head.n_vocabulary, args.head.depth, args.head.dtype);
  const int64_t chunk = layout.chunk_panels() * layout.kernels.lanes, size = args.head.dtype == PK_FLOAT32 ? 4 : 2;
  for (int64_t first = 0; first < args.head.n_tokens; first += chunk) {
    pk_head_candidates_args part = args;
    part.head.hidden = static_cast<const char*>(args.head.hidden) + first * args.head.hidden_stride * size;
    part.head.ids += first;
    part.head.n_tokens = std::min(chunk, args.head.n_tokens - first);
    part.logp += first;
    part.lse += first;
    part.found_ids += first * args.n_slots;
    part.found += first * args.n_slots;
    of_some_tokens(part, layout);
  }
}

}  // namespace
}  // namespace pk

extern "C" int pk_cpu_head_candidates(const pk_head_candidates_args* args) {
  if (args == nullptr || !pk::valid_head(args->head) || args->head.n_ids != 1 || args->head.kept != nullptr) {
    return PK_BAD_ARGUMENT;
  }
  if (args->n_slots < 1 || !(args->log_min_prob <= 0.0)) return PK_BAD_ARGUMENT;
  pk::candidates(*args);
  return PK_OK;
}
