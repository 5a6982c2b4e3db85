"""Compiled 16-bit products on CPUs stay few, unless the environment says otherwise."""

import os
import subprocess
import sys

import pytest

from prime_trainer.config.sections import ModelConfig
from prime_trainer.models import compiled_products, loading

# 60 lengths of 12 products, which grow by 0.6 GB where all of them are kept.
MANY_LENGTHS = """
import sys
import torch
from prime_trainer.config.sections import ModelConfig
from prime_trainer.models import loading

def resident():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmRSS"))

loading.load_model(ModelConfig(path=sys.argv[1], device="cpu"))
torch.set_num_threads(1)
weights = [torch.randn(o, i, dtype=torch.bfloat16) for i, o in
           ((576, 576), (576, 192), (576, 1536), (1536, 576), (576, 64), (64, 1536))]
before = resident()
for length in range(100, 220, 2):
    for weight in weights:
        torch.randn(length, weight.shape[1], dtype=torch.bfloat16) @ weight.T @ weight
print(resident() - before)
"""


@pytest.fixture
def environment(monkeypatch):
    for name in compiled_products.CAPACITIES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_a_model_on_the_cpu_bounds_them(environment, model_dir):
    loading.load_model(ModelConfig(path=str(model_dir), device="cpu"))
    assert {name: os.environ[name] for name in compiled_products.CAPACITIES} == compiled_products.CAPACITIES


def test_what_the_environment_says_stays(environment, model_dir):
    environment.setenv("LRU_CACHE_CAPACITY", "1024")
    loading.load_model(ModelConfig(path=str(model_dir), device="cpu"))
    assert os.environ["LRU_CACHE_CAPACITY"] == "1024"
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "128"


def test_a_model_elsewhere_leaves_the_environment_alone(environment, model_dir):
    with pytest.raises(loading.ModelError, match="meta"):  # which has no values to prove anything with
        loading.load_model(ModelConfig(path=str(model_dir), device="meta"))
    assert not set(compiled_products.CAPACITIES) & set(os.environ)


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_memory_does_not_grow_with_the_lengths_met(environment, model_dir):
    command = [sys.executable, "-c", MANY_LENGTHS, str(model_dir)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert int(said.split()[-1]) < 150e6
