#pragma once

#include <algorithm>
#include <cstdint>

namespace pk {

// Below this many elements a thread costs more to wake than it saves.
constexpr int64_t kElementsPerThread = 16384;

inline int thread_count(int64_t requested, int64_t rows, int64_t elements) {
  const int64_t useful = std::min(rows, elements / kElementsPerThread);
  return static_cast<int>(std::max<int64_t>(1, std::min(requested, useful)));
}

}  // namespace pk
