"""Replacing functions of another package: everywhere it holds them, all or nothing, and back again."""

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from prime_kernels.integrations import IntegrationError, openrlhf, trl, verl
from prime_kernels.integrations._patching import Integration, Target, function_target, signature_of

PINS = Path(__file__).with_name("requirements.txt")


def module(monkeypatch, name, **members):
    made = ModuleType(name)
    made.__path__ = []
    made.__spec__ = __import__("importlib.machinery").machinery.ModuleSpec(name, None)
    for key, value in members.items():
        setattr(made, key, value)
    monkeypatch.setitem(sys.modules, name, made)
    return made


def score(logits, ids, temperature=1.0):
    return "theirs"


def entropy(logits):
    return "theirs"


def ours(logits, ids, temperature=1.0):
    return "ours"


ours.__name__ = "score"


@pytest.fixture
def trainer(monkeypatch):
    """A package whose function is also held by an importer and by a registry; another package holds it as well."""
    module(monkeypatch, "fake")
    utils = module(monkeypatch, "fake.utils", score=score, entropy=entropy)
    user = module(monkeypatch, "fake.user", score=score, other=3, REGISTRY={"a": score, "b": entropy})
    outside = module(monkeypatch, "fakeish", score=score)
    return utils, user, outside


def integration(*targets):
    return Integration("fake", "1.0 to 1.2", "1.2.0", targets, ("fake",))


KNOWN = function_target("fake.utils", ours, "logits, ids, temperature=1.0")


def test_every_place_and_back(trainer):
    utils, user, outside = trainer
    patcher = integration(KNOWN)
    patcher.patch()
    assert utils.score is user.score is user.REGISTRY["a"] is ours
    assert utils.entropy is user.REGISTRY["b"] is entropy and outside.score is score
    patcher.unpatch()
    assert utils.score is user.score is user.REGISTRY["a"] is score
    patcher.unpatch()
    assert utils.score is score


def test_patching_twice_is_patching_once(trainer, monkeypatch):
    utils, _, _ = trainer
    patcher = integration(KNOWN)
    patcher.patch()
    late = module(monkeypatch, "fake.late", score=score)
    later = module(monkeypatch, "fake.later", score=utils.score)
    patcher.patch()
    assert utils.score is late.score is later.score is ours
    patcher.unpatch()
    assert utils.score is late.score is later.score is score


def test_replacements_are_made_from_the_original(trainer):
    utils, _, _ = trainer
    patcher = integration(Target("fake.utils", "entropy", lambda original: (original, "wrapped"), ("logits",)))
    patcher.patch()
    assert utils.entropy == (entropy, "wrapped")
    patcher.patch()
    assert utils.entropy == (entropy, "wrapped")
    patcher.unpatch()
    assert utils.entropy is entropy


def test_unknown_signature_is_refused_and_nothing_replaced(trainer):
    utils, user, _ = trainer
    changed = Target("fake.utils", "entropy", lambda original: None, ("logits, chunk_size=128", "logits, /"))
    with pytest.raises(IntegrationError) as raised:
        integration(KNOWN, changed).patch()
    said = str(raised.value)
    assert "fake.utils.entropy has the signature (logits), expected (logits, chunk_size=128) or (logits, /)" in said
    assert "the signatures known here are those of 1.0 to 1.2, tested with 1.2.0" in said
    assert utils.score is user.score is score


@pytest.mark.parametrize("optional", [False, True])
def test_what_is_absent(trainer, optional):
    gone = [
        Target("fake.utils", "gone", lambda original: None, ("x",), optional),
        Target("fake.gone.deeper", "gone", lambda original: None, ("x",), optional),
    ]
    for target in gone:
        patcher = integration(KNOWN, target)
        if optional:
            patcher.patch()
            assert trainer[0].score is ours
            patcher.unpatch()
        else:
            with pytest.raises(IntegrationError, match=r"fake \(not installed\).*those of 1.0 to 1.2"):
                patcher.patch()
        assert trainer[0].score is score


def test_signatures():
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden: torch.Tensor, outputs: tuple[str, ...] = ("a", "b")) -> torch.Tensor:
            return hidden

    assert signature_of(Function) == "ctx, hidden, outputs=('a', 'b')"
    assert signature_of(lambda a, *, b=1e-6, **c: None) == "a, *, b=1e-06, **c"
    assert signature_of(torch.compile(score)) == "logits, ids, temperature=1.0"


