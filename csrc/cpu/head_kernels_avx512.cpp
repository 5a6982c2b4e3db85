#include "head_kernels_impl.h"
#include "head_kernels_table.h"
