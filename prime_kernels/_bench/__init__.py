"""``python -m prime_kernels bench``: every operation on the device that is there, against what else can do it."""
