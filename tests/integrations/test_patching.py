"""Replacing functions of another package: everywhere it holds them, all or nothing, and back again."""

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from prime_kernels.integrations import IntegrationError, Patched, _patching, openrlhf, skyrl, trl, verl
from prime_kernels.integrations._patching import Integration, Target, function_target, signature_of

TRAINERS = [("trl", trl), ("verl", verl), ("openrlhf", openrlhf), ("skyrl", skyrl)]
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
FUSED = Target("fake.utils", "entropy", lambda original: "ours", ("logits",), fused=lambda: "fake has a kernel")
LEFT = {"fake.utils.entropy": "fake has a kernel; patch(replace_fused=True) replaces it"}


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(_patching, "on_cuda", lambda: True)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(_patching, "on_cuda", lambda: False)


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


def test_fused_kernels_stay_where_there_is_a_gpu(trainer, gpu, caplog):
    utils, user, _ = trainer
    patcher = integration(KNOWN, FUSED)
    with caplog.at_level("INFO", "prime_kernels.integrations"):
        assert patcher.patch() == Patched(("fake.utils.score",), LEFT)
    assert utils.score is ours and utils.entropy is user.REGISTRY["b"] is entropy
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("INFO", "fake (not installed): replaced fake.utils.score"),
        ("WARNING", f"fake (not installed): left fake.utils.entropy in place: {LEFT['fake.utils.entropy']}"),
    ]
    patcher.unpatch()
    assert utils.score is score and utils.entropy is entropy


def test_fused_kernels_are_replaced_where_asked_and_the_last_call_holds(trainer, gpu):
    utils, user, _ = trainer
    patcher = integration(KNOWN, FUSED)
    both = Patched(("fake.utils.score", "fake.utils.entropy"), {})
    assert patcher.patch(replace_fused=True) == both
    assert utils.score is ours and utils.entropy == user.REGISTRY["b"] == "ours"
    assert patcher.patch() == Patched(("fake.utils.score",), LEFT)
    assert utils.score is ours and utils.entropy is user.REGISTRY["b"] is entropy
    assert patcher.patch(replace_fused=True) == both
    patcher.unpatch()
    assert utils.score is score and utils.entropy is user.REGISTRY["b"] is entropy


def test_everything_is_replaced_without_a_gpu(trainer, no_gpu, caplog):
    patcher = integration(KNOWN, FUSED)
    assert patcher.patch() == Patched(("fake.utils.score", "fake.utils.entropy"), {})
    patcher.unpatch()
    assert not caplog.records


def test_a_fused_kernel_that_is_not_installed_is_none(trainer, gpu):
    absent = _patching.kernel_of("fake.kernels", "fake has a kernel")
    assert absent() is None and _patching.kernel_of("fake.utils", "fake has a kernel")() == "fake has a kernel"
    patcher = integration(Target("fake.utils", "entropy", lambda original: "ours", ("logits",), fused=absent))
    assert patcher.patch().left == {}
    patcher.unpatch()


def test_an_addition_that_cannot_be_made_hinders_nothing_else(trainer):
    utils, _, _ = trainer
    addition = Target("fake.utils", "entropy", lambda original: None, ("logits, backend",), addition=True)
    patcher = integration(KNOWN, addition)
    done = patcher.patch()
    assert done.replaced == ("fake.utils.score",) and utils.score is ours and utils.entropy is entropy
    assert "entropy has the signature (logits), expected (logits, backend)" in done.left["fake.utils.entropy"]
    patcher.unpatch()


def test_on_cuda_asks_for_devices(monkeypatch):
    for count in (0, 2):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        assert _patching.on_cuda() is (count > 0)


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

    class Head(torch.nn.Module):
        def __init__(self, chunk_size: int = 512):
            super().__init__()

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden

    assert signature_of(Head) == "chunk_size=512; self, hidden"
    assert signature_of(lambda a, *, b=1e-6, **c: None) == "a, *, b=1e-06, **c"
    assert signature_of(torch.compile(score)) == "logits, ids, temperature=1.0"


@pytest.mark.parametrize("name, trainer", TRAINERS)
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


def test_head_of_an_older_verl_is_refused(verl_with_recipe, monkeypatch):
    """Before 0.9.1 FusedLinearForPPO has one implementation: verl would take it without a word."""

    class FusedLinearForPPO(torch.nn.Module):
        def __init__(self, chunk_size=512):
            super().__init__()

        def forward(self, hidden_states, vocab_weights, input_ids, temperature=1.0):
            return "theirs"

    seen = []

    def patch_forward_with_backends(model, use_fused_kernels=False, fused_kernels_backend=None):
        seen.append((use_fused_kernels, fused_kernels_backend))

    for package in ("verl.utils.experimental", "verl.models", "verl.models.transformers"):
        module(monkeypatch, package)
    heads = module(monkeypatch, "verl.utils.experimental.torch_functional", FusedLinearForPPO=FusedLinearForPPO)
    users = module(
        monkeypatch,
        "verl.models.transformers.monkey_patch",
        patch_forward_with_backends=patch_forward_with_backends,
    )
    path = "verl.utils.experimental.torch_functional.FusedLinearForPPO"
    why = verl.patch().left[path]
    assert "has the signature (chunk_size=512; self" in why and heads.FusedLinearForPPO is FusedLinearForPPO
    with pytest.raises(IntegrationError, match=r"impl_backend: expected verl 0.9.1 or later for 'prime_kernels'"):
        users.patch_forward_with_backends(object(), True, "prime_kernels")
    for others in ((False, "prime_kernels"), (True, "torch"), (True, "triton")):
        users.patch_forward_with_backends(object(), *others)
    assert seen == [(False, "prime_kernels"), (True, "torch"), (True, "triton")]
    verl.unpatch()
    assert users.patch_forward_with_backends is patch_forward_with_backends


