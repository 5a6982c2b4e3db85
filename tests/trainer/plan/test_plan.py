"""What `plan` counts on a model without data is what a model with data holds."""

import json

import pytest
import torch
from helpers import ranks, stages, tiny
from helpers.stages import bytes_of

import prime_kernels as pk
from prime_kernels._bench.timing import peak_of_tensors
from prime_kernels.integrations import tile_sizes
from prime_kernels.ops import _fused_tiles, _tiled_head
from prime_trainer.cli import main
from prime_trainer.plan import footprint, plan
from prime_trainer.train.trainable import Trainable

LLAMA = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 6, "num_attention_heads": 4}
LLAMA |= {"num_key_value_heads": 2}
ROLLOUT = {"prompts_per_step": 8, "n": 4, "max_new_tokens": 48, "batch_size": 32}


def test_parameters_and_states(run_config, model):
    cfg = run_config(prm={"ref_type": "policy"})
    made = plan.make(cfg, gpus=1, prompt_tokens=32)
    assert made.shape.parameters == sum(p.numel() for p in model.parameters()) == bytes_of(model.parameters()) // 4
    assert made.shape.layers == 2 and made.shape.cache_per_token == 2 * 2 * 1 * 32
    trained = Trainable(model, lr=1e-3, grad_clip=1.0)
    states = [t for state in trained.optimizer.state.values() for t in state.values() if t.ndim]
    held = made.memory["policy update"]
    # One process holds a copy in the compute dtype beside the masters.
    assert held["policy, masters and AdamW"] == bytes_of([*trained.params, *trained.master, *states])
    assert held["PRM, masters and AdamW"] == held["policy, masters and AdamW"] and held["reference"] == 0
    assert held["gradients"] == bytes_of(trained.master)


@pytest.fixture(scope="module")
def models_by_size(tmp_path_factory):
    """Where the activations of a layer weigh most, the vocabulary is small; elsewhere it is large."""
    places = {}
    for vocabulary, tied in ((2048, True), (8192, True), (2048, False)):
        place = tmp_path_factory.mktemp("sizes")
        places[vocabulary, tied] = tiny.write_model(place, tied=tied, sizes={**LLAMA, "vocab_size": vocabulary})
    return places


def assert_planned(cfg, gpus, measured):
    """What is held to 1 %, what each stage takes beside it to 4 %, which is less than 10 % of their sum: a term that
    is missing, or there twice, shows. On a busy machine gloo's threads let go late of what they gathered: the embedding
    and some layers may be there once more (see stages.measure)."""
    made = plan.make(cfg, gpus, stages.PROMPT)
    shape, size = made.shape, getattr(torch, cfg.model.dtype).itemsize
    late = (shape.outside + 3 * shape.layer) * size if gpus > 1 else 0
    assert made.memory.keys() == measured.keys() - {"held"}
    for stage in made.memory:
        parts = made.memory[stage]
        held = sum(parts[name] for name in HELD)
        assert held == pytest.approx(measured["held"], rel=0.01)
        beside = sum(parts.values()) - held
        assert 0.96 * beside < measured[stage] < 1.04 * beside + late, (stage, parts)


HELD = ("base", "policy, masters and AdamW", "PRM, masters and AdamW", "reference")
PRM = {"rollout": ROLLOUT, "policy": {"minibatches": 1}, "task": {"eval_size": 40}, "eval": {"batch_size": 40}}
ADAPTER = {"adapter": {"rank": 16}}
ON_HEAD = {"adapter": {"rank": 16, "targets": ["all-linear", "lm_head"]}}
RECOMPUTED = {"scale": {"activation_checkpointing": "full"}}
MANY = {"prompts_per_step": 64, "n": 8, "max_new_tokens": 64}
"""Responses that fill a pass."""


