"""The file through which weights reach a server on this host."""

from __future__ import annotations

import json
import os
import shutil
import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...models.adapters.views import unmerged

SHARED_MEMORY = Path("/dev/shm")
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}


class SharedFile:
    """The weights as a safetensors file, in shared memory where there is room; gone when the context ends."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        size = sum(t.nbytes for t in unmerged(tensors).values())
        roomy = SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free > size + 2**20
        self.directory = tempfile.TemporaryDirectory(prefix="prime-trainer-", dir=SHARED_MEMORY if roomy else None)

    def __enter__(self) -> str:
        path = os.path.join(self.directory.name, "weights.safetensors")
        try:
            write_tensors(self.tensors, Path(path))
        except BaseException:
            self.directory.cleanup()
            raise
        return path

    def __exit__(self, *_: Any) -> None:
        self.directory.cleanup()


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """A safetensors file, one tensor after the other: of those that are made as they are taken, one exists at a time.

    Format: 8 bytes with the length of a JSON header, little-endian; the header, {name: {dtype, shape, data_offsets}},
    padded to a multiple of 8; the data in the order of the header, wider dtypes first so that all are aligned.
    """
    shapes = dict(sorted(unmerged(tensors).items(), key=lambda item: -item[1].element_size()))
    header, at = {}, 0
    for name, tensor in shapes.items():
        offsets = [at, at + tensor.nbytes]
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        at += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in shapes:
            tensor = tensors[name].detach().to("cpu").contiguous()
            file.write(tensor.flatten().view(torch.uint8).numpy().data)
