"""Files and directories that are replaced as a whole: a crash leaves the old one or the new one."""

from __future__ import annotations

import os
from pathlib import Path


def replace_directory(new: Path, target: Path) -> None:
    """Puts `new` in the place of `target`; at no moment is there neither an old nor a new one to find."""
    import shutil

    old = target.with_name(target.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    new.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def replace_file(path: Path, text: str) -> None:
    """Writes `text` so that a crash leaves the old file or the new one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    sync(partial)
    partial.replace(path)


def sync(path: Path) -> None:
    """Waits until a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
