"""Reads the configuration of a run: a TOML file, then overrides from the command line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_settings import SettingsError

from .run_config import RunConfig, _toml_file
from .suggest import did_you_mean

REMOVED = {"sft.pack": "examples share rows wherever the model can keep them apart; leave it out"}
"""Keys of earlier versions, with what a run does now. Those of a run that goes on are passed over."""


def load(toml: Path | None, overrides: list[str] | None = None) -> RunConfig:
    """Reads `toml` and applies `overrides` (`["--policy.lr", "1e-6"]`, command-line form).

    Raises FileNotFoundError for a missing file, ValueError (pydantic's ValidationError among them) for a bad or unknown
    key, for words that are no option and for a file that is not TOML.
    """
    if toml is not None and not toml.is_file():
        if toml.is_dir():
            raise IsADirectoryError(f"config file expected, got a directory: {toml}")
        raise FileNotFoundError(f"config file not found: {toml}")
    words = _switches(list(overrides or []))
    known = set(keys())
    for at, word in enumerate(words):
        key, equals, value = word.removeprefix("--").partition("=")
        if word.startswith("--") and key.replace("-", "_") in known:  # --wait-lock is --wait_lock
            words[at] = word = f"--{key.replace('-', '_')}{equals}{value}"
            key = key.replace("-", "_")
        # argparse would answer a misspelt key with all two hundred lines of usage.
        if word.startswith("--") and key not in known and key.removeprefix("no-") not in known and key != "help":
            raise ValueError(f"unknown key --{key}{close_keys(key)}")
    token = _toml_file.set(toml)
    try:
        options: dict[str, Any] = {"_cli_parse_args": words, "_cli_prog_name": "prime-trainer"}
        return RunConfig(**options)
    except SettingsError as error:
        raise ValueError(str(error).removeprefix("error parsing CLI: ")) from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{toml} is not UTF-8: {error.reason} at byte {error.start}") from None
    except RecursionError:
        raise ValueError(f"{toml} is nested too deeply") from None
    except ValueError as error:
        if type(error).__name__ != "TOMLDecodeError":
            raise
        raise ValueError(f"{toml} is not TOML: {error}") from None
    finally:
        _toml_file.reset(token)


def _switches(words: list[str]) -> list[str]:
    """`--resume true` and `--scale.shard=false` as argparse has them: `--resume` and `--no-scale.shard`."""
    options = {f"--{key}" for key, kind in fields(RunConfig) if kind is bool}
    out: list[str] = []
    for word in words:
        name, equals, value = word.partition("=")
        if not equals and out and out[-1] in options:
            name, value = out[-1], word
        if name in options and value in ("true", "false"):
            if not equals:
                out.pop()
            out.append(name if value == "true" else f"--no-{name.removeprefix('--')}")
        else:
            out.append(word)
    return out


def keys() -> Iterator[str]:
    """Every key, sections included, dotted."""
    return (key for key, _ in fields(RunConfig))


def fields(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key with its type."""
    for name, field in section.model_fields.items():
        yield prefix + name, field.annotation
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from fields(field.annotation, f"{prefix}{name}.")


def close_keys(key: str) -> str:
    """What to do about a key that is not known: of one that was, what came in its place."""
    gone = REMOVED.get(key.removeprefix("no-"))
    return f"; it was removed: {gone}" if gone else did_you_mean(key, keys())
