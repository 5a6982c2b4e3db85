"""How many compiled products stay in memory on CPUs.

oneDNN compiles a 16-bit product for each of its shapes. PyTorch keeps 1,024 of them for each kind of product and oneDNN
1,024 more: a training run, whose passes have many lengths, grows by 10 MB for each length (a model of 135 million
weights). Compiling again what is no longer there costs less time than can be measured, as the layers of a model have
the same shapes one after the other.
"""

import os

CAPACITIES = {"LRU_CACHE_CAPACITY": "1", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128"}
"""Variables that PyTorch and oneDNN read at the first product of a process."""


def keep_few() -> None:
    """Bounds what is kept, unless the environment says how much. No effect after the first 16-bit product."""
    for name, capacity in CAPACITIES.items():
        os.environ.setdefault(name, capacity)
