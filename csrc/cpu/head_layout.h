// How the work on an output layer is cut up. Every size follows from the vocabulary, the width and the dtype: what a
// token's numbers are summed in never depends on the number of tokens or threads.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <vector>

#include "head_kernels.h"
#include "pages.h"
#include "pk/abi.h"

namespace pk {

inline int64_t blocks_of(int64_t total, int64_t size) { return (total + size - 1) / size; }
inline int64_t rounded_up(int64_t total, int64_t unit) { return blocks_of(total, unit) * unit; }

// Uninitialised, on a cache line; a multiple of one is spare at the end.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t bytes) : pages_(bytes + 64 < kLeastPages ? 0 : bytes + 64), begin_(pages_.begin()) {
    if (begin_ != nullptr) return;
    begin_ = static_cast<char*>(std::aligned_alloc(64, rounded_up(bytes + 64, 64)));
    if (begin_ == nullptr) throw std::bad_alloc();
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() {
    if (pages_.begin() == nullptr) std::free(begin_);
  }
  char* bytes(int64_t offset = 0) const { return begin_ + offset; }
  float* floats(int64_t offset = 0) const { return reinterpret_cast<float*>(begin_) + offset; }

 private:
  Pages pages_;
  char* begin_ = nullptr;
};

struct HeadLayout {
  static constexpr int64_t kPackedBytes = 128 << 10;  // of a thread's strips: a share of a small second-level cache
  static constexpr int64_t kMostRows = 192;           // of a block, so that its tile stays in the first level
  static constexpr int64_t kSegments = 64;            // of the vocabulary, to share among threads
  static constexpr int64_t kTokenBytes = 4 << 20;     // of the panels of a chunk of tokens
  static constexpr int64_t kStateBytes = 8 << 20;     // of the softmax of a chunk of tokens in every segment

  const HeadKernels& kernels;
  int64_t depth;        // padded
  int64_t step;         // of depth, between two additions to a tile
  int64_t block;        // rows of the vocabulary, whole strips
  int64_t n_blocks;
  int64_t n_segments;
  int64_t padded_vocabulary;  // whole strips

  HeadLayout(int64_t n_vocabulary, int64_t width, int32_t dtype) : kernels(head_kernels(dtype)) {
    depth = rounded_up(width, kernels.depth_unit);
    step = even_step(depth);
    const int64_t row_bytes = depth * kernels.operand_bytes;
    const int64_t most = std::min(kMostRows, std::max<int64_t>(kPackedBytes / row_bytes, kernels.rows));
    padded_vocabulary = rounded_up(n_vocabulary, kernels.rows);
    block = std::min(most / kernels.rows * kernels.rows, padded_vocabulary);
    n_blocks = blocks_of(n_vocabulary, block);
    n_segments = std::min(n_blocks, kSegments);
  }

  // Equal steps of at most kMaxDepth that are fit for any instruction set.
  static int64_t even_step(int64_t depth) {
    return rounded_up(blocks_of(depth, blocks_of(depth, kMaxDepth)), 32);
  }
  int64_t first_block(int64_t segment) const { return n_blocks * segment / n_segments; }
  int64_t panels(int64_t n_tokens) const { return blocks_of(n_tokens, kernels.lanes); }
  int64_t panel_bytes() const { return depth * kernels.lanes * kernels.operand_bytes; }
  int64_t strip_bytes() const { return depth * kernels.rows * kernels.operand_bytes; }
  int64_t block_bytes() const { return block / kernels.rows * strip_bytes(); }
  int64_t tile_floats() const { return block * kernels.lanes; }
  // Kept logits: one panel after the other, all of the vocabulary in each.
  int64_t kept_floats() const { return padded_vocabulary * kernels.lanes; }
  int64_t state_floats() const { return n_segments * 3 * kernels.lanes; }  // of a panel
  int64_t chunk_panels() const {
    return std::max<int64_t>(1, std::min(kTokenBytes / panel_bytes(), kStateBytes / (4 * state_floats())));
  }
};

inline HeadMatrix hidden_of(const pk_head& head) {
  return {head.hidden, head.hidden_stride, head.n_tokens, head.depth, head.dtype};
}

inline HeadMatrix weight_of(const pk_head& head) {
  return {head.weight, head.weight_stride, head.n_vocabulary, head.depth, head.dtype};
}

bool valid_head(const pk_head& head);

// `highest`, [n_blocks][tokens of whole panels] or null: the largest logit of each block of the vocabulary, but for the
// token's first id.
void head_forward(const pk_head_forward_args& args, float* highest);

// Where the ids of some tokens lie: token and place among all ids, by block of the vocabulary, tokens in order. Most tiles
// have none.
class IdsOfBlocks {
 public:
  struct Id {
    int64_t token;
    int64_t place;
  };
  IdsOfBlocks(const pk_head& head, const HeadLayout& layout, int64_t first_token, int64_t last_token);
  // Calls body(token, place) for the ids of a block that tokens [first, last) have.
  template <typename Body>
  void each(int64_t block, int64_t first, int64_t last, Body body) const {
    for (int64_t i = begin_[static_cast<size_t>(block)]; i < begin_[static_cast<size_t>(block) + 1]; ++i) {
      const Id& id = ids_[static_cast<size_t>(i)];
      if (id.token >= first && id.token < last) body(id.token, id.place);
    }
  }

 private:
  std::vector<int64_t> begin_;
  std::vector<Id> ids_;
};

// One block of the vocabulary, packed, and its logits for one panel of tokens after another.
class BlockLogits {
 public:
  BlockLogits(const pk_head& head, const HeadLayout& layout);
  // `pack` where its logits are to be made.
  void take(int64_t block, bool pack);
  int64_t first() const { return first_; }
  int64_t n_rows() const { return n_rows_; }
  void logits(const char* panel, float* tile) const;

 private:
  const pk_head& head_;
  const HeadLayout& layout_;
  Buffer strips_, bias_;
  int64_t first_ = 0;
  int64_t n_rows_ = 0;
};

// The state of an instruction set around the work of a thread.
class Session {
 public:
  explicit Session(const HeadKernels& kernels) : kernels_(kernels) {
    if (kernels_.begin != nullptr) kernels_.begin();
  }
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;
  ~Session() {
    if (kernels_.end != nullptr) kernels_.end();
  }

 private:
  const HeadKernels& kernels_;
};

}  // namespace pk
