"""JSON that may be damaged, or anybody's: one line that names the file, whatever is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def parse_json(text: str | bytes, where: str) -> Any:
    """The value of `text`. Raises ValueError that begins with `where`, for nesting that Python does not follow too."""
    try:
        return json.loads(text.decode() if isinstance(text, bytes) else text)
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8: {error.reason} at byte {error.start}") from None
    except ValueError as error:
        raise ValueError(f"{where}: not JSON: {error}") from None
    except RecursionError:
        raise ValueError(f"{where}: JSON that is nested too deeply") from None


def read_json(path: Path) -> Any:
    """The value in a file. Raises ValueError or OSError that names it."""
    return parse_json(path.read_bytes(), str(path))


def read_object(path: Path) -> dict[str, Any]:
    """The object in a file. Raises ValueError or OSError that names it."""
    found = read_json(path)
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(found).__name__}")
    return found
