"""Completion of commands, keys and values in a shell, as a script made from the configuration."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Union, get_args, get_origin

from .load import fields
from .recipes import RECIPES
from .run_config import RunConfig

SHELLS = ("bash", "zsh", "fish")

_BASH = """\
_prime_trainer() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} choices=
  COMPREPLY=()
  if [ "$COMP_CWORD" = 1 ]; then
    choices="{commands}"
  elif [ "$COMP_CWORD" = 2 ] && [ "$before" = init ]; then
    choices="{recipes} --schema"
  elif [ "$COMP_CWORD" = 2 ] && [ "$before" = completion ]; then
    choices="{shells}"
  else
    case "$before" in
{values}
      *) case "$word" in -*) choices="{keys}" ;; esac ;;
    esac
  fi
  if [ -n "$choices" ]; then
    COMPREPLY=($(compgen -W "$choices" -- "$word"))
  else
    COMPREPLY=($(compgen -f -- "$word"))
  fi
}}
complete -o filenames -F _prime_trainer prime-trainer
"""


def script(shell: str, commands: Mapping[str, str]) -> str:
    """The script for `shell`; `commands` have a line of help each. Raises ValueError for another shell."""
    if shell not in SHELLS:
        raise ValueError(f"completion: expected one of {', '.join(SHELLS)}, got {shell!r}")
    if shell == "fish":
        return "\n".join(_fish(commands)) + "\n"
    values = [f'      --{key}) choices="{" ".join(words)}" ;;' for key, words in _choices()]
    bash = _BASH.format(
        commands=" ".join(commands), recipes=" ".join(RECIPES), shells=" ".join(SHELLS), values="\n".join(values),
        keys=" ".join(f"--{key}" for key, _ in _leaves()),
    )  # fmt: skip
    return bash if shell == "bash" else f"autoload -U +X bashcompinit && bashcompinit\n{bash}"


def _fish(commands: Mapping[str, str]) -> Iterator[str]:
    first = "complete -c prime-trainer -n __fish_use_subcommand -f"
    for name, about in commands.items():
        yield f"{first} -a {name} -d {_quoted(about)}"
    for name, words in (("init", RECIPES), ("completion", SHELLS)):
        yield f"complete -c prime-trainer -n '__fish_seen_subcommand_from {name}' -f -a {_quoted(' '.join(words))}"
    choices = dict(_choices())
    for key, _ in _leaves():
        values = f" -x -a {_quoted(' '.join(choices[key]))}" if key in choices else ""
        yield f"complete -c prime-trainer -l {key}{values}"


def _leaves() -> Iterator[tuple[str, Any]]:
    """Keys that hold values, with their types."""
    return ((key, kind) for key, kind in fields(RunConfig) if not hasattr(kind, "model_fields"))


def _choices() -> Iterator[tuple[str, list[str]]]:
    """The keys that take a few words, with these words."""
    for key, kind in _leaves():
        words = _words(kind)
        if words:
            yield key, words


def _words(kind: Any) -> list[str]:
    if kind is bool:
        return ["true", "false"]
    if get_origin(kind) is Literal:
        return [str(word) for word in get_args(kind)]
    if get_origin(kind) in (Union, types.UnionType):
        found = [_words(part) for part in get_args(kind) if part is not type(None)]
        return [word for words in found for word in words] if all(found) else []
    return []


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
