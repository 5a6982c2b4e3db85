"""Replaces functions of another package wherever its modules hold them, and puts them back."""

import importlib
import importlib.util
import inspect
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch

_LOG = logging.getLogger("prime_kernels.integrations")


class IntegrationError(RuntimeError):
    """A package cannot be patched; the message names what was found and the versions that are supported."""


class Patched(NamedTuple):
    """What ``patch()`` did to a trainer."""

    replaced: tuple[str, ...]
    """Dotted names of the functions and classes that are ours now."""
    left: dict[str, str]
    """Those that stay the trainer's own, each with the reason."""


@dataclass(frozen=True)
class Target:
    """One function or class to replace.

    Args:
        module: where it is defined.
        name: its name there.
        replace: makes the replacement from the original.
        signatures: those known to be replaced faithfully, as :func:`signature_of` writes them.
        optional: absent in some of these versions.
        fused: names the kernel that the original runs on CUDA, or None where that is plain PyTorch.
        addition: the replacement only adds a choice, so that an unknown signature is no reason to replace nothing.
    """

    module: str
    name: str
    replace: Callable[[Any], Any]
    signatures: tuple[str, ...]
    optional: bool = False
    fused: Callable[[], str | None] = lambda: None
    addition: bool = False

    @property
    def path(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass
class Integration:
    """What is replaced in one package.

    Args:
        package: its name.
        versions: those whose functions have the known signatures, for messages.
        tested: those of them that the tests run against, for messages.
        targets: what to replace; all of it or nothing.
        namespaces: top-level packages whose modules hold the originals.
    """

    package: str
    versions: str
    tested: str
    targets: tuple[Target, ...]
    namespaces: tuple[str, ...]
    _replaced: dict[Target, tuple[Any, Any]] = field(default_factory=dict)

    def patch(self, *, replace_fused: bool = False) -> Patched:
        """Replace the targets, or raise IntegrationError and replace none.

        Where there is a GPU, what runs a fused kernel there stays in place, or is put back, unless ``replace_fused``:
        no committed table has ours faster on a GPU. A second call like the first changes nothing.
        """
        keep_fused = on_cuda() and not replace_fused
        found: dict[Target, tuple[Any, Any]] = {}
        left: dict[Target, str] = {}
        for target in self.targets:
            original = self._original(target)
            if original is None:
                continue
            wrong = self._wrong_signature(target, original)
            kernel = target.fused() if keep_fused else None
            if wrong and not target.addition:
                raise IntegrationError(wrong)
            if wrong or kernel:
                left[target] = wrong or f"{kernel}; patch(replace_fused=True) replaces it"
            else:
                found[target] = (original, target.replace(original))
        for target, (original, replacement) in found.items():
            if target not in self._replaced:
                self._replaced[target] = (original, replacement)
            # Once more when patched already: modules loaded since may have copied the original from elsewhere.
            self._swap(*self._replaced[target])
        for target in left:
            self._put_back(target)
        done = Patched(tuple(target.path for target in found), {target.path: why for target, why in left.items()})
        _LOG.info("%s: replaced %s", self._installed(), ", ".join(done.replaced) or "nothing")
        for path, why in done.left.items():
            _LOG.warning("%s: left %s in place: %s", self._installed(), path, why)
        return done

    def _put_back(self, target: Target) -> None:
        if target in self._replaced:
            original, replacement = self._replaced.pop(target)
            self._swap(replacement, original)

    def unpatch(self) -> None:
        """Put every original back. Without a patch, nothing happens."""
        for target in list(self._replaced):
            self._put_back(target)

    def _original(self, target: Target) -> Any:
        if target in self._replaced:
            return self._replaced[target][0]
        try:
            if target.optional and not exists(target.module):
                return None
            found = getattr(importlib.import_module(target.module), target.name, None)
        except ImportError as error:
            raise IntegrationError(
                f"{self._installed()}: {target.module} cannot be imported ({error}); {self._known()}"
            ) from error
        if found is None and not target.optional:
            raise IntegrationError(f"{self._installed()} has no {target.path}; {self._known()}")
        return found

    def _wrong_signature(self, target: Target, original: Any) -> str | None:
        got = signature_of(original)
        if got in target.signatures:
            return None
        expected = " or ".join(f"({each})" for each in target.signatures)
        return f"{self._installed()}: {target.path} has the signature ({got}), expected {expected}; {self._known()}"

    def _swap(self, old: Any, new: Any) -> None:
        for holder, name in list(self._holders(old)):
            holder[name] = new

    def _holders(self, value: Any) -> Iterator[tuple[dict[str, Any], Any]]:
        """The module namespaces, and dictionaries in them such as registries, that hold ``value``."""
        for module_name, module in list(sys.modules.items()):
            if module_name.partition(".")[0] not in self.namespaces or not hasattr(module, "__dict__"):
                continue
            for name, held in list(vars(module).items()):
                if held is value:
                    yield vars(module), name
                elif type(held) is dict and not name.startswith("__"):
                    yield from ((held, key) for key, entry in list(held.items()) if entry is value)

    def _known(self) -> str:
        return f"the signatures known here are those of {self.versions}, tested with {self.tested}"

    def _installed(self) -> str:
        try:
            return f"{self.package} {version(self.package)}"
        except PackageNotFoundError:
            return f"{self.package} (not installed)"


def function_target(
    module: str,
    function: Callable[..., Any],
    *signatures: str,
    optional: bool = False,
    fused: Callable[[], str | None] = lambda: None,
) -> Target:
    """The function of the same name in ``module``, replaced by ``function``."""
    return Target(module, function.__name__, lambda original: function, signatures, optional, fused)


def on_cuda() -> bool:
    """Whether this process sees a GPU. Counting them starts no CUDA context, so that it can still be forked."""
    return torch.cuda.device_count() > 0


def kernel_of(module: str, kernel: str) -> Callable[[], str | None]:
    """For :class:`Target`: ``kernel``, where ``module``, which it needs, can be imported."""
    return lambda: kernel if exists(module) else None


def exists(module: str) -> bool:
    """Whether a module can be found; its parent packages are imported to see."""
    parent = module.rpartition(".")[0]
    return (not parent or exists(parent)) and importlib.util.find_spec(module) is not None


def signature_of(function: Any) -> str:
    """Names and defaults of the parameters; of an autograd function, those of its forward; of a module, those of its
    constructor and its forward."""
    forward = getattr(function, "forward", function)
    if inspect.isclass(function) and issubclass(function, torch.nn.Module):
        return f"{_parameters(function)}; {_parameters(forward)}"
    return _parameters(forward)


def _parameters(function: Any) -> str:
    signature = inspect.signature(function)
    bare = [each.replace(annotation=inspect.Parameter.empty) for each in signature.parameters.values()]
    return str(inspect.Signature(bare))[1:-1]
