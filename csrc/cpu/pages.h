// Large memory in huge pages, reused from call to call. The system maps new memory page by page and zeroes it first: on
// its first touch it is written three times as slowly as on the second, in 4 KiB pages fifteen times.
#pragma once

#include <cstdint>

namespace pk {

// Less than this is left to malloc, which reuses it by itself.
constexpr int64_t kLeastPages = int64_t{2} << 20;

// Before first use, asks the system for 2 MiB pages, a hint that it may ignore.
void ask_for_huge_pages(void* begin, int64_t bytes);

// Uninitialised memory of at least so many bytes. Given back, it stays with the process for the next that needs about as
// much, up to kMostSpare bytes in all; meanwhile the system takes it where memory is short (MADV_FREE).
class Pages {
 public:
  static constexpr int64_t kMostSpare = int64_t{512} << 20;

  Pages() = default;
  explicit Pages(int64_t bytes);
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;
  ~Pages();
  char* begin() const { return begin_; }

 private:
  char* begin_ = nullptr;
  int64_t bytes_ = 0;  // whole huge pages
};

// Gives what is spare back to the system, and returns how many bytes that is.
int64_t release_spare_pages();

}  // namespace pk
