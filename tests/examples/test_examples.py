"""The examples: every TOML file loads, and the PRIME of one file does what the trainer does."""

import importlib
import importlib.util
import json
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="the trainer's packages are not installed: pip install '.[train]'")

from helpers import tiny
from helpers.ranks import RandomVerifier

import prime_kernels as pk
from prime_trainer import loop
from prime_trainer.config.load import load
from prime_trainer.config.run_config import RunConfig
from prime_trainer.run.seeds import derive_seed

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
STEPS = 2
# Between float32 sums in another order; what is compared is of the order of 1, weights have moved by 1e-3.
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
REWARD = 1e-6


@pytest.fixture(scope="module")
def minimal():
    spec = importlib.util.spec_from_file_location("minimal_prime", EXAMPLES / "minimal_prime.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return tiny.write_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def trainer_steps(model_dir, tmp_path_factory):
    """The trainer's first steps: configuration, the groups it sampled, its metrics, its tensors, its last weights."""
    cfg = RunConfig(
        output=tmp_path_factory.mktemp("run"),
        model={"path": str(model_dir), "dtype": "float32", "device": "cpu"},
        task={"name": "chain_sum", "params": {"max_terms": 2, "max_digits": 1, "min_digits": 1}, "eval_size": 2},
        rollout={"engine": "transformers", "prompts_per_step": 4, "n": 4, "max_new_tokens": 12},
        filter={"low": 0.1, "high": 0.9},
        prm={"lr": 6e-4},
        policy={"lr": 1e-4, "minibatches": 2},
    )
    steps = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "Verifier", RandomVerifier)
        advantages = pk.rloo_advantages

        def spy(process_rewards, *inputs, **options):
            found = advantages(process_rewards, *inputs, **options)
            steps[-1] |= {"process_rewards": process_rewards, "advantages": found.advantages}
            return found

        patch.setattr(pk, "rloo_advantages", spy)
        run = loop.Run(cfg)
        batch = run.rollouts.batch

        def recording(*arguments):
            groups, values = batch(*arguments)
            groups = [replace(group, responses=list(map(cut, range(4), group.responses))) for group in groups]
            steps.append({"groups": groups})
            return groups, values

        patch.setattr(run.rollouts, "batch", recording)
        for _ in range(STEPS):
            metrics = values_of(run.train_step())
            steps[-1] |= {name: metrics[name] for name in ("prm_loss", "prm_pair_accuracy", "policy_loss")}
        run.close()
    return cfg, steps, {"policy": run.policy.model, "prm": run.prm.model}


def cut(k, response):
    """The tiny model never stops by itself; responses of one length would hide an error of packing."""
    return replace(response, ids=response.ids[3 * k :], logprobs=response.logprobs[3 * k :])


def values_of(result):
    return result.metrics if hasattr(result, "metrics") else result[0]


