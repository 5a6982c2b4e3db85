"""What the README shows works: its Python runs, its TOML loads, its files are there."""

import json
import re
import shlex
from pathlib import Path

from helpers.support import code_blocks, run_page

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_runs():
    names = run_page(ROOT / "README.md")
    assert names["prm"].hidden.grad.abs().sum() > 0
    assert names["advantages"].shape == names["logp"].shape == (12,)


def test_toml_loads(tmp_path):
    from prime_trainer.config.load import load

    found = []
    for text in code_blocks(README, "toml"):
        (tmp_path / "run.toml").write_text(text)
        found.append(load(tmp_path / "run.toml"))
    assert found[0].rollout.prompts_per_step == 16


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    named = re.findall(r"^make ([a-z-]+)", README, re.MULTILINE)
    for words in re.findall(r"`make ([a-z -]+)`", README):
        named += words.split()
    assert {"demo", "test", "lint", "bench"} <= set(named)
    for target in named:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


RUN = """
output = "runs/run"
steps = 1
model = { path = "tiny", dtype = "float32", device = "cpu" }
task = { name = "chain_sum", params = { max_terms = 2, max_digits = 1, min_digits = 1 }, eval_size = 2 }
sft = { demonstrations = 4 }
rollout = { engine = "transformers", prompts_per_step = 2, n = 2, max_new_tokens = 4 }
filter = { low = 0.0, high = 1.0 }
"""


def test_trainer_commands_run_one_after_the_other(tmp_path, monkeypatch, capsys):
    """As they stand there, with a tiny model: no command is refused for what another left."""
    from helpers import tiny

    from prime_trainer import cli

    text = README[README.index("## Trainer") : README.index("### Verifiers")]
    lines = [shlex.split(line, comments=True) for line in re.findall(r"^prime-trainer (.*)$", text, re.MULTILINE)]
    commands = [words for words in lines if words[0] != "processbench"]  # wants sets of its own
    assert [words[0] for words in commands] == ["sft", "rl", "rl", "eval", "report", "plan", "prm", "score", "select"]
    monkeypatch.chdir(tmp_path)
    tiny.write_model(tmp_path / "tiny")
    (tmp_path / "run.toml").write_text(RUN)
    row = {"prompt": "What is 2 + 3?", "completions": ["\\boxed{5}", "\\boxed{6}"], "correctness": [1, 0]}
    rows = [json.dumps({"id": k, **row, "prompt": f"{k} + 3?"}) + "\n" for k in range(4)]
    for name in ("labelled.jsonl", "responses.jsonl"):
        (tmp_path / name).write_text("".join(rows))
    for words in commands:
        assert cli.main(words) == 0, (words, capsys.readouterr().err)
    started = {name: json.loads((tmp_path / "runs" / name / "config.json").read_text()) for name in ("run", "prm")}
    assert {config["model"]["path"] for config in started.values()} == {"runs/sft/final"}
    (scored, *_) = (tmp_path / "runs" / "scores" / "scores.jsonl").read_text().splitlines()
    assert json.loads(scored)["reward_model"] == "runs/prm/final"
    assert "| best-of-2 | runs/prm/final | sum |" in (tmp_path / "runs" / "scores" / "select.md").read_text()