@pytest.mark.parametrize(
    ("size", "dtype", "changes"),
    [
        ((8192, True), "float32", {"micro_batch_tokens": 448}),
        ((2048, True), "bfloat16", {"micro_batch_tokens": 896, **RECOMPUTED}),
        ((2048, False), "bfloat16", {"micro_batch_tokens": 896, "algorithm": {"process_coef": 0},
                                     "policy": {"minibatches": 1, "kl_coef": 0.1}}),
        ((2048, False), "bfloat16", {"micro_batch_tokens": 896, "model": ADAPTER}),
        ((2048, True), "bfloat16", {"micro_batch_tokens": 896, "model": ON_HEAD}),
    ],
    ids=["kept", "recomputed", "without a PRM", "adapters", "an adapter on the head"],
)  # fmt: skip
def test_peaks_of_one_process(run_config, models_by_size, size, dtype, changes):
    model = {"path": str(models_by_size[size]), "dtype": dtype, **changes.get("model", {})}
    cfg = run_config(**PRM | changes | {"model": model})
    assert_planned(cfg, 1, stages.measure(cfg))


@pytest.mark.parametrize(
    ("size", "dtype", "changes"),
    [
        ((8192, True), "float32", {"micro_batch_tokens": 448}),
        # Two passes as large: gradients of the one before are there, as a plan has it.
        ((2048, True), "bfloat16", {"micro_batch_tokens": 512, **RECOMPUTED}),
        ((8192, True), "float32", {"micro_batch_tokens": 448, "scale": {"vocab_parallel_head": True}}),
        ((2048, True), "bfloat16", {"micro_batch_tokens": 896, "model": ADAPTER}),
    ],
    ids=["kept", "recomputed", "head in shares", "adapters"],
)
def test_peaks_of_two_ranks(run_config, models_by_size, tmp_path, size, dtype, changes):
    model = {"path": str(models_by_size[size]), "dtype": dtype, **changes.get("model", {})}
    cfg = run_config(**PRM | changes | {"model": model})
    ranks.train(cfg, 2, stages.record, str(tmp_path / "peaks"))
    both = [json.loads((tmp_path / f"peaks.{rank}").read_text()) for rank in range(2)]
    assert_planned(cfg, 2, {stage: min(peaks[stage] for peaks in both) for stage in both[0]})


def test_tiles_are_those_of_the_losses():
    """The sizes that plans are made with, against the tiles that are really made."""
    sizes = tile_sizes("cuda")
    assert tile_sizes("cpu").whole_head and not sizes.whole_head
    for tokens, vocabulary in ((100, 1000), (5000, 1000), (8192, 151936), (20000, 40000), (1500, 300000)):
        hidden, weight = torch.empty(tokens, 1, device="meta"), torch.empty(vocabulary, 1, device="meta")
        head = _tiled_head.LinearHead(hidden, weight, None, torch.empty(tokens, device="meta"), 1.0, False)
        for elements, made, said in (
            (sizes.forward, _tiled_head.Tiles.forward(head), sizes.forward_tile(tokens, vocabulary)),
            (sizes.backward, _tiled_head.Tiles.backward(head), sizes.backward_tile(4, 4, tokens, vocabulary)),
        ):
            assert said == (made.tokens, made.columns)
            assert made.tokens * made.columns <= max(elements, vocabulary) and made.tokens <= max(
                sizes.tokens, elements // vocabulary
            )
    with pytest.raises(ValueError, match="device_type: expected one of 'cpu', 'cuda', got 'mps'"):
        tile_sizes("mps")


@pytest.mark.parametrize(
    ("fused", "kept_bytes"), [(False, 0), (False, 2**30), (True, 0)], ids=["log_probs", "log_probs, kept", "nll"]
)
@pytest.mark.parametrize(
    ("dtype", "logits_dtype"),
    [(torch.float32, "float32"), (torch.bfloat16, "float32"), (torch.bfloat16, "input")],
    ids=["float32", "bfloat16", "rounded"],
)
@pytest.mark.parametrize("tokens", [250, 1200])
def test_a_loss_over_tiles(monkeypatch, fused, kept_bytes, dtype, logits_dtype, tokens):
    """The most bytes that a loss and its backward pass hold, by torch's own count, temporary copies included."""
    vocabulary, width, fused_bytes = 8000, 256, 256 * 4 * 8000
    sizes = {
        "TOKENS": 64,
        "BACKWARD_ELEMENTS": 64 * 256,
        "FORWARD_ELEMENTS": 64 * 64,
        "KEPT_BYTES": kept_bytes,
    }
    for name, size in sizes.items():
        monkeypatch.setattr(_tiled_head, name, {"cpu": size})
    monkeypatch.setattr(_fused_tiles, "ADDED_ROWS", {"cpu": 80})
    monkeypatch.setattr(_tiled_head, "HEAD_KERNELS", frozenset())
    monkeypatch.setattr(_tiled_head, "FUSED_BYTES", fused_bytes)
    hidden, weight = torch.randn(tokens, width).to(dtype), torch.randn(vocabulary, width).to(dtype)
    leaves, ids = [hidden.requires_grad_(), weight.requires_grad_()], torch.randint(vocabulary, (tokens,))

    def gradients():
        loss = (pk.linear_nll if fused else pk.linear_log_probs)(*leaves, ids, logits_dtype=logits_dtype).sum()
        return torch.autograd.grad(loss, leaves)

    gradients()
    held = peak_of_tensors(gradients)
    shape = footprint.Shape(0, 0, 0, weight.numel(), False, 1, width, vocabulary, 0, 0)
    compute = hidden.element_size()
    sizes = footprint.Sizes(compute, 4 if logits_dtype == "float32" else compute, "cpu")
    parts = footprint.head_bytes(shape, tokens, sizes, fused)
    planned = sum(parts.values()) - hidden.nbytes  # which were there before
    assert held == pytest.approx(planned, abs=2**18)  # what a product takes to work in


