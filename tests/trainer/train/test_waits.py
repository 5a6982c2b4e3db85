"""A step lays its passes out before the first, and then waits for the device where it decides something and no more."""

import dataclasses
import json

import pytest
import torch
from helpers import tiny
from helpers.ranks import RandomVerifier
from helpers.waits import on_gpu, on_host

from prime_trainer import loop, sft
from prime_trainer.prm import train
from prime_trainer.run.metrics import MetricsWriter
from prime_trainer.scale.transfer import fetched, upload_together
from prime_trainer.train.batch import Batch

NORM = "prime_trainer/train/trainable.py:step"
FINITE = "prime_trainer/train/nonfinite_guard.py:finite"
FETCHED = "prime_trainer/scale/transfer.py:fetched"
SAMPLES = "prime_trainer/train/examples.py:examples_of"
# transformers looks whether rows without a mask are packed: one wait a pass, its own.
PACKED = "transformers/masking_utils.py:find_packed_sequence_indices"


def one_step(monkeypatch, cfg, waits, in_rows=False):
    """(waits by place, whether each pass had no mask, micro-batches laid out after the first pass) of the second step,
    its rollouts apart."""
    monkeypatch.setattr(loop, "Verifier", RandomVerifier)
    run = loop.Run(cfg)
    if in_rows:
        run.traits = dataclasses.replace(run.traits, layout="rows")
    run.train_step()
    batch = run.rollouts.batch(run.step + 1, loop.StageClock())
    monkeypatch.setattr(run.rollouts, "batch", lambda step, clock: batch)
    planned, late, passes = Batch._planned, [], []
    monkeypatch.setattr(Batch, "_planned", lambda self, *key: late.append(key) if passes else planned(self, *key))
    trained = [part.model for part in (run.policy, run.prm) if part is not None]
    for model in filter(None, [*trained, run.ref]):
        model.base_model.register_forward_pre_hook(
            lambda *given: passes.append(given[2].get("attention_mask") is None), with_kwargs=True
        )
    with waits() as counts:
        run.train_step()
    run.close()
    return dict(counts), passes, late


BY_STEPS = {"prm": {"update": "before", "granularity": "step"}}
CASES = {
    "default": ({}, 2),
    "one response a row": ({"micro_batch_tokens": 120}, 2),
    "reference of the policy": ({"prm": {"ref_type": "policy"}}, 2),
    "before, by steps": (BY_STEPS | {"algorithm": {"process_return": "gae"}}, 2),
    "minima": (BY_STEPS | {"algorithm": {"process_return": "min"}}, 2),
    "reverse": ({"prm": {"update": "reverse"}}, 2),
    "pairs": ({"prm": {"kind": "dpo", "minibatches": 2}}, 3),
    "balanced prefixes": ({"prm": {"kind": "prefix", "balance": True}}, 2),
    "outcomes": ({"algorithm": {"process_coef": 0.0, "estimator": "grpo"}}, 1),
    "epochs": ({"policy": {"epochs": 2, "minibatches": 2, "entropy_coef": 0.1, "kl_coef": 0.1}}, 5),
    "weights": ({"rollout": {"tis": "sequence_mask", "tis_cap": 2.0}, "policy": {"loss_mean": "sequence"}}, 2),
}


@pytest.mark.parametrize("changes, updates", CASES.values(), ids=CASES.keys())
def test_a_step_waits_for_norms_and_decisions(request, monkeypatch, run_config, changes, updates):
    in_rows = request.node.callspec.id == "one response a row"
    cfg = run_config(**{"rollout": {"prompts_per_step": 4}, "micro_batch_tokens": 80} | changes)
    counts, passes, late = one_step(monkeypatch, cfg, on_host, in_rows)
    assert late == [] and len(passes) > 2 * updates
    assert counts.pop(PACKED, 0) == sum(passes) and all(passes) == in_rows
    scored = {} if cfg.algorithm.process_coef == 0 else {FINITE: 1}
    assert counts == {NORM: updates, FETCHED: 1, SAMPLES: 1} | scored


@pytest.fixture
def each_step(monkeypatch):
    """`each_step(run)`: waits by place of each step of a supervised stage but the first and the last."""

    def counted(run):
        with on_host() as counts:
            seen, log = [], MetricsWriter.log

            def logged(self, *step):
                seen.append({place: count for place, count in counts.items() if place != PACKED})
                counts.clear()
                log(self, *step)

            monkeypatch.setattr(MetricsWriter, "log", logged)
            run()
        return seen[1:-1]

    return counted


