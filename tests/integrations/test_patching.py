"""Replacing functions of another package: everywhere it holds them, all or nothing, and back again."""

import sys
from types import ModuleType

import pytest
import torch

from prime_kernels.integrations import IntegrationError, openrlhf, trl, verl
from prime_kernels.integrations._patching import Integration, Target, function_target, signature_of


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
    return Integration("fake", "1.0 to 1.2", targets, ("fake",))


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
    assert "versions that work: 1.0 to 1.2" in said
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
            with pytest.raises(IntegrationError, match=r"fake \(not installed\).*versions that work: 1.0 to 1.2"):
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
    with pytest.raises(IntegrationError, match=rf"{name} .*cannot be imported.*versions that work: "):
        trainer.patch()
    trainer.unpatch()
