"""Models and data by their names on the Hugging Face Hub, from its local cache where it has them.

A model is `owner/name`, or `owner/name@revision` where not the newest is meant; a local directory of that name wins.
Data are files of a dataset: `hf://datasets/owner/name@revision/data/train-*.parquet`. The commit that a name stood for
is kept for the life of the process, is written to the run's environment.json and holds for `--resume`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from ..jsonl import read_object

Kind = Literal["model", "dataset"]
_PART = r"[A-Za-z0-9][\w.-]*"
_MODEL = re.compile(rf"(?P<name>{_PART}/{_PART})(?:@(?P<revision>[\w.-]+))?")
_DATA = re.compile(rf"hf:/+datasets/{_MODEL.pattern}/(?P<files>.+)")  # a Path has one slash in the place of two
_commits: dict[str, str] = {}
_folders: dict[tuple[str, tuple[str, ...]], Path] = {}


class HubName(NamedTuple):
    """A name in parts."""

    name: str
    revision: str | None
    files: str = ""
    """Of data: a pattern."""


def model_name(text: str) -> HubName | None:
    """The name that `text` is; None for what exists here and for what is none."""
    found = None if Path(text).exists() else _MODEL.fullmatch(text)
    return None if found is None else HubName(**found.groupdict())


def data_name(path: Path) -> HubName | None:
    """The name that `path` is; None for a local path."""
    found = _DATA.fullmatch(str(path))
    return None if found is None else HubName(**found.groupdict())


def snapshot(kind: Kind, wanted: HubName, patterns: Sequence[str], key: str) -> Path:
    """The folder of the wanted files. Raises ValueError, naming the setting `key`, where they cannot be had.

    What the cache lacks is downloaded, unless HF_HUB_OFFLINE=1; a token, a mirror and the place of the cache are those
    of the library's own environment variables.
    """
    label = f"{kind}s/{wanted.name}" + (f"@{wanted.revision}" if wanted.revision else "")
    known = _folders.get((label, tuple(patterns)))
    if known is not None:
        return known
    shown = label.partition("/")[2]
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ValueError(
            f"{key}: {shown} is not there, and a name on the Hugging Face Hub needs: pip install huggingface_hub"
        ) from None
    revision = _commits.get(label, wanted.revision)
    try:
        folder = Path(snapshot_download(wanted.name, repo_type=kind, revision=revision, allow_patterns=list(patterns)))
    except Exception as error:
        told = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"{key}: {shown} is neither a local path nor to be had from the Hugging Face Hub or its cache: {told:.300}"
        ) from None
    _commits[label] = folder.name
    _folders[label, tuple(patterns)] = folder
    return folder


def data_files(path: Path, key: str) -> list[Path]:
    """The local files that `path` stands for: itself, or those of a name, sorted."""
    wanted = data_name(path)
    if wanted is None:
        return [path]
    found = sorted(snapshot("dataset", wanted, [wanted.files], key).glob(wanted.files))
    if not found:
        raise ValueError(f"{key}: {wanted.name} has no files like {wanted.files}")
    return found


def commits() -> dict[str, str]:
    """The commit of each name that was used, such as {"models/owner/name": "0123.."}."""
    return dict(_commits)


def resume(run: Path) -> None:
    """Names mean what they meant when `run` began."""
    path = run / "environment.json"
    if path.is_file():
        kept = read_object(path).get("hub")
        for label, commit in (kept if isinstance(kept, dict) else {}).items():
            if isinstance(label, str) and isinstance(commit, str):
                _commits[label] = commit
