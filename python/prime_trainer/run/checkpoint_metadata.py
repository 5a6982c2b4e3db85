"""Reads the index of a checkpoint's tensors without running what may be hidden in it.

torch.distributed.checkpoint keeps the index as a pickle (`.metadata`) and unpickles it without restrictions: resuming
in somebody else's run directory would run their code. Here only the classes that an index of tensors consists of may
be named; the tensors themselves are read by torch with `weights_only`.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import Metadata

METADATA = ".metadata"
# No BytesStorageMetadata: an entry of that kind is unpickled without restrictions when it is read.
_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},
}  # fmt: skip


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        plain = name in _CLASSES.get(module, ()) or (
            module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        )
        if not plain:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no index of tensors needs")
        return super().find_class(module, name)


def read(directory: Path) -> Metadata:
    """The index of the tensors in a checkpoint. Raises ValueError, naming the file, for anything else."""
    from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

    path = directory / METADATA
    try:
        with path.open("rb") as file:
            metadata = _Unpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise ValueError(f"it holds {type(metadata).__name__}")
        for key, entry in metadata.state_dict_metadata.items():
            if not isinstance(entry, TensorStorageMetadata):
                raise ValueError(f"{key} is {type(entry).__name__}, not a tensor")
        for index, info in metadata.storage_data.items():
            if Path(info.relative_path).name != info.relative_path or info.transform_descriptors:
                raise ValueError(f"{index.fqn} is not in a file of the checkpoint: {info.relative_path!r:.100}")
    except FileNotFoundError:
        raise
    # A damaged pickle raises whatever its bytes happen to mean.
    except Exception as error:
        raise ValueError(f"{path} is not the index of a checkpoint: {error}") from None
    return metadata


def reader(directory: Path) -> FileSystemReader:
    """torch's reader of a directory, with the index read as above."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import StorageMeta

    class Restricted(FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
            metadata = read(directory)
            if metadata.storage_meta is None:
                metadata.storage_meta = StorageMeta()
            metadata.storage_meta.load_id = self.load_id
            return metadata

    return Restricted(directory)
