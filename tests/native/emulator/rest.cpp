// What the emulator does not run: the row kernels use instructions of their own.
#include "pk/abi.h"

extern "C" int pk_cuda_log_probs_forward(const pk_log_probs_args*, void*) { return PK_CUDA_ERROR; }
extern "C" int pk_cuda_log_probs_backward(const pk_log_probs_grad_args*, void*) { return PK_CUDA_ERROR; }
