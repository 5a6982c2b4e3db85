"""The study of process rewards and that of the precision of logits, at their smallest."""

import json
import random
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("transformers", reason="the trainer's packages are not installed: pip install '.[train]'")

from prime_trainer import cli
from prime_trainer.config.load import load
from prime_trainer.config.sections import ModelConfig
from prime_trainer.models.tokenizers import load_tokenizer, render


def test_study(module, tmp_path, monkeypatch, capsys):
    """One step of two arms: the search, the runs, what is skipped and what is resumed, and what is collected."""
    study, called = module("study/study"), []

    def call(words, log):
        called.append(words)
        if "lost" in words:
            log.write_text("none of 8 groups has a mean accuracy in [0.1, 0.9]")
            (tmp_path / "gone").mkdir()  # with the checkpoint that such a run leaves
            raise RuntimeError(words)
        assert cli.main(list(words)) == 0

    def sample(command, check):
        """In place of bench/prm/sample.py, of which a model without training gets nothing right."""
        assert check and command[1].endswith("sample.py")
        rows = [{"prompt": f"{k}+1", "completions": ["2", "3"], "correctness": [1, 0]} for k in range(4)]
        folder = Path(command[command.index("--output") + 1])
        folder.mkdir()
        for name in ("train", "test"):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    for seeds, settings in study.ARMS.values():  # none of them a misspelt key or a value out of range
        words = [word.format(prm="x") for word in settings]
        assert seeds > 0 and load(study.CONFIG, ["--task.path", "x", *words]).prm.lr == 3e-4
    assert {len(study.rates_of(arm)) for arm in study.ARMS} == {4}  # the same budget
    assert "--prm.lr" not in study.rates_of("grpo")[0] and "--prm.lr" in study.rates_of("prefix")[0]
    monkeypatch.setattr(study, "call", call)
    monkeypatch.setattr(study, "subprocess", SimpleNamespace(run=sample))
    monkeypatch.setattr(study, "SEARCH_STEPS", 1)
    for name in ("OUTCOME_RATES", "PROCESS_RATES"):
        monkeypatch.setattr(study, name, getattr(study, name)[:2])
    for name, count in (("PROBLEMS", 8), ("HELD_OUT", 2), ("WORKED", 2)):
        monkeypatch.setattr(study.chains, name, count)
    out = tmp_path / "out"
    words = ["--", "--steps", "1", "--eval.every", "0", "--checkpoint.every", "1", "--task.eval_size", "2"]
    words += ["--rollout.prompts_per_step", "2", "--rollout.n", "2", "--rollout.max_new_tokens", "4"]
    words += ["--filter.low", "0", "--filter.high", "1", "--model.device", "cpu"]
    arms = ["--arms", "rloo", "balanced", "--jobs", "1"]
    study.main(["search", str(out), *arms, *words])
    assert [words[0] for words in called] == ["sft", "prm", "rl", "rl", "rl", "rl"]
    found = json.loads((out / "search.json").read_text())
    assert set(found) == {"rloo", "balanced"}
    for each in found.values():
        assert " ".join(each["best"]) == max(each["mean rewards"], key=each["mean rewards"].get)
        assert all(len(rewards) == len(study.SEARCH_SEEDS) for rewards in each["mean rewards"].values())
    called.clear()
    study.main(["run", str(out), *arms, "--seeds", "1", *words])
    assert [words[words.index("--seed") + 1] for words in called] == ["0", "0"]
    assert {(out / f"{arm}-0" / "final").is_dir() for arm in ("rloo", "balanced")} == {True}
    balanced = json.loads((out / "balanced-0" / "config.json").read_text())
    best = found["balanced"]["best"]
    assert balanced["prm"]["balance"] and balanced["policy"]["lr"] == float(best[best.index("--policy.lr") + 1])
    # What is finished is skipped; what left a checkpoint goes on; what left none starts anew.
    called.clear()
    shutil.rmtree(out / "rloo-0" / "final")
    shutil.rmtree(out / "balanced-0" / "final")
    shutil.rmtree(out / "balanced-0" / "checkpoints")
    study.main(["run", str(out), *arms, "--seeds", "1", *words])
    assert [words[-1] == "--resume" for words in called] == [True, False]
    # A run that was stopped has a model, too.
    assert study.finished("rl", out / "rloo-0")
    config = out / "rloo-0" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"steps": 2}))
    assert not study.finished("rl", out / "rloo-0") and not study.finished("rl", out / "none")
    study.main(["collect", str(out), "--arms", "rloo", "balanced"])
    target = out / "study"
    assert {"rloo-0.metrics.jsonl", "balanced-0.config.json", "summary.md", "reward.png", "search.json"} <= {
        path.name for path in target.iterdir()
    }
    assert "Paired differences" in (target / "summary.md").read_text()
    assert (target / "localisation.md").is_file()
    with pytest.raises(FileNotFoundError, match="has no finished run"):
        study.main(["collect", str(tmp_path / "none")])
    # A run whose policy solves nothing any more is a result; any other error is one.
    study.train_or_lose(tmp_path / "gone", ["lost"])
    assert (tmp_path / "gone" / study.LOST).exists()
    with pytest.raises(AssertionError):
        study.train_or_lose(tmp_path / "bad", ["--no-such-key", "1"])


