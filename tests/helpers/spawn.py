"""Functions run in several processes, forked from one that has imported torch, which takes longer than they do."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch.multiprocessing as mp

mp.get_context("forkserver").set_forkserver_preload(["torch.distributed.tensor", "prime_kernels.integrations"])


def spawn(function: Callable[..., None], size: int, *arguments: object) -> None:
    """Call ``function(rank, size, path of a torch.distributed.FileStore, *arguments)`` in ``size`` processes."""
    with tempfile.TemporaryDirectory() as folder:
        words = (function, size, str(Path(folder) / "store"), *arguments)
        mp.start_processes(_child, words, nprocs=size, start_method="forkserver")


def _child(rank: int, function: Callable[..., None], *arguments: object) -> None:
    function(rank, *arguments)
    # What remains of torch's threads now and then aborts a process on its ordinary way out, after all is done.
    os._exit(0)
