"""Whether process rewards pay: arms from one warm-up with the same prompts and seeds, whatever run is still missing.

usage: python bench/study/study.py STAGE OUTPUT [--seeds N] [--arms NAME ..] [--jobs N] [-- WORDS ..]

The stages, each of which skips what is done and resumes what was interrupted; words after -- go to all runs:

    warmup   the problems, OUTPUT/data, the model that all arms start from, OUTPUT/sft, and a PRM, OUTPUT/prm, that was
             trained on 2,400 of its responses
    search   every arm with each of its learning rates, one seed that the study does not use: OUTPUT/search.json
    run      every arm with its best rates and its seeds, `--jobs` side by side with one thread each: OUTPUT/ARM-SEED
    collect  OUTPUT/study: the report of all finished runs, their metrics and configurations, and localisation.md
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from prime_trainer.report.markdown import grid
from prime_trainer.report.page import write_report
from prime_trainer.run.jsonl import read_jsonl

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE))
import chains  # noqa: E402

CONFIG = HERE / "study.toml"
OUTCOME_RATES = tuple(("--policy.lr", rate) for rate in ("2.5e-5", "5e-5", "1e-4", "2e-4"))
PROCESS_RATES = tuple(
    ("--policy.lr", rate, "--prm.lr", prm_rate) for rate in ("5e-5", "1e-4") for prm_rate in ("1e-4", "3e-4")
)
"""Learning rates that an arm is searched over: four settings for each arm, with a PRM or without."""
SEARCH_SEEDS = (1000,)
SEARCH_STEPS = 40
OUTCOMES_ALONE = ("--algorithm.process_coef", "0")
BALANCED = ("--prm.balance", "true")
LOCAL = (*BALANCED, "--algorithm.process_return", "gae", "--algorithm.whiten_of", "source", "--prm.ref_type", "policy")
TD = (*LOCAL, "--algorithm.gae_lambda", "0", "--prm.update", "before")
PREFIX = (*LOCAL, "--prm.kind", "prefix", "--prm.beta", "10")
OFFLINE_PRM = ("--train_prm.beta", "2", "--train_prm.lr", "3e-4", "--train_prm.epochs", "2")
ARMS: dict[str, tuple[int, tuple[str, ...]]] = {
    "rloo": (5, OUTCOMES_ALONE),
    "grpo": (5, (*OUTCOMES_ALONE, "--algorithm.estimator", "grpo", "--algorithm.whiten", "false")),
    "prime": (5, ()),
    "balanced": (5, BALANCED),
    "td": (5, TD),
    "td-warm": (5, (*TD, "--prm.path", "{prm}")),
    "prefix": (5, PREFIX),
    "prefix-candidates": (5, (*PREFIX, "--algorithm.candidates.coef", "0.1")),
}
"""Seeds and settings of each; {prm} is the PRM of the warm-up. The first is what the others are compared with."""
LOST, NOTHING_TO_LEARN = "lost", "groups has a mean accuracy in"
"""Mark of a run that ended early, and what `rl` says then: the policy solves nothing any more."""
REPORTED = ("config.json", "metrics.jsonl")


def call(words: Sequence[str], log: Path) -> None:
    """One command of the trainer with one thread, its output in `log`."""
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with log.open("a", encoding="utf-8") as file:
        command = [sys.executable, "-m", "prime_trainer.cli", *words]
        status = subprocess.run(command, stdout=file, stderr=file, env=os.environ | threads, check=False).returncode
    if status:
        raise RuntimeError(f"{words[0]} ended with status {status}: see {log}")


def train(command: str, output: Path, words: Sequence[str], config: Path = CONFIG) -> None:
    """A run, unless it is finished; one that left a checkpoint goes on from it."""
    if finished(command, output):
        print(f"{output}: done", flush=True)
        return
    resume = any((output / "checkpoints").glob("step_*"))
    if not resume and output.exists():
        shutil.rmtree(output)  # ended before its first checkpoint
    output.parent.mkdir(parents=True, exist_ok=True)
    print(f"{output}: {'goes on' if resume else 'starts'}", flush=True)
    last = ["--resume"] if resume else []
    call([command, str(config), "--output", str(output), *words, *last], output.parent / f"{output.name}.log")


def finished(command: str, output: Path) -> bool:
    """A run of `rl` that was stopped has a `final`, too, and goes on."""
    if (output / LOST).exists():
        return True
    if command != "rl" or not (output / "final").is_dir():
        return (output / "final").is_dir()
    steps = [row["step"] for row in read_jsonl(output / "metrics.jsonl") if row["stage"] == "rl"]
    return max(steps) >= json.loads((output / "config.json").read_text(encoding="utf-8"))["steps"]


def train_or_lose(output: Path, words: Sequence[str]) -> None:
    """As `train` of `rl`, but a run whose policy solves nothing any more is a result, and finished."""
    try:
        train("rl", output, words)
    except RuntimeError:
        if NOTHING_TO_LEARN not in (output.parent / f"{output.name}.log").read_text(encoding="utf-8"):
            raise
        (output / LOST).touch()


def rewards_of(run: Path) -> list[float]:
    return [row["reward"] for row in read_jsonl(run / "metrics.jsonl") if row["stage"] == "rl"]


def side_by_side(jobs: int, runs: Sequence[tuple[Path, list[str]]]) -> None:
    """All of them, in order; the first error is raised once those that have begun are through."""
    if jobs == 1:
        for output, words in runs:
            train_or_lose(output, words)
        return
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(train_or_lose, output, words) for output, words in runs]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def rates_of(arm: str) -> tuple[tuple[str, ...], ...]:
    return OUTCOME_RATES if set(OUTCOMES_ALONE) <= set(ARMS[arm][1]) else PROCESS_RATES


def search(output: Path, arms: Sequence[str], jobs: int, words: list[str]) -> dict[str, list[str]]:
    """The learning rates of highest mean reward for each arm, every arm with the same budget."""

    def place_of(arm: str, rates: tuple[str, ...], seed: int) -> Path:
        return output / "search" / "-".join((arm, *rates[1::2], str(seed)))

    runs = [(arm, rates, seed) for seed in SEARCH_SEEDS for arm in arms for rates in rates_of(arm)]
    short = ["--steps", str(SEARCH_STEPS), "--eval.every", "0", *words]
    side_by_side(jobs, [
        (place_of(arm, rates, seed), [*of_arm(output, arm, seed), *rates, *short]) for arm, rates, seed in runs
    ])  # fmt: skip
    place = output / "search.json"
    found = json.loads(place.read_text()) if place.is_file() else {}
    for arm in arms:
        tried = {rates: [mean_reward(place_of(arm, rates, seed)) for seed in SEARCH_SEEDS] for rates in rates_of(arm)}
        best = max(tried, key=lambda rates: sum(tried[rates]))
        found[arm] = {
            "best": list(best), "mean rewards": {" ".join(rates): rewards for rates, rewards in tried.items()}
        }  # fmt: skip
    place.write_text(json.dumps(found, indent=1) + "\n")
    return {arm: found[arm]["best"] for arm in arms}


def mean_reward(run: Path) -> float:
    """Over all steps; 0 after the last step of a run that ended early, as one does whose policy has been lost."""
    return sum(rewards_of(run)) / SEARCH_STEPS


def of_arm(output: Path, arm: str, seed: int) -> list[str]:
    model, prm = output / "sft" / "final", output / "prm" / "final"
    settings = [word.format(prm=prm) for word in ARMS[arm][1]]
    return ["--model.path", str(model), "--seed", str(seed), *problems(output), *settings]


def problems(output: Path) -> list[str]:
    data = output / "data"
    return ["--task.path", str(data / "train.jsonl"), "--task.eval_path", str(data / "held_out.jsonl")]


def warm_up(output: Path, words: list[str]) -> None:
    data = output / "data"
    if not (output / "sft" / "final").is_dir():
        chains.write(data)
    model, worked = ("--model.path", str(data / "untrained")), ("--sft.path", str(data / "worked.jsonl"))
    train("sft", output / "sft", [*model, *worked, *problems(output), *words])
    train_prm(output, words)


def train_prm(output: Path, words: list[str]) -> None:
    """A PRM from labelled responses of the model that all arms start from."""
    responses = output / "responses"
    start = ["--model.path", str(output / "sft" / "final"), *problems(output)]
    if not (output / "prm" / "final").is_dir():
        sample = [sys.executable, str(HERE.parent / "prm" / "sample.py"), str(CONFIG)]
        subprocess.run([*sample, *start, "--output", str(responses)], check=True)
    given = {"path": responses / "train.jsonl", "eval_path": responses / "test.jsonl", "cache": output / "cache"}
    data = [word for key, path in given.items() for word in (f"--train_prm.{key}", str(path))]
    train("prm", output / "prm", [*start, *data, *OFFLINE_PRM, *words])


def study(output: Path, arms: Sequence[str], seeds: int | None, jobs: int, words: list[str]) -> None:
    place = output / "search.json"
    rates = json.loads(place.read_text()) if place.is_file() else {}
    runs = []
    # A seed of every arm before the next seed: an interrupted study compares all arms over fewer seeds.
    for seed in range(max(ARMS[arm][0] for arm in arms) if seeds is None else seeds):
        for arm in arms:
            if seeds is None and seed >= ARMS[arm][0]:
                continue
            best = rates[arm]["best"] if arm in rates else []
            runs.append((output / f"{arm}-{seed}", [*of_arm(output, arm, seed), *best, *words]))
    side_by_side(jobs, runs)


def collect(output: Path, arms: Sequence[str]) -> Path:
    ended = {arm: [path for end in ("final", LOST) for path in output.glob(f"{arm}-[0-9]*/{end}")] for arm in arms}
    found = {arm: sorted(path.parent for path in ended[arm]) for arm in arms}
    runs = [path for arm in arms for path in found[arm]]
    if not runs:
        raise FileNotFoundError(f"{output} has no finished run")
    target = output / "study"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for run in runs:
        for name in REPORTED:
            shutil.copy(run / name, target / f"{run.name}.{name}")
    report = write_report(runs[0], runs[1:]).parent
    for path in (*report.glob("*.png"), report / "summary.md"):
        shutil.copy(path, target / path.name)
    if (output / "search.json").is_file():
        shutil.copy(output / "search.json", target)
    rows = [[arm, *cells] for arm in arms for cells in localisation(found[arm])]
    header = ["arm", "steps", "wrong responses", "lowest reward on the first wrong line", "chance"]
    (target / "localisation.md").write_text(grid(header, rows), encoding="utf-8")
    return target


def localisation(runs: Sequence[Path]) -> list[list[Any]]:
    """A row for each half of the steps: of the wrong responses with a known first wrong line, how many have their
    lowest line reward on it, and how many would if a line were drawn at random."""
    rows = [row for run in runs for row in read_jsonl(run / "samples.jsonl") if row["process_rewards"] is not None]
    middle = max((row["step"] for row in rows), default=0) / 2
    out = []
    for name, own in (
        ("first half", [row for row in rows if row["step"] <= middle]),
        ("second half", [row for row in rows if row["step"] > middle]),
    ):
        hits, chances = [], []
        for row in own:
            lines, rewards = by_line(row["tokens"], row["process_rewards"])
            question = row["prompt"].removesuffix("?")
            wrong = chains.first_wrong_line(question, lines) if row["outcome"] < 1 and len(lines) > 1 else None
            if wrong is not None:
                hits.append(rewards.index(min(rewards)) == wrong)
                chances.append(1 / len(lines))
        if hits:
            share, chance = (f"{100 * sum(each) / len(each):.0f} %" for each in (hits, chances))
            out.append([name, len(hits), share, chance])
    return out


def by_line(tokens: Sequence[str], rewards: Sequence[float]) -> tuple[list[str], list[float]]:
    """The lines of a response and the sum of each one's rewards; the end-of-sequence token belongs to the last."""
    lines, sums = [""], [0.0]
    for token, reward in zip(tokens, rewards, strict=True):
        lines[-1] += token
        sums[-1] += reward
        if token.endswith("\n"):
            lines.append("")
            sums.append(0.0)
    lines[-1] = lines[-1].partition("<|")[0]
    kept = [k for k, line in enumerate(lines) if line.strip()]
    return [lines[k] for k in kept], [sums[k] for k in kept]


def main(argv: Sequence[str]) -> None:
    words = list(argv)
    own, rest = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    parser = argparse.ArgumentParser(prog="study.py", description=__doc__.partition("\n")[0])
    parser.add_argument("stage", choices=("warmup", "search", "run", "collect"))
    parser.add_argument("output", type=Path)
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args(own)
    if args.stage == "collect":
        print(collect(args.output, args.arms))
        return
    warm_up(args.output, rest)
    if args.stage == "search":
        print(search(args.output, args.arms, args.jobs, rest))
    elif args.stage == "run":
        study(args.output, args.arms, args.seeds, args.jobs, rest)


if __name__ == "__main__":
    main(sys.argv[1:])
