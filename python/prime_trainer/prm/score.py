"""`prime-trainer score`: a file of responses in, a file of rewards out, a window of responses in memory at a time."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from ..config.run_config import RunConfig
from ..config.sections import AdapterConfig, ScoreConfig
from ..data.groups import TooLong
from ..errors import RunError
from ..models import loading, prm_record, tokenizers
from ..models.adapters.views import as_model
from ..models.placement import load_base, put_adapter
from ..models.protocols import CausalLM, Tokenizer
from ..run import checkpoint, unchanged
from ..run.checkpoint import FINGERPRINTS
from ..run.jsonl import JsonlWriter, cut_torn_tail, jsonl_rows, read_object
from ..run.output_lock import owns_output
from ..run.progress import progress_bar
from ..run.stop_signal import stop_signal
from .items import Item, read_items
from .page import write_page
from .step_scorer import Encoded, NotFinite, StepRewards, StepScorer

SCORES = "scores.jsonl"
SPEED = "speed.jsonl"
"""A row a window: how many responses, and the seconds that their rewards took."""
_WRITTEN = ("rewards", "error", "reward_model")


@owns_output
def run(cfg: RunConfig) -> Path:
    """Scores `cfg.score.path` with the PRM `cfg.model`; returns the path of the scores.

    A row of `scores.jsonl` is the input's row (of one with completions, a row each) with `reward_model`, `benchmark`
    and `rewards`: {value, steps, single, cumulative, tokens, token_rewards, cu_steps, response: {single: {min, mean,
    sum, last}, cumulative: {..}}}. Rows are written as windows are done; Ctrl-C or an error keeps them, and `--resume`
    goes on after them, with the same models and where the input up to there is the same. A response on which a model
    overflows ends the run with an error after its window, and stands there with `error` in place of rewards.
    """
    return score_file(cfg, Models(cfg))


class Models:
    """The PRM `cfg.model` and its reference, read when they are first asked for, once for all files that they score."""

    def __init__(self, cfg: RunConfig) -> None:
        base, given = cfg.model.model_copy(update={"adapter": AdapterConfig()}), cfg.score.reference
        self._cfg, self._adapted = cfg, cfg.model.adapter.path is not None
        if not self._adapted:
            if given is None:
                raise ValueError("score.reference is required")
            base = base.elsewhere(given, "score.reference")
        elif given is not None and str(given) != str(Path(base.path)):
            raise ValueError(
                f"score.reference = {str(given)!r}: the reference of an adapter (model.adapter.path) is its base, "
                f"model.path = {base.path!r}: leave it out"
            )
        self._reference = base

    @cached_property
    def tokenizer(self) -> Tokenizer:
        tokenizer = tokenizers.load_tokenizer(self._cfg.model)
        tokenizers.check_same_tokenizer(
            tokenizer, tokenizers.load_tokenizer(self._reference), ("model.path", "score.reference")
        )
        return tokenizer

    @cached_property
    def fingerprints(self) -> dict[str, Any]:
        """What decides the scores beside the settings and the responses."""
        trained = prm_record.of_model(self._cfg.model)
        return {
            **loading.fingerprints({"model.path": self._cfg.model, "score.reference": self._reference}),
            "tokenizer": tokenizers.TokenizerIdentity.of(self.tokenizer).fingerprint(),
            f"{prm_record.RECORD} of model.path": None if trained is None else asdict(trained),
        }

    @cached_property
    def pair(self) -> tuple[CausalLM, CausalLM]:
        if self._adapted:  # in one model in memory
            base = load_base(self._cfg.model)
            return as_model(put_adapter(base, "prm", self._cfg.model, 0)), as_model(base.view(None))
        prm, reference = (loading.frozen(loading.load_model(cfg)) for cfg in (self._cfg.model, self._reference))
        return prm, reference

    @cached_property
    def scorer(self) -> StepScorer:
        own, (prm, reference) = self._cfg.score, self.pair
        return StepScorer(
            prm, reference, self.tokenizer, beta=own.beta, value=own.value, splitter=own.splitter,
            compat=own.compat, micro_batch_tokens=self._cfg.micro_batch_tokens, max_length=own.max_length,
        )  # fmt: skip


def score_file(cfg: RunConfig, models: Models) -> Path:
    """Scores `cfg.score.path` into `cfg.output`, as `run` says; `models` are those of `cfg`."""
    own = cfg.score
    if own.path is None:
        raise ValueError("score.path is required")
    out = cfg.output / SCORES
    done = _begin(cfg, out)
    fingerprints = models.fingerprints
    items = read_items(own.path, "score.path")
    if done:
        _check_fingerprints(cfg.output / FINGERPRINTS, fingerprints)
        _skip(items, out)
    total = _count(own.path)
    if done < total or not total:
        scorer = models.scorer
        checkpoint.write_config(cfg, fingerprints)
        names = {"reward_model": own.name or cfg.model.path, "benchmark": own.path.stem}
        _score(own, items, names, scorer, out, done, total)
    if own.page_rows:
        write_page(out, cfg.output / "index.html", own.page_rows)
    return out


def _begin(cfg: RunConfig, out: Path) -> int:
    """The number of rows that are there. Refuses to overwrite scores, or to go on with other settings."""
    if not cfg.resume:
        if out.exists():
            raise ValueError(f"{out} already exists; give another --output, or --resume to continue it")
        return 0
    config = cfg.output / "config.json"
    if config.is_file():
        free = {"window", "page_rows"}
        old, new = (
            {"model": c.get("model")} | dict(c.get("score") or {})
            for c in (read_object(config), cfg.model_dump(mode="json"))
        )
        changed = "--resume: the configuration has changed"
        unchanged.check(old, new, [key for key in new if key not in free], changed)
    return cut_torn_tail(out)


def _check_fingerprints(path: Path, now: dict[str, Any]) -> None:
    if not path.is_file():
        raise ValueError(f"--resume: {path} is missing: what the scores beside it are from cannot be told")
    saved = read_object(path)
    changed = unchanged.differing(saved, now)
    if changed:
        raise ValueError(f"--resume: not what the scores there are from: {', '.join(changed)} has changed since")


def _score(
    own: ScoreConfig,
    items: Iterator[Item],
    names: dict[str, str],
    scorer: StepScorer,
    out: Path,
    done: int,
    total: int,
) -> None:
    """`names`: `reward_model` and, for rows that name none, `benchmark`."""
    windows = math.ceil(total / own.window)
    cut_torn_tail(out.with_name(SPEED))
    with (
        progress_bar("score", windows, done // own.window) as bar,
        stop_signal() as stop,
        JsonlWriter(out) as file,
        JsonlWriter(out.with_name(SPEED)) as speed,
    ):
        while True:
            if stop.is_set() and done < total:
                raise RunError(f"stopped after {done} of {total} responses; --resume goes on")
            window, failure = _take(items, own.window)
            if window:
                began = time.perf_counter()
                rows, bad = _rows(window, scorer, own)
                speed.append([{"responses": len(rows), "seconds": time.perf_counter() - began}])
                file.append(
                    row | names | ({"benchmark": row["benchmark"]} if row.get("benchmark") else {}) for row in rows
                )
                if bad is not None:
                    raise bad
                done += len(window)
                bar.advance(f"{done} of {total} responses of {names['benchmark']}")
            if failure is not None:
                raise failure
            if len(window) < own.window:
                break


def _take(items: Iterator[Item], count: int) -> tuple[list[Item], Exception | None]:
    """The next items, and what a bad row after them raised: those before it are scored first."""
    window: list[Item] = []
    try:
        for item in itertools.islice(items, count):
            window.append(item)
    except ValueError as error:
        return window, error
    return window, None


def _rows(window: list[Item], scorer: StepScorer, own: ScoreConfig) -> tuple[list[dict[str, Any]], ValueError | None]:
    """The rows of the responses up to the first that cannot be read, and the error to end with once they are kept."""
    encoded: list[Encoded | TooLong] = []
    failure = None
    for item in window:
        try:
            encoded.append(scorer.encode(item))
        except TooLong as error:
            if own.too_long == "error":
                failure = ValueError(f"{error} (score.too_long = 'skip' goes on without it)")
                break
            encoded.append(error)
        except ValueError as error:
            failure = error
            break
    rewards = iter(scorer.score([each for each in encoded if isinstance(each, Encoded)]))
    rows, overflow = [], None
    for item, each in zip(window, encoded, strict=False):
        found = next(rewards) if isinstance(each, Encoded) else each
        if isinstance(found, StepRewards):
            rows.append({**item.row, "rewards": as_row(found, own.tokens)})
        else:
            rows.append({**item.row, "rewards": None, "error": str(found)})
        if overflow is None and isinstance(found, NotFinite):
            overflow = ValueError(f"{found}; it stands in the scores without rewards and --resume goes on after it")
    return rows, overflow or failure


def as_row(rewards: StepRewards, tokens: bool) -> dict[str, Any]:
    """Seven significant digits: all that float32 has."""

    def short(values: list[float]) -> list[float]:
        return [float(f"{value:.7g}") for value in values]

    row: dict[str, Any] = {"value": rewards.value, "steps": rewards.steps, "cu_steps": rewards.cu_steps}
    for mode in ("single", "cumulative"):
        row[mode] = short(getattr(rewards, mode))
    row["response"] = {
        mode: {name: float(f"{value:.7g}") for name, value in rewards.response(mode).items()}
        for mode in ("single", "cumulative")
    }
    if tokens:
        row |= {"tokens": rewards.tokens, "token_rewards": short(rewards.token_rewards)}
    return row


def _count(path: Path) -> int:
    """Responses in the file, up to the first bad row: for the progress bar."""
    count = 0
    try:
        for _ in read_items(path, "score.path"):
            count += 1
    except ValueError:
        return count
    return count


def _skip(items: Iterator[Item], out: Path) -> None:
    """Passes over the responses that are scored, after checking each: what comes after them may have been mended."""
    for number, (_, scored) in enumerate(jsonl_rows(out), 1):
        item = next(items, None)
        given = {} if item is None else item.row | {"benchmark": item.row.get("benchmark") or scored.get("benchmark")}
        was, now = ({key: row[key] for key in row if key not in _WRITTEN} for row in (scored, given))
        if was != now:
            raise ValueError(
                f"--resume: row {number} of {out} is not response {number} of score.path: the input has changed"
            )