def test_logits_on_a_gpu_are_counted_in_their_own_size(run_config, models_by_size):
    """float32 ones and their gradient rounded beside them, or rounded ones that their gradient overwrites."""
    parts = {}
    for logits_dtype in ("auto", "float32", "input"):
        model = {"path": str(models_by_size[8192, True]), "dtype": "bfloat16", "device": "auto"}
        cfg = run_config(model=model | {"logits_dtype": logits_dtype}, rollout=MANY, **RECOMPUTED)
        parts[logits_dtype] = {stage: held["logits"] for stage, held in plan.make(cfg, 1, 1).memory.items()}
    assert parts["auto"] == parts["float32"]
    for stage in ("score and PRM update", "policy update"):
        assert parts["float32"][stage] == 3 * parts["input"][stage] > 0
    # Drawing: logits, float32 copies of rounded ones, probabilities.
    assert parts["float32"]["rollout"] * (2 + 4 + 4) == parts["input"]["rollout"] * (4 + 4) > 0


def test_shares_and_offload(run_config):
    cfg = run_config(policy={"kl_coef": 0.1}, scale={"offload": ["reference"]}, model={"dtype": "bfloat16"})
    one, two = plan.make(cfg, 8, 64), plan.make(cfg.model_copy(update={"scale": type(cfg.scale)()}), 8, 64)
    size = one.shape.parameters
    assert one.memory["policy update"]["policy, masters and AdamW"] == 12 * size / 8
    assert one.memory["policy update"]["reference"] == 0 and two.memory["policy update"]["reference"] == 2 * size / 8
    assert one.traffic["policy: forward, backward, gradients"] == one.passes * (2 * 2 + 4) * size * 7 / 8


def test_a_loss_that_couples_responses_reads_the_prm_twice(run_config):
    """Forward, backward and the gradients in float32; before them, of pairs, all log-ratios."""
    prm = "PRM: forward, backward, gradients"
    for kind, passes in (("ce", 2), ("prefix", 2), ("dpo", 3), ("kto", 3), ("nca", 3)):
        found = plan.make(run_config(prm={"kind": kind}, model={"dtype": "bfloat16"}), 8, 64)
        assert found.traffic[prm] == found.passes * (2 * passes + 4) * found.shape.parameters * 7 / 8


def test_an_engine_in_process_has_its_share_of_the_gpu(run_config):
    def rows(gpus, **vllm):
        cfg = run_config(rollout={"engine": "vllm", "vllm": vllm})
        text = plan.render(plan.make(cfg, gpus, 64), cfg, gpus, 80)
        return text.splitlines()[2], [line for line in text.splitlines() if "vLLM" in line]

    assert rows(1) == ("| GiB on one GPU | rollout | score and PRM update | policy update |", [
        "| vLLM in process | 32.0 | 32.0 | 32.0 |"])  # fmt: skip
    assert rows(1, sleep=True)[1] == ["| vLLM in process | 32.0 |  |  |"]
    assert "evaluation" in rows(2)[0] and not rows(2)[1]  # under torchrun every rank samples with transformers


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
