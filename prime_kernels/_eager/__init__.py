"""The backend "eager": row kernels in plain PyTorch. References of the operations stand in ops/."""
