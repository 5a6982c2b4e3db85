"""A PRM beside the tiny model: the same weights, nudged."""

import json

import pytest
import torch
from helpers import tiny

from prime_trainer.config.sections import ModelConfig
from prime_trainer.models import loading, tokenizers


@pytest.fixture(scope="session")
def prm_dir(model_dir, tmp_path_factory):
    directory = tmp_path_factory.mktemp("nudged") / "prm"
    model = tiny.load(model_dir)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * weight.std() * torch.randn(weight.shape, generator=generator))
    loading.save(model, tokenizers.load_tokenizer(ModelConfig(path=str(model_dir))), directory)
    return directory


@pytest.fixture(scope="session")
def prm(prm_dir):
    return tiny.load(prm_dir)


@pytest.fixture
def jsonl(tmp_path):
    def write(name, rows):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write
