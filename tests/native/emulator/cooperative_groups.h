#pragma once

#include "cuda_runtime.h"

namespace cooperative_groups {

struct Grid {
  void sync() const { emulator::wait(emulator::At::grid); }
};
inline Grid this_grid() { return {}; }

}  // namespace cooperative_groups