@pytest.mark.parametrize("name, trainer", [("trl", trl), ("verl", verl), ("openrlhf", openrlhf)])
def test_trainers_that_are_not_there(monkeypatch, name, trainer):
    for loaded in [key for key in sys.modules if key.partition(".")[0] == name]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        IntegrationError, match=rf"{name} .*cannot be imported.*the signatures known here are those of "
    ):
        trainer.patch()
    trainer.unpatch()


# verl's functions, and those of its PRIME recipe as they stood in verl's repository up to 0.7.0.
VERL = {
    "verl.utils.torch_functional": {
        "logprobs_from_logits": "logits, labels, inplace_backward=True",
        "logprobs_from_logits_naive": "logits, labels",
        "logprobs_from_logits_v2": "logits, labels",
        "entropy_from_logits": "logits",
        "entropy_from_logits_with_chunking": "logits, chunk_size=2048",
    },
    "verl.trainer.ppo.core_algos": {
        "compute_rloo_outcome_advantage": (
            "token_level_rewards, response_mask, index, epsilon=1e-6, config=None, **kwargs"
        ),
    },
    "recipe.prime.prime_core_algos": {
        "compute_rloo_advantage_return": "data, response_mask, n_samples, config",
        "compute_ce_dpo_loss_rm": "token_level_scores, acc, response_mask, beta",
        "compute_dpo_accuracy": "token_level_scores, acc, response_mask, n_samples",
        "compute_detach_dpo_loss_rm": "token_level_scores, acc, Q_bc, acc_bc, response_mask, beta, bon_mode='none'",
    },
}


@pytest.fixture
def verl_with_recipe(monkeypatch):
    """Stand-ins with these signatures; the recipe's workers import a function by name, as they really do."""
    for loaded in [key for key in sys.modules if key.partition(".")[0] in ("verl", "recipe")]:
        monkeypatch.delitem(sys.modules, loaded)
    for package in ("verl", "verl.utils", "verl.trainer", "verl.trainer.ppo", "recipe", "recipe.prime"):
        module(monkeypatch, package)
    made = {
        name: module(
            monkeypatch, name, **{key: eval(f"lambda {signature}: None") for key, signature in members.items()}
        )
        for name, members in VERL.items()
    }
    recipe = made["recipe.prime.prime_core_algos"]
    loss = recipe.compute_ce_dpo_loss_rm
    workers = module(monkeypatch, "recipe.prime.prime_fsdp_workers", compute_ce_dpo_loss_rm=loss)
    yield made, recipe, workers
    verl.unpatch()


RECIPE = ("compute_rloo_advantage_return", "compute_ce_dpo_loss_rm", "compute_dpo_accuracy")


def test_recipe_of_verl(verl_with_recipe):
    _, recipe, workers = verl_with_recipe
    before = dict(vars(recipe))
    verl.patch()
    assert [getattr(recipe, name) for name in RECIPE] == [getattr(verl, name) for name in RECIPE]
    assert workers.compute_ce_dpo_loss_rm is verl.compute_ce_dpo_loss_rm
    assert recipe.compute_detach_dpo_loss_rm is before["compute_detach_dpo_loss_rm"]
    verl.unpatch()
    assert vars(recipe) == before and workers.compute_ce_dpo_loss_rm is before["compute_ce_dpo_loss_rm"]


def test_recipe_of_an_older_verl_is_refused(verl_with_recipe):
    """As it was before verl 0.4: nothing is replaced, in verl neither."""
    made, recipe, _ = verl_with_recipe
    recipe.compute_dpo_accuracy = lambda token_level_scores, acc, eos_mask, n_samples: None
    before = {name: dict(vars(each)) for name, each in made.items()}
    with pytest.raises(IntegrationError, match=r"prime_core_algos\.compute_dpo_accuracy has the signature .*eos_mask"):
        verl.patch()
    assert {name: vars(each) for name, each in made.items()} == before


@pytest.mark.parametrize("name, trainer", [("trl", trl), ("verl", verl), ("openrlhf", openrlhf)])
def test_messages_name_the_tested_version(name, trainer):
    assert f"{name}=={trainer._INTEGRATION.tested}" in PINS.read_text().split()