def test_supervised_steps_wait_for_norm_and_metrics(run_config, each_step):
    cfg = run_config(sft={"demonstrations": 12, "batch_size": 4}, micro_batch_tokens=200)
    assert each_step(lambda: sft.run(cfg)) == [{NORM: 1, FETCHED: 1}]


def test_steps_of_an_offline_prm_wait_for_norm_and_metrics(run_config, each_step, tmp_path):
    rows = [
        {"prompt": f"{k} + 3?", "completions": ["\\boxed{5}", f"so {k}", "5", "6"], "correctness": [1, 0, 1, 0]}
        for k in range(12)
    ]  # fmt: skip
    steps = [{"prompt": f"{k} + 3?", "steps": ["so 2", "is 5", "yes"], "step_labels": [1, 0, None]} for k in range(8)]
    given = {"path": tmp_path / "rows.jsonl", "step_path": tmp_path / "steps.jsonl"}
    for path, lines in zip(given.values(), (rows, steps), strict=True):
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    own = given | {"cache": tmp_path / "cache", "batch_size": 16, "kind": "dpo", "eval_share": 0.0}
    found = each_step(lambda: train.run(run_config(train_prm=own, micro_batch_tokens=100)))
    assert found == [{NORM: 1, FETCHED: 1}]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_step_on_a_gpu_waits_no_more_often(monkeypatch, run_config):
    cfg = run_config(model={"device": "cuda"}, micro_batch_tokens=60)
    counts, passes, late = one_step(monkeypatch, cfg, on_gpu)
    assert late == [] and sum(counts.values()) <= 2 + 3 + sum(passes), counts


def test_what_would_wait_is_counted():
    values, mask = torch.arange(4.0), torch.tensor([True, False, True, True])
    actions = {
        "item": lambda: values[1].item(), "list": values.tolist, "cpu": values.cpu, "bool": lambda: bool(mask[0]),
        "float": lambda: float(values[0]), "nonzero": mask.nonzero, "mask": lambda: values[mask],
        "assignment": lambda: values.__setitem__(mask, 0.0), "select": lambda: values.masked_select(mask),
        "repeats": lambda: torch.repeat_interleave(torch.tensor([1, 2])), "unique": values.unique,
    }  # fmt: skip
    for name, action in actions.items():
        with on_host() as counts:
            action()
        assert counts == {"elsewhere": 1}, name
    with on_host() as counts:
        torch.repeat_interleave(torch.tensor([1, 2]), output_size=3)
        values[torch.tensor([0, 2])] = 1.0
        values.where(mask, 0.0).sum().double()
    assert not counts


def test_fetched_and_uploaded_values_are_those_given():
    values = {"a": 0.1, "b": torch.tensor(0.1), "c": torch.tensor(3), "d": torch.tensor(0.1, dtype=torch.float64)}
    assert fetched(values) == {"a": 0.1, "b": torch.tensor(0.1).item(), "c": 3.0, "d": 0.1}
    assert fetched({"a": 2.0}) == {"a": 2.0}
    given = [torch.tensor([[1, 2], [3, 4]]), torch.zeros(0, dtype=torch.int64), torch.tensor(5)]
    there = upload_together(given, torch.device("cpu"))
    assert all(torch.equal(one, other) and one.shape == other.shape for one, other in zip(given, there, strict=True))


def test_passes_laid_out_together_are_those_laid_out_alone():
    groups = tiny.random_groups(5, 3)
    together, alone = Batch(groups), Batch(groups)
    together.lay_out([[0, 1], [4, 2, 3], range(5)], 40)
    for part in ([4, 2, 3], [0, 1], range(5)):
        found, wanted = (batch.micro_batches(part, 40) for batch in (together, alone))
        assert len(found) == len(wanted) > 1
        for one, other in zip(found, wanted, strict=True):
            assert one.attention_mask == other.attention_mask
            for name in ("input_ids", "position_ids", "predictors", "tokens", "responses", "cu_seqlens"):
                a, b = getattr(one, name), getattr(other, name)
                assert (a is None) == (b is None) and (a is None or torch.equal(a, b))
    assert together.micro_batches([0, 1], 40) is together.micro_batches([0, 1], 40)
