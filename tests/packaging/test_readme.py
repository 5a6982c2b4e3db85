"""What the README shows works: its Python runs, its TOML loads, its files are there."""

import re
from pathlib import Path

from support import code_blocks, run_page

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_runs():
    names = run_page(ROOT / "README.md")
    assert names["prm"].hidden.grad.abs().sum() > 0
    assert names["advantages"].shape == names["logp"].shape == (12,)


def test_toml_loads(tmp_path):
    from prime_trainer.config import load

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