def test_chains(module, tmp_path, monkeypatch):
    """The study's problems: right solutions, none in two files, and the first wrong line of an answer."""
    chains = module("study/chains")
    assert chains.solution("9+3-10+5") == ["9+3=12", "12-10=2", "2+5=7", "\\boxed{7}"]
    right = chains.solution("63-8+5")
    assert chains.first_wrong_line("63-8+5", right) is None
    assert chains.first_wrong_line("63-8+5", ["63-8=55", "55+5=61", "\\boxed{61}"]) == 1
    assert chains.first_wrong_line("63-8+5", [*right, "60+1=61"]) == 3
    made = [text for text, _ in zip(chains.questions(1), range(500), strict=False)]
    assert len(set(made)) == 500
    for text in made:
        *lines, box = chains.solution(text)
        totals = [int(line.partition("=")[2]) for line in lines]
        assert (
            all(0 <= total <= 99 for total in totals)
            and box == f"\\boxed{{{totals[-1]}}}" == f"\\boxed{{{eval(text)}}}"
        )
        assert chains.TERMS[0] <= len(lines) <= chains.TERMS[1]
    for slips, want in (({"+": 0.0, "-": 0.0}, right), ({"+": 1.0, "-": 1.0}, ["63-8=56", "56+5=51", "\\boxed{51}"])):
        monkeypatch.setattr(chains, "SLIPS", slips)
        assert chains.demonstration("63-8+5", random.Random(0)) == want
    chains.write_model(tmp_path)
    tokenizer = load_tokenizer(ModelConfig(path=str(tmp_path)))
    ids = tokenizer.encode("\n".join(right), add_special_tokens=False)
    assert tokenizer.decode(ids) == "63-8=55\n55+5=60\n\\boxed{60}" and len(ids) == 20
    assert render(tokenizer, [{"role": "user", "content": "63-8+5"}]) == tokenizer.encode("63-8+5?")


def test_precision_study(small, module, tmp_path, monkeypatch, capsys):
    """One step with each kind of logits; a run that is finished is not run again."""
    study, called = module("precision_study"), []

    def call(words, log):
        called.append(words)
        assert cli.main(list(words)) == 0

    monkeypatch.setattr(sys.modules["study"], "call", call)
    words = [str(tmp_path), "--seeds", "1", "--", *small, "--model.dtype", "bfloat16", "--steps", "1"]
    words += ["--eval.every", "0", "--sft.demonstrations", "2", "--sft.batch_size", "2", "--prm.lr", "1e-2"]
    study.main(words)
    assert [each[0] for each in called] == ["sft", "rl", "rl"]
    assert [each[each.index("--model.logits_dtype") + 1] for each in called[1:]] == ["float32", "input"]
    lines = capsys.readouterr().out.splitlines()
    rows = [dict(zip(*(row.strip("| ").split(" | ") for row in pair), strict=True))
            for pair in ((lines[0], line) for line in lines[2:4])]  # fmt: skip
    assert [row["logits"] for row in rows] == ["float32", "rounded"] and {row["runs"] for row in rows} == {"1"}
    assert {row["log-ratio of equal weights, largest"] for row in rows} == {"0"}
    noise, size = "of trained ones in another layout, mean / worst", "their size, mean"
    assert all(0 < float(row[noise].split(" / ")[0]) < float(row[size]) for row in rows)
    assert all(0 <= float(row["PRM pair accuracy"]) <= 1 and float(row["mismatch with the engine"]) > 0 for row in rows)
    study.main(words)
    assert len(called) == 3


def test_study_finds_the_lowest_line(module, tmp_path):
    study = module("study/study")
    run = tmp_path / "prime-0"
    run.mkdir()
    tokens = ["3+4", "=7", "\n", "7+5", "=11", "\n", "\\boxed{11}", "<|end|>"]
    assert study.by_line(tokens, [1, 2, 3, -1, -2, -3, 4, 5]) == (
        ["3+4=7\n", "7+5=11\n", "\\boxed{11}"], [6.0, -6.0, 9.0],
    )  # fmt: skip
    rows = [
        {"step": step, "prompt": "3+4+5?", "tokens": tokens, "process_rewards": rewards, "outcome": outcome}
        for step, outcome, rewards in (
            (1, 0.0, [1, 2, 3, 0, 0, 0, -4, -5]),  # blames the box
            (1, 1.0, [0] * 8),  # right: nothing to find
            (2, 0.0, [1, 2, 3, -1, -2, -3, 4, 5]),
            (2, 0.0, None),
        )
    ]
    (run / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert study.localisation([run]) == [["first half", 1, "0 %", "33 %"], ["second half", 1, "100 %", "33 %"]]
