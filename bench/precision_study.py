"""Whether rounded logits matter to a run: the demo with either, from one warm-up, whatever run is still missing.

usage: python bench/precision_study.py OUTPUT [--seeds 3] [--config examples/demo.toml] [-- WORDS ..] > precision.md

OUTPUT/sft is the model that all runs start from, OUTPUT/float32-SEED and OUTPUT/input-SEED are runs with the same
prompts for the same seed. Called again after an interruption it goes on from the last checkpoint of each. Words after
-- go to all runs: `-- --rollout.engine vllm` compares with an engine whose logits are switched together with the
trainer's.

The table has, for each, what equal weights and one more layout of the same tokens make of log-ratios, which are the
process rewards before their coefficient, and means over steps and seeds of what the runs log.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

import prime_kernels as pk
from prime_trainer.config.load import load
from prime_trainer.models import lm_head, loading
from prime_trainer.report import markdown
from prime_trainer.run.jsonl import read_jsonl
from prime_trainer.run.provenance import environment

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "study")]
from precision import LOGITS, apart, in_padded_rows, one_by_one, texts_of  # noqa: E402
from study import train  # noqa: E402

DEMO = HERE.parent / "examples" / "demo.toml"
TOKENS = 512
LOGGED = {
    "prm_pair_accuracy": "PRM pair accuracy",
    "mismatch": "mismatch with the engine",
    "reward": "reward",
}
"""Metrics of `rl` that the table has, by name."""


def log_ratios(of: Sequence[pk.Head], ids: Tensor, logits_dtype: str) -> Tensor:
    return pk.linear_log_ratios(*of, ids, logits_dtype=logits_dtype).log_ratio


@torch.no_grad()
def of_weights(
    config: Path, words: Sequence[str], start: Path, run: Path, logits_dtype: Literal["float32", "input"]
) -> dict[str, str]:
    """Log-ratios of the task's prompts: of the start with itself, and of the run's PRM in two layouts of the rows."""
    cfgs = [load(config, [*words, "--model.path", str(path)]) for path in (run / "prm", start)]
    texts, models = texts_of(cfgs[1], TOKENS), [loading.load_model(cfg.model) for cfg in cfgs]
    layouts = [[lm_head.head(model, read(model, texts)) for model in models] for read in (one_by_one, in_padded_rows)]
    ids = torch.tensor([token for text in texts for token in text[1:]], device=layouts[0][0].hidden.device)
    same = layouts[0][1]
    equal = log_ratios([same, same._replace(weight=same.weight.clone())], ids, logits_dtype)
    one, other = (log_ratios(heads, ids, logits_dtype) for heads in layouts)
    return {
        "log-ratio of equal weights, largest": f"{equal.abs().max().item():g}",
        "of trained ones in another layout, mean / worst": " / ".join(apart(one, other)),
        "their size, mean": f"{one.abs().mean().item():.1e}",
    }


def of_steps(runs: Sequence[Path]) -> dict[str, str]:
    """Means over the steps of each run, and of those over the runs; the spread is that of the runs."""
    found = {}
    for key, name in LOGGED.items():
        rows = [[row for row in read_jsonl(run / "metrics.jsonl") if row["stage"] == "rl"] for run in runs]
        means = [statistics.fmean(row[key] for row in each if key in row) for each in rows]
        spread = f" ± {statistics.stdev(means):.2g}" if len(means) > 1 else ""
        found[name] = f"{statistics.fmean(means):.4g}{spread}"
    return found


def main(argv: Sequence[str]) -> None:
    words = list(argv)
    own, rest = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    parser = argparse.ArgumentParser(prog="precision_study.py", description=__doc__.partition("\n")[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--config", type=Path, default=DEMO)
    args = parser.parse_args(own)
    start = args.output / "sft" / "final"
    # A seed of both before the next seed: an interrupted study compares them over fewer seeds.
    runs = {(name, seed): args.output / f"{name}-{seed}" for seed in range(args.seeds) for name in LOGITS}
    with redirect_stdout(sys.stderr):  # what goes on is no part of the table
        train("sft", args.output / "sft", rest, args.config)
        for (name, seed), run in runs.items():
            settings = ["--model.path", str(start), "--seed", str(seed), "--model.logits_dtype", name]
            train("rl", run, [*settings, "--checkpoint.every", "2", *rest], args.config)
    rows = []
    for name, shown in LOGITS.items():
        own_runs = [run for (other, _), run in runs.items() if other == name]
        found = of_weights(args.config, rest, start, own_runs[0], name) | of_steps(own_runs)
        rows.append({"logits": shown, "runs": str(len(own_runs))} | found)
    print(markdown.table(rows))
    print(environment())


if __name__ == "__main__":
    main(sys.argv[1:])
