#include "row_kernels_impl.h"