def test_minimal_prime_takes_the_trainers_steps(minimal, model_dir, trainer_steps):
    cfg, steps, trained = trainer_steps
    settings = minimal.Settings(
        beta=cfg.prm.beta, prm_lr=cfg.prm.lr, prm_clip=cfg.prm.grad_clip, policy_lr=cfg.policy.lr,
        policy_clip=cfg.policy.grad_clip, minibatches=cfg.policy.minibatches,
    )  # fmt: skip
    prime = minimal.Prime(tiny.load(model_dir), settings)
    for number, theirs in enumerate(steps, 1):
        groups = [
            minimal.Group(group.prompt_ids, [r.ids for r in group.responses], [r.outcome for r in group.responses])
            for group in theirs["groups"]
        ]
        assert len(groups) == 4 and len({len(ids) for group in groups for ids in group.responses}) > 1
        shuffle = torch.Generator().manual_seed(derive_seed(cfg.seed, "shuffle", number))
        ours = prime.step(groups, shuffle)
        # Rewards are divided by the largest return before they are whitened, and the rounding of log-probs with them.
        largest = theirs["process_rewards"].abs().max().clamp(min=1e-2).item()
        near = dict.fromkeys(("prm_loss", "prm_pair_accuracy", "policy_loss"), CLOSE["atol"])
        near |= {"process_rewards": REWARD, "advantages": CLOSE["atol"] + REWARD / largest}
        for name, atol in near.items():
            wanted = torch.as_tensor(theirs[name])
            torch.testing.assert_close(
                ours[name], wanted, rtol=CLOSE["rtol"], atol=atol, msg=lambda m, n=name: f"{n}: {m}"
            )
        assert (ours["process_rewards"].abs().max() == 0) == (number == 1)
    start = dict(tiny.load(model_dir).named_parameters())
    for name, model in trained.items():
        wanted, moved, rate = dict(model.named_parameters()), 0.0, getattr(cfg, name).lr
        for key, weight in getattr(prime, name).named_parameters():
            # AdamW's step has the size of the rate even where a gradient is hardly more than its own rounding.
            apart = (weight - wanted[key]).abs()
            few = max(2, weight.numel() // 1000)
            assert apart.max() < rate / 10 and (apart > CLOSE["atol"]).sum() <= few, f"{name} {key}: {apart.max()}"
            moved = max(moved, (weight - start[key]).abs().max().item())
        assert moved > 1.5e-4, name


def test_minimal_prime_runs(minimal, model_dir, monkeypatch, capsys):
    seen = []

    def by_bytes(response, answer):
        seen.append(answer)
        return float(random.Random(response).random() < 0.5)

    monkeypatch.setattr(minimal, "verify", by_bytes)
    settings = minimal.Settings(prompts=2, n=3, max_new_tokens=5)
    prime = minimal.main([str(model_dir), "--steps", "2"], settings)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["step 1", "step 2"] and "prm_loss 0.693" in lines[0]
    assert len(seen) % 3 == 0 and all(0 <= answer <= 40 for answer in seen)
    assert any(not torch.equal(a, b) for a, b in zip(prime.policy.parameters(), prime.ref.parameters(), strict=True))


@pytest.mark.parametrize("outcome", [0.0, 1.0])
def test_minimal_prime_says_that_nothing_is_to_learn(minimal, model_dir, monkeypatch, outcome):
    monkeypatch.setattr(minimal, "verify", lambda response, answer: outcome)
    with pytest.raises(RuntimeError, match="no group has both right and wrong responses"):
        minimal.main([str(model_dir)], minimal.Settings(prompts=1, n=2, max_new_tokens=2, max_rounds=1))


@pytest.mark.parametrize(
    ("response", "right"),
    [("\\boxed{12}", 1.0), ("\\boxed{3} so \\boxed{ 12 }", 1.0), ("\\boxed{12} no, \\boxed{3}", 0.0), ("12", 0.0)],
)
def test_minimal_prime_verifies(minimal, response, right):
    assert minimal.verify(response, 12) == right


def test_minimal_prime_is_short():
    assert len((EXAMPLES / "minimal_prime.py").read_text().splitlines()) <= 200


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.toml")), ids=lambda path: path.name)
def test_settings_load(path):
    cfg = load(path)
    wanted = {
        "demo.toml": {"steps": 10, "rollout.n": 6, "sft.worked_fraction": 0.38},
        "prm.toml": {"train_prm.lr": 3e-5, "rollout.n": 16, "score.splitter": "line"},
        "eight_gpus.toml": {"rollout.engine": "vllm-server", "rollout.lag": 1, "prm.minibatches": 4},
    }
    for key, value in wanted[path.name].items():
        found = cfg
        for name in key.split("."):
            found = getattr(found, name)
        assert found == value, key


def test_a_7b_model_fits_the_four_gpus_that_train(tmp_path, monkeypatch):
    """By `prime-trainer plan`, with the shape of Qwen2.5-7B: what the comments of eight_gpus.toml say."""
    from prime_trainer.plan import plan

    monkeypatch.syspath_prepend(str(EXAMPLES.parent / "bench"))
    table = importlib.import_module("plan_table")
    shape = dict(zip(table.KEYS, table.SIZES["7B"][:-1], strict=True))
    config = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "max_position_embeddings": 4096}
    (tmp_path / "config.json").write_text(json.dumps(config | shape))
    cfg = load(EXAMPLES / "eight_gpus.toml", ["--model.path", str(tmp_path)])
    most = {stage: sum(parts.values()) / 2**30 for stage, parts in plan.make(cfg, 4, 1024).memory.items()}
    assert most["score and PRM update"] == pytest.approx(60.6, abs=0.1) and max(most.values()) < 0.9 * 80
    cfg.scale.activation_checkpointing = "none"
    assert max(sum(parts.values()) / 2**30 for parts in plan.make(cfg, 4, 1024).memory.values()) > 80
