"""Replaces functions of another package wherever its modules hold them, and puts them back."""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any


class IntegrationError(RuntimeError):
    """A package cannot be patched; the message names what was found and the versions that are supported."""


@dataclass(frozen=True)
class Target:
    """One function or class to replace.

    Args:
        module: where it is defined.
        name: its name there.
        replace: makes the replacement from the original.
        signatures: those known to be replaced faithfully, as :func:`signature_of` writes them.
        optional: absent in some of these versions.
    """

    module: str
    name: str
    replace: Callable[[Any], Any]
    signatures: tuple[str, ...]
    optional: bool = False


@dataclass
class Integration:
    """What is replaced in one package.

    Args:
        package: its name.
        versions: those whose functions have the known signatures, for messages.
        tested: the one of them that the tests run against, for messages.
        targets: what to replace; all of it or nothing.
        namespaces: top-level packages whose modules hold the originals.
    """

    package: str
    versions: str
    tested: str
    targets: tuple[Target, ...]
    namespaces: tuple[str, ...]
    _replaced: dict[Target, tuple[Any, Any]] = field(default_factory=dict)

    def patch(self) -> None:
        """Replace every target, or raise IntegrationError and replace none. A second call changes nothing."""
        found = {}
        for target in self.targets:
            original = self._original(target)
            if original is not None:
                self._check(target, original)
                found[target] = (original, target.replace(original))
        for target, (original, replacement) in found.items():
            if target not in self._replaced:
                self._replaced[target] = (original, replacement)
            # Once more when patched already: modules loaded since may have copied the original from elsewhere.
            self._swap(*self._replaced[target])

    def unpatch(self) -> None:
        """Put every original back. Without a patch, nothing happens."""
        while self._replaced:
            _, (original, replacement) = self._replaced.popitem()
            self._swap(replacement, original)

    def _original(self, target: Target) -> Any:
        if target in self._replaced:
            return self._replaced[target][0]
        try:
            if target.optional and not _exists(target.module):
                return None
            found = getattr(importlib.import_module(target.module), target.name, None)
        except ImportError as error:
            raise IntegrationError(
                f"{self._installed()}: {target.module} cannot be imported ({error}); {self._known()}"
            ) from error
        if found is None and not target.optional:
            raise IntegrationError(f"{self._installed()} has no {target.module}.{target.name}; {self._known()}")
        return found

    def _check(self, target: Target, original: Any) -> None:
        got = signature_of(original)
        if got not in target.signatures:
            expected = " or ".join(f"({each})" for each in target.signatures)
            raise IntegrationError(
                f"{self._installed()}: {target.module}.{target.name} has the signature ({got}), expected {expected}; "
                f"{self._known()}"
            )

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


def function_target(module: str, function: Callable[..., Any], *signatures: str, optional: bool = False) -> Target:
    """The function of the same name in ``module``, replaced by ``function``."""
    return Target(module, function.__name__, lambda original: function, signatures, optional)


def _exists(module: str) -> bool:
    """Whether a module can be found; its parent packages are imported to see."""
    parent = module.rpartition(".")[0]
    return (not parent or _exists(parent)) and importlib.util.find_spec(module) is not None


def signature_of(function: Any) -> str:
    """Names and defaults of the parameters; of an autograd function, those of its forward."""
    signature = inspect.signature(getattr(function, "forward", function))
    bare = [each.replace(annotation=inspect.Parameter.empty) for each in signature.parameters.values()]
    return str(inspect.Signature(bare))[1:-1]
