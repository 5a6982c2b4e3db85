"""What `plan` counts on a model without data is what a model with data holds."""

import pytest
import torch

from prime_trainer import models, plan
from prime_trainer.cli import main


def bytes_of(tensors):
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def test_parameters_and_states(run_config, model):
    cfg = run_config(prm={"ref_type": "policy"})
    made = plan.make(cfg, gpus=1, prompt_tokens=32)
    assert made.shape.parameters == sum(p.numel() for p in model.parameters()) == bytes_of(model.parameters()) // 4
    assert made.shape.layers == 2 and made.shape.cache_per_token == 2 * 2 * 1 * 32
    trained = models.Trainable(model, lr=1e-3, grad_clip=1.0)
    states = [t for state in trained.optimizer.state.values() for t in state.values() if t.ndim]
    held = made.memory["policy update"]
    # One process holds a copy in the compute dtype beside the masters.
    assert held["policy, masters and AdamW"] == bytes_of([*trained.params, *trained.master, *states])
    assert held["PRM, masters and AdamW"] == held["policy, masters and AdamW"] and held["reference"] == 0
    assert held["gradients"] == bytes_of(trained.master)


def test_activations_are_those_of_a_pass(run_config, model):
    cfg, tokens = run_config(), 96
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = (storage.nbytes(), storage)
        return tensor

    ids = torch.arange(tokens)[None] % 200
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = models.hidden_states(model, ids, torch.arange(tokens)[None], None)
    for param in model.parameters():
        kept.pop(param.untyped_storage().data_ptr(), None)
    measured = sum(size for size, _ in kept.values())
    counted, entry = plan.activation_bytes(models.meta_model(cfg.model), tokens)
    assert 2 * counted == pytest.approx(measured, rel=0.1) and entry == hidden.nbytes


def test_shares_and_offload(run_config):
    cfg = run_config(policy={"kl_coef": 0.1}, scale={"offload": ["reference"]}, model={"dtype": "bfloat16"})
    one, two = plan.make(cfg, 8, 64), plan.make(cfg.model_copy(update={"scale": type(cfg.scale)()}), 8, 64)
    size = one.shape.parameters
    assert one.memory["policy update"]["policy, masters and AdamW"] == 12 * size / 8
    assert one.memory["policy update"]["reference"] == 0 and two.memory["policy update"]["reference"] == 2 * size / 8
    assert one.traffic["policy: forward, backward, gradients"] == one.passes * (2 * 2 + 4) * size * 7 / 8


def test_command(run_config, model_dir, tmp_path, capsys):
    path = tmp_path / "run.toml"
    path.write_text(f'[model]\npath = "{model_dir}"\n[rollout]\nmax_new_tokens = 128\n')
    assert main(["plan", str(path), "--gpus", "2", "--memory", "1"]) == 0
    out = capsys.readouterr().out
    assert "on 2 x 1 GiB" in out and "It fits" in out and "| policy update |" in out
    assert main(["plan", str(path), "--gpus", "none"]) == 2
    assert "--gpus takes a number of at least 1, got 'none'" in capsys.readouterr().err


def test_other_commands_refuse_several_ranks(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert main(["sft"]) == 2
    assert "sft runs in one process, not in the 4 that torchrun started" in capsys.readouterr().err
