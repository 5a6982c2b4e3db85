"""Scripts of bench/ as tests run them: at their smallest size, with a model of 100,000 weights."""

import importlib.util
import runpy
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Overrides of a run's configuration: the tiny model and a step of two groups of two short responses."""
    from helpers import tiny  # needs the trainer's packages, which not all tests of this folder do

    model = tiny.write_model(tmp_path_factory.mktemp("model"))
    sections = {
        "model": {"path": model, "dtype": "float32", "device": "cpu"},
        "task": {"eval_size": 2},
        "rollout": {"engine": "transformers", "prompts_per_step": 2, "n": 2, "max_new_tokens": 4},
        "filter": {"low": 0.0, "high": 1.0},
    }
    return [
        word for s, keys in sections.items() for key, value in keys.items() for word in (f"--{s}.{key}", str(value))
    ]


@pytest.fixture
def script(monkeypatch, capsys):
    """`script(name, word, ..)` runs a script as `python bench/name.py word ..` would; what it printed."""

    def run(name, *words):
        path = BENCH / f"{name}.py"
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, words)])
        monkeypatch.setattr(sys, "path", [str(path.parent), *sys.path])
        capsys.readouterr()
        runpy.run_path(str(path), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.fixture
def module(monkeypatch):
    """A script as a module, where its main takes arguments that its command line does not."""

    def load(name):
        path = BENCH / f"{name}.py"
        monkeypatch.setattr(sys, "path", [str(path.parent), *sys.path])
        spec = importlib.util.spec_from_file_location(path.stem, path)
        made = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(made)
        return made

    return load
