"""The tiny model's directory, its tokenizer, and the configuration of a small run with it."""

from contextlib import contextmanager

import pytest
from helpers import tiny

from prime_trainer.config.run_config import RunConfig
from prime_trainer.config.sections import ModelConfig
from prime_trainer.models.tokenizers import load_tokenizer
from prime_trainer.train import supervised_loop


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    return tiny.write_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tokenizer(model_dir):
    return load_tokenizer(ModelConfig(path=str(model_dir)))


@pytest.fixture
def model(model_dir):
    return tiny.load(model_dir)


@pytest.fixture(scope="session")
def make_config(model_dir):
    """`make_config(output=.., steps=3, policy={"lr": 1e-3})`: a run in which every group passes and nothing is
    evaluated midway."""

    def make(**changes) -> RunConfig:
        sections = {
            "steps": 3,
            "model": {"path": str(model_dir), "dtype": "float32", "device": "cpu"},
            "task": {"name": "chain_sum", "params": {"max_terms": 2, "max_digits": 1, "min_digits": 1}, "eval_size": 3},
            "sft": {"demonstrations": 12, "batch_size": 4, "lr": 1e-3},
            "rollout": {"engine": "transformers", "prompts_per_step": 2, "n": 3, "max_new_tokens": 6, "batch_size": 8},
            "filter": {"low": 0.0, "high": 1.0},
            "prm": {"lr": 1e-3},
            "policy": {"lr": 1e-3, "minibatches": 1},
            "eval": {"every": 0},
            "checkpoint": {"every": 0},
        }
        for key, value in changes.items():
            sections[key] = {**sections.get(key, {}), **value} if isinstance(value, dict) else value
        return RunConfig(**sections)

    return make


@pytest.fixture
def run_config(make_config, tmp_path):
    """`make_config` with an output directory."""
    return lambda **changes: make_config(**{"output": tmp_path / "run", **changes})


@pytest.fixture
def stop_after(monkeypatch):
    """`with stop_after(2):` a supervised stage is interrupted in its second step."""

    class Stop:
        """Asked before and after every step."""

        def __init__(self, steps):
            self.left = 2 * steps - 1

        def is_set(self):
            self.left -= 1
            return self.left < 0

    @contextmanager
    def stopping(steps):
        @contextmanager
        def signal():
            yield Stop(steps)

        with monkeypatch.context() as patch:
            patch.setattr(supervised_loop, "stop_signal", signal)
            yield

    return stopping