def test_recipe_of_an_older_verl_is_refused(verl_with_recipe):
    """As it was before verl 0.4: nothing is replaced, in verl neither."""
    made, recipe, _ = verl_with_recipe
    recipe.compute_dpo_accuracy = lambda token_level_scores, acc, eos_mask, n_samples: None
    before = {name: dict(vars(each)) for name, each in made.items()}
    with pytest.raises(IntegrationError, match=r"prime_core_algos\.compute_dpo_accuracy has the signature .*eos_mask"):
        verl.patch()
    assert {name: vars(each) for name, each in made.items()} == before


TRL = {
    "trl.trainer.utils": {
        "selective_log_softmax": "logits, index, temperature=1.0, row_mask=None",
        "entropy_from_logits": "logits, chunk_size=128",
        "selective_log_softmax_and_entropy": (
            "logits, index, entropy_requires_grad=True, temperature=1.0, row_mask=None"
        ),
    },
    "trl.kernels.chunked_logprob": {
        "ChunkedLogProbFunction": (
            "ctx, hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping=None, "
            "logit_scale=1.0, outputs=('entropy', 'log_sum_sq_probs', 'mean_logits', 'is_top1')"
        ),
    },
}
OPENRLHF = {
    "openrlhf.models.utils": {
        "log_probs_from_logits": "logits, labels, temperature=1.0",
        "compute_entropy": "logits",
    },
}
SKYRL = {
    "skyrl.backends.skyrl_train.utils.torch_utils": {
        "logprobs_from_logits": "logits, labels, inplace_backward=True",
        "logprobs_from_logits_v2": "logits, labels",
        "chunked_entropy_from_logits": "logits, requires_grad=False, attention_mask=None, chunk_size=1024",
    },
}
# What each has a kernel for, and the module that it needs.
KERNELS = {
    "trl": (
        trl,
        TRL,
        "triton",
        {"trl.trainer.utils.selective_log_softmax_and_entropy", "trl.kernels.chunked_logprob.ChunkedLogProbFunction"},
        set(),
    ),
    "verl": (verl, VERL, "flash_attn", {"verl.utils.torch_functional.logprobs_from_logits"}, set()),
    "skyrl": (
        skyrl,
        SKYRL,
        "flash_attn",
        {"skyrl.backends.skyrl_train.utils.torch_utils.logprobs_from_logits"},
        set(),
    ),
    "openrlhf": (
        openrlhf,
        OPENRLHF,
        "flash_attn",
        {"openrlhf.models.utils.log_probs_from_logits"},
        {"openrlhf.models.utils.compute_entropy"},
    ),
}


@pytest.mark.parametrize("installed", [True, False])
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_of_each_trainer(monkeypatch, gpu, name, installed):
    """Left in place with a GPU where what they need is installed; replaced where asked."""
    trainer, functions, needs, kernels, compiled = KERNELS[name]
    for loaded in [key for key in sys.modules if key.partition(".")[0] in (name, "recipe", needs)]:
        monkeypatch.delitem(sys.modules, loaded)
    for path in functions:
        parts = path.split(".")
        for depth in range(1, len(parts)):
            module(monkeypatch, ".".join(parts[:depth]))
    for path, members in functions.items():
        module(monkeypatch, path, **{key: eval(f"lambda {signature}: None") for key, signature in members.items()})
    there = _patching.exists
    monkeypatch.setattr(_patching, "exists", lambda path: installed if path == needs else there(path))
    monkeypatch.setattr(trl, "exists", lambda path: installed if path == needs else there(path))
    try:
        done = trainer.patch()
        assert set(done.left) == (kernels if installed else set()) | compiled
        assert set(done.replaced).isdisjoint(done.left)
        everything = trainer.patch(replace_fused=True)
        assert everything.left == {} and set(everything.replaced) == set(done.replaced) | set(done.left)
    finally:
        trainer.unpatch()


@pytest.mark.parametrize("name, trainer", TRAINERS)
def test_messages_name_the_tested_version(name, trainer):
    tested = {f"{name}=={version}" for version in trainer._INTEGRATION.tested.split(" and ")}
    assert tested == set(re.findall(rf"^{name}==[^;\s]+", PINS.read_text(), re.M))
