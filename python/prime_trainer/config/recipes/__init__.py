"""Settings to start from, each with comments: what `prime-trainer init` writes."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

RECIPES = {
    "demo": "a 135M model learns sums, minutes on two CPU cores",
    "math": "mathematics with answers, one GPU",
    "code": "programs that must pass tests, one GPU",
    "prm": "an implicit PRM from labelled responses",
    "eight_gpus": "a 7B model on eight GPUs: four train, four sample",
}


def text(recipe: str) -> str:
    """The TOML of a recipe. Raises ValueError for one that is not there."""
    if recipe not in RECIPES:
        raise ValueError(f"init: expected one of the recipes {', '.join(RECIPES)}, got {recipe!r}")
    return (resources.files(__package__) / f"{recipe}.toml").read_text(encoding="utf-8")


def write(recipe: str, path: Path) -> None:
    """Writes a recipe to a new file. Raises FileExistsError where there is one."""
    settings = text(recipe)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(settings)
    except FileExistsError:
        raise FileExistsError(f"{path} is already there; give another name: prime-trainer init {recipe} FILE") from None
