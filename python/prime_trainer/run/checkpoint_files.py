"""A nested state on disk: tensors through torch.distributed.checkpoint, each rank its shards; the rest as plain data.

Tensors are written whole or in shards and read back into whatever the reader has, so that the number of ranks may
change in between.

torch.distributed.checkpoint keeps the index of the tensors as a pickle (`.metadata`) and unpickles it without
restrictions: resuming in somebody else's run directory would run their code. Here only the classes that an index
consists of may be named; the tensors themselves torch reads with `weights_only`.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import warnings
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..scale.ranks import SINGLE, Ranks
from .atomic_files import sync
from .jsonl import read_object

if TYPE_CHECKING:
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import Metadata

STATE = "state.pt"
MANIFEST = "manifest.json"
_TENSOR = "__tensor__"
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


def split(state: Any, key: str = "state") -> tuple[Any, dict[str, Tensor]]:
    """`state` with references in the places of its tensors, and the tensors by their dotted place."""
    if isinstance(state, Tensor):
        return {_TENSOR: key}, {key: state.detach()}
    if isinstance(state, Mapping):
        parts = {name: split(value, f"{key}.{name}") for name, value in state.items()}
        return {name: plain for name, (plain, _) in parts.items()}, _merged(found for _, found in parts.values())
    if isinstance(state, (list, tuple)) and any(isinstance(value, (Tensor, Mapping, list, tuple)) for value in state):
        items = [split(value, f"{key}.{i}") for i, value in enumerate(state)]
        return type(state)(plain for plain, _ in items), _merged(found for _, found in items)
    return state, {}


def join(plain: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `split` took apart."""
    if isinstance(plain, dict):
        if set(plain) == {_TENSOR}:
            return tensors[plain[_TENSOR]]
        return {name: join(value, tensors) for name, value in plain.items()}
    if isinstance(plain, (list, tuple)) and any(isinstance(value, (dict, list, tuple)) for value in plain):
        return type(plain)(join(value, tensors) for value in plain)
    return plain


def staged(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies in CPU memory that the training may go on under."""
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

    stager = DefaultStager(StagingOptions(False, False, False, False))
    try:
        copies = stager.stage(tensors)
        return copies.result() if isinstance(copies, Future) else copies
    finally:
        stager.close()


def write(directory: Path, plain: Any, tensors: dict[str, Tensor], ranks: Ranks = SINGLE) -> None:
    """Fills `directory`, which all ranks see, and seals it with a manifest of every file's size and SHA-256."""
    if tensors:
        dcp = _dcp()
        writer = dcp.FileSystemWriter(directory)
        dcp.save(tensors, storage_writer=writer, process_group=ranks.group, no_dist=ranks.group is None)

    def write_plain() -> list[Path]:
        torch.save(plain, directory / STATE)
        sync(directory / STATE)
        return _files(directory)

    files = ranks.once(write_plain)
    found = ranks.gather({file.name: _facts(file) for file in ranks.share(files)})

    def seal() -> None:
        (directory / MANIFEST).write_text(json.dumps(_merged(found), indent=1))
        sync(directory / MANIFEST)
        sync(directory)

    ranks.once(seal)


def verify(directory: Path, ranks: Ranks = SINGLE, only: str | None = None) -> None:
    """Raises ValueError, naming the file, if anything, or the file `only`, differs from what `write` left."""
    manifest = directory / MANIFEST
    wrong: list[str] = []
    try:
        facts = read_object(manifest)
        for name in ranks.share(sorted(facts) if only is None else [only]):
            if Path(name).name != name:
                raise ValueError(f"{name!r:.100} is not in the directory")
            wrong += _difference(directory / name, facts[name])
    except (OSError, ValueError, KeyError, TypeError) as error:
        wrong.append(f"{MANIFEST} cannot be read ({error})")
    wrong = [line for lines in ranks.gather(wrong) for line in lines]
    if wrong:
        raise ValueError(
            f"the checkpoint {directory} is corrupted: {'; '.join(wrong)}. Remove it to go on from the one before it"
        )


def read_plain(directory: Path) -> Any:
    """The state with references in the places of its tensors. Only plain data is unpickled."""
    try:
        return torch.load(directory / STATE, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    # A damaged or foreign file raises whatever its bytes happen to mean, over many lines.
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{directory / STATE} is not the state of a run: {reason}") from None


def read(directory: Path, into: Any = None, ranks: Ranks = SINGLE) -> Any:
    """The state, its tensors read into those of `into`, a state of the same form; without it, into new ones."""
    plain = read_plain(directory)
    wanted = split(plain_tensors(directory, plain) if into is None else into)[1]
    if wanted:
        reader = _index_reader(directory)
        _dcp().load(wanted, storage_reader=reader, process_group=ranks.group, no_dist=ranks.group is None)
    return join(plain, wanted)


def plain_tensors(directory: Path, plain: Any) -> Any:
    """The state in `directory` with empty tensors of the sizes that were saved."""
    if not (directory / METADATA).exists():
        return plain
    saved: dict[str, Any] = read_index(directory).state_dict_metadata  # tensors alone, which read_index checks
    return join(plain, {key: torch.empty(m.size, dtype=m.properties.dtype) for key, m in saved.items()})


def read_index(directory: Path) -> Metadata:
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


def _index_reader(directory: Path) -> FileSystemReader:
    """torch's reader of a directory, with the index read by `read_index`."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import StorageMeta

    class Restricted(FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
            metadata = read_index(directory)
            if metadata.storage_meta is None:
                metadata.storage_meta = StorageMeta()
            metadata.storage_meta.load_id = self.load_id
            return metadata

    return Restricted(directory)


def _dcp() -> Any:
    import torch.distributed.checkpoint as dcp

    # It says so at each save of a single process, which is no surprise here.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
    return dcp


def _merged(parts: Any) -> dict[str, Any]:
    return {key: value for part in parts for key, value in part.items()}


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if path.name != MANIFEST)


def _facts(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def _difference(file: Path, want: dict[str, Any]) -> list[str]:
    if not file.is_file():
        return [f"{file.name} is missing"]
    if file.stat().st_size != want["bytes"]:
        return [f"{file.name} has {file.stat().st_size} bytes instead of {want['bytes']}"]
    return [] if _facts(file)["sha256"] == want["sha256"] else [f"{file.name} has another SHA-256 than when written"]
