#include "status.cuh"

#include <cuda_runtime.h>

#include <cstdio>

#include "pk/abi.h"

namespace {

thread_local char error_text[256] = "no CUDA error";

}  // namespace

int pk::launch_status(const char* launch) {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return PK_OK;
  std::snprintf(error_text, sizeof error_text, "launch of %s failed: %s (%s)", launch, cudaGetErrorString(error),
                cudaGetErrorName(error));
  return PK_CUDA_ERROR;
}

extern "C" const char* pk_cuda_error(void) { return error_text; }
