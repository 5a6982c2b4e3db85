"""Files and directories that are replaced as a whole: after a crash there is the old one or the new one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """The path at which to write a file that replaces `target` when the block ends; removed if the block fails."""
    partial = target.with_name(target.name + ".partial")
    try:
        yield partial
        sync(partial)
        partial.replace(target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(target.parent)


def replace_file(target: Path, content: str | bytes) -> None:
    """Writes `content`, text as UTF-8, in place of `target`."""
    with replacing(target) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def replace_directory(new: Path, target: Path) -> None:
    """Renames `new`, whose files are on the disk before that, to `target`, whose old content is removed afterwards.

    A crash between the two renames leaves the old directory as `.NAME.old` beside its place: see `recover_directory`.
    """
    for path in [*new.rglob("*"), new]:
        sync(path)
    old = target.with_name(f".{target.name}.old")
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
    new.rename(target)
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover_directory(old: Path) -> None:
    """Puts `.NAME.old`, which an interrupted `replace_directory` left, back in the place of NAME if that is missing."""
    target = old.with_name(old.name.removeprefix(".").removesuffix(".old"))
    if not target.exists():
        old.rename(target)


def sync(path: Path) -> None:
    """Waits until a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
