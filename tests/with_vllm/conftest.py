"""Engines with a float32 model of 64-wide heads; without vLLM every test here skips."""

from pathlib import Path

import pytest
from helpers import tiny

from prime_trainer.config.run_config import RunConfig
from prime_trainer.config.sections import ModelConfig, vllm_installed
from prime_trainer.models import tokenizers

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    """A real engine takes its time to start, most of all on a busy machine."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.timeout(900))
            if not vllm_installed():
                item.add_marker(pytest.mark.skip(reason="vLLM is not installed: make test-vllm"))


@pytest.fixture(scope="session")
def directories(tmp_path_factory):
    """Model directories by whether the head is tied. Their generation configs would make every sample greedy."""
    return {
        tied: tiny.write_model(tmp_path_factory.mktemp("model"), head_dim=64, tied=tied, do_sample=True, top_k=1)
        for tied in (True, False)
    }


@pytest.fixture(scope="session")
def configure(directories, tmp_path_factory):
    """`configure("vllm", tied=False)`: the configuration of a small run with that engine."""

    def make(engine, tied=True, rollout=None, **changes) -> RunConfig:
        small = {"engine": engine, "prompts_per_step": 2, "n": 3, "max_new_tokens": 6, "batch_size": 32}
        values = {
            "output": tmp_path_factory.mktemp("run") / "run",
            "steps": 3,
            "model": {"path": str(directories[tied]), "dtype": "float32", "device": "cpu"},
            "task": {"name": "chain_sum", "params": {"max_terms": 2, "max_digits": 1, "min_digits": 1}, "eval_size": 3},
            "rollout": small | {"vllm": {"kv_cache_gib": 0.125}, "server": {"start_seconds": 800}} | (rollout or {}),
            "filter": {"low": 0.0, "high": 1.0},
            "prm": {"lr": 1e-3},
            "policy": {"lr": 1e-3, "minibatches": 1},
            "eval": {"every": 0},
            "checkpoint": {"every": 0},
        }
        return RunConfig(**values | changes)

    return make


@pytest.fixture(scope="session")
def tokenizer(directories):
    return tokenizers.load_tokenizer(ModelConfig(path=str(directories[True])))
