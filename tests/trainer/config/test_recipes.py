"""What `init` writes loads, its schema has every key, and the completion works in a real bash."""

import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from prime_trainer.cli import COMMANDS, main
from prime_trainer.config.load import keys, load
from prime_trainer.config.recipes import RECIPES, text

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_is_written_and_loads(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["init", recipe]) == 0 and capsys.readouterr().out == f"{recipe}.toml\n"
    written = Path(f"{recipe}.toml").read_text(encoding="utf-8")
    assert written == text(recipe) and written.count("#") > 5
    cfg = load(Path(f"{recipe}.toml")).model_dump(mode="json")
    for section, values in tomllib.loads(written).items():  # nothing is read as something else
        for key, value in values.items() if isinstance(values, dict) else ():
            if not isinstance(value, dict) and value not in ("auto", "actions"):  # which stand for others
                assert cfg[section][key] == value, (section, key)
    # Its commands are there, and read the file under its own name.
    for command, words in re.findall(r"^#   prime-trainer (\w+) (.*)$", written, re.MULTILINE):
        assert command in COMMANDS
        for key in re.findall(r"--([\w.-]+)", words):
            assert key in {*keys(), "gpus", "prompt-tokens"}, key


def test_recipes_of_examples_are_the_examples():
    for name in ("demo", "eight_gpus"):
        assert text(name) == (ROOT / "examples" / f"{name}.toml").read_text(encoding="utf-8")


def test_files_are_never_overwritten(tmp_path, capsys):
    path = tmp_path / "mine.toml"
    path.write_text("seed = 1\n")
    assert main(["init", "demo", str(path)]) == 2
    assert "mine.toml is already there; give another name" in capsys.readouterr().err
    assert path.read_text() == "seed = 1\n"
    assert main(["init", "chess"]) == 2
    assert "expected one of the recipes demo, math, code, prm, eight_gpus, got 'chess'" in capsys.readouterr().err
    assert main(["init"]) == 2 and "recipes:" in capsys.readouterr().out


def test_schema_has_every_key_with_its_description(capsys):
    assert main(["init", "--schema"]) == 0
    schema = json.loads(capsys.readouterr().out)

    def found(node, prefix=""):
        for name, value in node["properties"].items():
            yield prefix + name, value
            reference = value.get("$ref")
            if reference:
                yield from found(schema["$defs"][reference.removeprefix("#/$defs/")], f"{prefix}{name}.")

    described = dict(found(schema))
    assert set(described) == set(keys())
    assert schema["additionalProperties"] is False and described["steps"]["exclusiveMinimum"] == 0
    assert described["prm.update"]["enum"] == ["after", "before", "reverse", "none"]
    assert described["rollout.n"]["description"] == "Responses a prompt."


def complete(tmp_path, *words):
    script = tmp_path / "completion.bash"
    quoted = " ".join(f"'{word}'" for word in ("prime-trainer", *words))
    code = f"source {script}; COMP_WORDS=({quoted}); COMP_CWORD={len(words)}; _prime_trainer; "
    code += 'printf "%s\\n" "${COMPREPLY[@]}"'
    done = subprocess.run(["bash", "--norc", "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    return done.stdout.split()


def test_bash_completes(tmp_path, capsys):
    if shutil.which("bash") is None:
        pytest.skip("bash is not installed")
    assert main(["completion", "bash"]) == 0
    (tmp_path / "completion.bash").write_text(capsys.readouterr().out)
    (tmp_path / "run.toml").touch()
    assert complete(tmp_path, "pr") == ["prm", "processbench", "profile"]
    assert complete(tmp_path, "init", "e") == ["eight_gpus"]
    assert complete(tmp_path, "rl", "ru") == ["run.toml"]
    assert complete(tmp_path, "rl", "run.toml", "--policy.clip") == ["--policy.clip_low", "--policy.clip_high"]
    assert complete(tmp_path, "rl", "--prm.update", "") == ["after", "before", "reverse", "none"]
    assert complete(tmp_path, "rl", "--rollout.vllm.eager", "t") == ["true"]
    assert complete(tmp_path, "rl", "--task.path", "ru") == ["run.toml"]


def test_other_shells(capsys):
    assert main(["completion", "zsh"]) == 0 and "bashcompinit" in capsys.readouterr().out
    assert main(["completion", "fish"]) == 0
    said = capsys.readouterr().out
    assert "complete -c prime-trainer -l prm.update -x -a 'after before reverse none'\n" in said
    assert main(["completion", "tcsh"]) == 2
    assert "expected one of bash, zsh, fish, got 'tcsh'" in capsys.readouterr().err
