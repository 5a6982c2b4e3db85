"""What an implicit PRM was trained as, in a file beside its weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from ..config.sections import ModelConfig, PRMKind, PRMLossConfig, ScoreValue
from ..run.jsonl import read_object
from . import loading

RECORD = "prm.json"


@dataclass(frozen=True)
class Trained:
    """The loss of a PRM's outcomes and its beta."""

    kind: PRMKind
    beta: float

    @property
    def value(self) -> ScoreValue:
        return "mean" if self.kind == "prefix" else "sum"


def files(cfg: PRMLossConfig, kept_from: ModelConfig | None = None) -> dict[str, dict[str, Any]]:
    """What to save beside a PRM, a JSON object by its file name; of one that was not trained, the record of the
    model `kept_from`, where it is from."""
    known = Trained(cfg.kind, cfg.scale) if kept_from is None else of_model(kept_from)
    return {} if known is None else {RECORD: asdict(known)}


def read(directory: str | Path) -> Trained | None:
    """None where there is no record, as beside a PRM from elsewhere. Raises ValueError for one that cannot be used."""
    path = Path(directory) / RECORD
    if not path.is_file():
        return None
    found = read_object(path)
    beta = found.get("beta")
    kind = next((each for each in get_args(PRMKind) if each == found.get("kind")), None)
    if kind is None:
        raise ValueError(f"{path}: kind must be one of {', '.join(get_args(PRMKind))}, got {found.get('kind')!r}")
    if isinstance(beta, bool) or not isinstance(beta, (int, float)) or not 0 < beta < float("inf"):
        raise ValueError(f"{path}: beta must be a number above 0, got {beta!r}")
    return Trained(kind, float(beta))


def of_model(model: ModelConfig) -> Trained | None:
    """Of the model, or of its adapter, where it lies on this machine, a name on the Hub included; None for a GGUF
    file."""
    directory = model.adapter.path or loading.directory(model)
    return None if directory is None else read(directory)


def check_goes_on(model: ModelConfig, cfg: PRMLossConfig) -> None:
    """Raises ValueError where the PRM that `rl` starts from has values of another sort than the loss of `cfg` fits: one
    is the mean of log-ratios, the other their sum."""
    before = of_model(model)
    if before is not None and before.value != Trained(cfg.kind, cfg.scale).value:
        raise ValueError(
            f"prm.path = {model.path!r} was trained with kind {before.kind!r} ({RECORD}), got prm.kind = "
            f"{cfg.kind!r}: one fits the mean of log-ratios, the other their sum"
        )
