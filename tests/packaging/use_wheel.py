"""What an installed wheel must do: import fast, compute, pass the self-test, and ask for nothing but torch.

usage: python use_wheel.py FOLDER_WITH_TORCH [--pure]

Run by tests/packaging/test_wheel.py and try_wheels.py with the interpreter of an environment that holds the wheel
alone. ``--pure``: the wheel without the extension, whose results come from PyTorch.
"""

import sys
import time
import warnings


class Refuse:
    """What the library must do without is refused by name."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"triton", "transformers", "vllm", "prime_trainer"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Refuse())
# Appended here and not by PYTHONPATH, so that no .pth file in it runs (an editable install has one).
sys.path.append(sys.argv[1])
import torch  # noqa: E402

start = time.perf_counter()
import prime_kernels  # noqa: E402

assert time.perf_counter() - start < 1.0, "slow import"
assert prime_kernels.__file__.startswith(sys.prefix), prime_kernels.__file__

pure = "--pure" in sys.argv
backend = "eager" if pure else "cpu"
reasons = prime_kernels.available_backends()
assert reasons["eager"] is None and (reasons["cpu"] is not None) is pure, reasons
logits, ids = torch.randn(5, 321), torch.randint(0, 321, (5,))
logits.requires_grad_()
with warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter("always")
    logp = prime_kernels.log_probs(logits, ids)
assert any("runs CPU tensors on 'eager'" in str(each.message) for each in warned) is pure, warned
torch.testing.assert_close(logp, logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0])
logp.sum().backward()
assert logits.grad.abs().sum() > 0

from prime_kernels import _native, _selftest  # noqa: E402

outcomes = list(_selftest.run())
assert all(each.passed for each in outcomes), outcomes
assert not {"triton", "transformers", "vllm", "prime_trainer"} & set(sys.modules)
if pure:
    print("works without the extension")
else:
    assert _native._C.__file__.startswith(sys.prefix), _native._C.__file__
    # All that is public and is neither a type nor about backends.
    operations = {name for name in prime_kernels.__all__ if name.islower()} - {"available_backends", "use_backend"}
    assert {each.op for each in outcomes if each.backend == "cpu"} == operations, outcomes
    print("works on", _native.build_info()["cpu"])
