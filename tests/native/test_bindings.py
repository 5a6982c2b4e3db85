"""The boundary to the extension: arguments by name, constants that both languages have, short ways to the kernels."""

import re
import sys

import pytest
import torch

import prime_kernels as pk
from prime_kernels import _constants, _dispatch, _selftest

WHITEN = {"values": 0, "n_tokens": 0, "moments": 0, "n_parts": 0, "out": 0, "n_threads": 1}


def test_constants_are_those_of_the_header(native):
    for name in ("NORMALIZE_EPS", "WHITEN_EPS", "MAX_LOG_RHO"):
        assert getattr(native._C, name) == getattr(_constants, name)
    assert tuple(native._C.PRM_KINDS) == _constants.PRM_KINDS
    assert sorted(native._C.PRM_KINDS.values()) == list(range(len(_constants.PRM_KINDS)))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"out": None}, "whiten: missing argument out"),
        ({"sums": 0}, "whiten: expected the arguments values n_tokens .*, got .* sums"),
        ({"values": "0"}, "whiten: argument values has the wrong type or range"),
        ({"values": -1}, "whiten: argument values has the wrong type or range"),
        ({"n_threads": 2**40}, "whiten: argument n_threads has the wrong type or range"),
        ({"n_tokens": 1.5}, "whiten: argument n_tokens has the wrong type or range"),
    ],
)
def test_arguments_are_named_and_complete(native, changes, message):
    arguments = {name: value for name, value in (WHITEN | changes).items() if value is not None}
    with pytest.raises(TypeError, match=message):
        native._C.whiten(**arguments)


def test_arguments_have_no_places(native):
    native._C.whiten(**WHITEN)
    with pytest.raises(TypeError, match="incompatible function arguments"):
        native._C.whiten(*WHITEN.values())


def test_rejected_arguments_name_the_kernel(native):
    with pytest.raises(ValueError, match=re.escape("prime_kernels: whiten rejected its arguments (status 1)")):
        native._C.whiten(**WHITEN | {"n_tokens": -1})


def frames_to_kernels(native, call):
    """The names of the Python functions between the public function and each call of the extension."""
    public = {getattr(pk, name).__code__ for name in _dispatch.OPERATIONS}
    found = []

    def profile(frame, event, function):
        if event != "c_call" or getattr(function, "__module__", None) != native._C.__name__:
            return
        names = []
        while frame is not None:
            if frame.f_code.co_name == "backward":
                return  # called by the autograd engine, not by the public function
            names.append(frame.f_code.co_name)
            if frame.f_code in public:
                found.append(names[::-1])
                return
            frame = frame.f_back

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found


@pytest.mark.parametrize("op", sorted(_dispatch.OPERATIONS))
def test_at_most_five_frames_from_the_public_call_to_the_kernel(native, op):
    call, leaves = _selftest._cases(torch.Generator().manual_seed(0), "cpu")[op]
    found = frames_to_kernels(native, lambda: call("cpu", *(leaf.clone().requires_grad_() for leaf in leaves)))
    assert found
    for names in found:
        assert len(names) <= 5, " -> ".join(names)
        assert len(set(names)) == len(names), " -> ".join(names)
