// Launch status with the text of CUDA's error.
#pragma once

namespace pk {

// PK_OK if the last launch of this thread succeeded, else PK_CUDA_ERROR with a text for pk_cuda_error().
int launch_status(const char* launch);

}  // namespace pk
