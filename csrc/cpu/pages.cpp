#include "pages.h"

#include <cstddef>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace pk {
namespace {

constexpr int64_t kHugePage = int64_t{2} << 20;

struct Block {
  char* begin;
  int64_t bytes;
};

#if defined(__linux__)
char* map(int64_t bytes) {
  void* found = mmap(nullptr, static_cast<size_t>(bytes + kHugePage), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
                     -1, 0);
  if (found == MAP_FAILED) throw std::bad_alloc();
  // From the first whole huge page on; what is left and right of it goes back.
  char* const mapped = static_cast<char*>(found);
  const int64_t skip = (kHugePage - static_cast<int64_t>(reinterpret_cast<uintptr_t>(mapped) % kHugePage)) % kHugePage;
  if (skip > 0) (void)munmap(mapped, static_cast<size_t>(skip));
  (void)munmap(mapped + skip + bytes, static_cast<size_t>(kHugePage - skip));
  ask_for_huge_pages(mapped + skip, bytes);
  return mapped + skip;
}

void unmap(const Block& block) { (void)munmap(block.begin, static_cast<size_t>(block.bytes)); }

// What is spare, the longest so first.
struct Spare {
  std::mutex mutex;
  std::vector<Block> blocks;
  // Room for all that there can be: giving back never allocates.
  Spare() { blocks.reserve(static_cast<size_t>(Pages::kMostSpare / kHugePage + 1)); }
};

// Never destroyed: tensors may outlive static objects.
Spare& spare() {
  static Spare& all = *new Spare;
  return all;
}

// The smallest spare block of that size up to four times as large, of equal ones the last; {nullptr, 0} for none. As
// everywhere here the lock is only tried: in the child of a fork it may be held by a thread that is not there.
Block take_spare(int64_t bytes) {
  const std::unique_lock<std::mutex> lock(spare().mutex, std::try_to_lock);
  Block best{nullptr, 0};
  if (!lock.owns_lock()) return best;
  std::vector<Block>& blocks = spare().blocks;
  size_t place = 0;
  for (size_t i = 0; i < blocks.size(); ++i) {
    const Block& block = blocks[i];
    const bool fits = block.bytes >= bytes && block.bytes / 4 <= bytes;
    if (!fits || (best.begin != nullptr && block.bytes > best.bytes)) continue;
    best = block;
    place = i;
  }
  if (best.begin != nullptr) blocks.erase(blocks.begin() + static_cast<std::ptrdiff_t>(place));
  return best;
}

void put_spare(const Block& block) {
#if defined(MADV_FREE)
  const std::unique_lock<std::mutex> lock(spare().mutex, std::try_to_lock);
  if (lock.owns_lock() && block.bytes <= Pages::kMostSpare &&
      madvise(block.begin, static_cast<size_t>(block.bytes), MADV_FREE) == 0) {
    std::vector<Block>& blocks = spare().blocks;
    blocks.push_back(block);
    int64_t total = 0;
    for (const Block& each : blocks) total += each.bytes;
    while (total > Pages::kMostSpare) {
      total -= blocks.front().bytes;
      unmap(blocks.front());
      blocks.erase(blocks.begin());
    }
    return;
  }
#endif
  unmap(block);
}
#endif

}  // namespace

void ask_for_huge_pages([[maybe_unused]] void* begin, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t page = static_cast<uintptr_t>(kHugePage), at = reinterpret_cast<uintptr_t>(begin);
  const uintptr_t first = (at + page - 1) / page * page, last = (at + static_cast<uintptr_t>(bytes)) / page * page;
  if (last > first) (void)madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

#if defined(__linux__)
Pages::Pages(int64_t bytes) : bytes_((bytes + kHugePage - 1) / kHugePage * kHugePage) {
  const Block found = take_spare(bytes_);
  begin_ = found.begin;
  if (begin_ != nullptr) {
    bytes_ = found.bytes;
  } else if (bytes_ > 0) {
    begin_ = map(bytes_);
  }
}

Pages::~Pages() {
  if (begin_ != nullptr) put_spare({begin_, bytes_});
}

int64_t release_spare_pages() {
  const std::unique_lock<std::mutex> lock(spare().mutex, std::try_to_lock);
  int64_t total = 0;
  if (!lock.owns_lock()) return total;
  for (const Block& block : spare().blocks) {
    total += block.bytes;
    unmap(block);
  }
  spare().blocks.clear();
  return total;
}
#else
Pages::Pages(int64_t bytes) : bytes_((bytes + kHugePage - 1) / kHugePage * kHugePage) {
  if (bytes_ == 0) return;
  begin_ = static_cast<char*>(std::aligned_alloc(64, static_cast<size_t>(bytes_)));
  if (begin_ == nullptr) throw std::bad_alloc();
}

Pages::~Pages() { std::free(begin_); }

int64_t release_spare_pages() { return 0; }
#endif

}  // namespace pk
