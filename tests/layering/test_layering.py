"""The import rules of both packages, read from their syntax trees.

prime_kernels knows nothing of prime_trainer, transformers or vllm; prime_trainer uses only what prime_kernels exports;
transformers, vllm, triton and the compiled extension are imported in one place each, and lazily, so that importing
either package needs none of them.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import prime_kernels
from prime_kernels import integrations

ROOT = Path(__file__).resolve().parents[2]
KERNELS, TRAINER = ROOT / "prime_kernels", ROOT / "python" / "prime_trainer"
TRITON_KERNELS, NATIVE = KERNELS / "_triton", KERNELS / "_native"


class Import(NamedTuple):
    """One imported module or name: where, the dotted name, and whether a function body holds the statement."""

    file: Path
    line: int
    name: str
    lazy: bool

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line} imports {self.name}"


def imports_of(file: Path) -> Iterator[Import]:
    """Every import statement of a file, relative ones resolved; `from a import b` counts as a.b."""
    package = file.relative_to(ROOT / "python" if TRAINER in file.parents else ROOT).with_suffix("").parts
    package = package[:-1]

    def visit(node: ast.AST, lazy: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(file, node.lineno, alias.name, lazy)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*above, *([node.module] if node.module else [])))
            for alias in node.names:
                yield Import(file, node.lineno, f"{module}.{alias.name}", lazy)
        inside = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            inside = True
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside)

    yield from visit(ast.parse(file.read_text(), str(file)), False)


def imports_under(*folders: Path) -> list[Import]:
    files = [file for folder in folders for file in sorted(folder.rglob("*.py"))]
    return [found for file in files for found in imports_of(file)]


def names(found: Import, module: str) -> bool:
    return found.name == module or found.name.startswith(module + ".")


def listed(imports: list[Import]) -> str:
    return "\n".join(map(str, imports))


@pytest.mark.parametrize("forbidden", ["prime_trainer", "transformers", "vllm", "trl", "verl", "openrlhf"])
def test_kernels_know_nothing_of(forbidden):
    wrong = [found for found in imports_under(KERNELS) if names(found, forbidden)]
    assert not wrong, listed(wrong)


def test_trainer_uses_only_what_kernels_export():
    exported = {f"prime_kernels.{name}" for name in (*prime_kernels.__all__, "__version__", "__all__")}
    exported |= {f"prime_kernels.integrations.{name}" for name in integrations.__all__}
    exported |= {f"prime_kernels._distribution.{name}" for name in ("NAME", "conflict")}  # one distribution has both
    wrong = [
        found
        for found in imports_under(TRAINER)
        if found.name.startswith("prime_kernels.") and found.name not in exported
    ]
    assert not wrong, listed(wrong)
    for file in sorted(TRAINER.rglob("*.py")):
        tree = ast.parse(file.read_text(), str(file))
        aliases = {
            alias.asname or alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.Import)
            for alias in node.names
            if alias.name == "prime_kernels"
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases:
                assert f"prime_kernels.{node.attr}" in exported, f"{file}:{node.lineno} uses prime_kernels.{node.attr}"


@pytest.mark.parametrize(
    ("module", "room"), [("transformers", "models"), ("peft", "models/adapters"), ("vllm", "rollout/vllm")]
)
def test_imported_in_one_room_inside_functions(module, room):
    found = [found for found in imports_under(KERNELS, TRAINER) if names(found, module)]
    outside = [one for one in found if not one.file.is_relative_to(TRAINER / room)]
    assert not outside, listed(outside)
    assert found and all(one.lazy for one in found), listed([one for one in found if not one.lazy])


# A room imports from rooms of earlier floors and from itself.
FLOORS = (
    ("errors", "config"),
    ("scale", "verify"),
    ("run",),
    ("models", "report"),
    ("data", "plan"),
    ("rollout", "train"),
    ("evaluation", "prm"),
    ("loop", "sft"),
    ("profiling", "calibrate"),
    ("cli",),
)
FLOOR = {room: number for number, floor in enumerate(FLOORS) for room in floor}


def room_of(name: str) -> str:
    """The room of a dotted name: `prime_trainer.run.checkpoint.load` is in "run"."""
    return name.split(".")[1]


def test_every_room_has_a_floor():
    found = {path.stem for path in TRAINER.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert found - {"__init__"} == set(FLOOR)


def test_rooms_import_from_earlier_floors_alone():
    wrong = []
    for found in imports_under(TRAINER):
        if (found.file.parent == TRAINER and found.file.stem == "__init__") or not names(found, "prime_trainer"):
            continue
        room, other = found.file.relative_to(TRAINER).parts[0].removesuffix(".py"), room_of(found.name)
        if room != other and FLOOR[other] >= FLOOR[room]:
            wrong.append(found)
    assert not wrong, listed(wrong)


COMMANDS = (
    *("cli.py", "loop.py", "sft.py", "profiling.py", "calibrate.py", "plan/plan.py", "prm/train.py"),
    *("prm/score.py", "prm/select.py"),
    *("prm/processbench.py", "evaluation/held_out.py", "evaluation/responses.py", "evaluation/benchmark_table.py"),
)


def test_the_whole_configuration_is_for_commands_alone():
    """All else takes the sections that it reads; a checkpoint's older settings are completed by their defaults."""
    name = "prime_trainer.config.run_config.RunConfig"
    importers = {found.file for found in imports_under(TRAINER) if found.name == name}
    outside = {file.relative_to(TRAINER).as_posix() for file in importers if file.parent != TRAINER / "config"}
    assert outside == {*COMMANDS, "run/checkpoint.py"}


def test_no_circle_between_files():
    """Lazy imports count too: what a function imports belongs to the order as well."""
    files = {file.relative_to(TRAINER.parent).with_suffix("") for file in TRAINER.rglob("*.py")}
    modules = {".".join(file.parts).removesuffix(".__init__"): file for file in files}
    edges: dict[str, set[str]] = {}
    for found in imports_under(TRAINER):
        if not names(found, "prime_trainer"):
            continue
        name = found.name
        while name not in modules:
            name = name.rpartition(".")[0]
        source = ".".join(found.file.relative_to(TRAINER.parent).with_suffix("").parts).removesuffix(".__init__")
        # A package's own files are imported by its __init__, and import each other, not it.
        if name != source and not source.startswith(name + "."):
            edges.setdefault(source, set()).add(name)
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module in done:
            return
        for other in edges.get(module, ()):
            visit(other, (*path, module))
        done.add(module)

    for module in modules:
        visit(module, ())


def test_rooms_are_small():
    for room in {file.parent for file in TRAINER.rglob("*.py")} - {TRAINER}:
        assert len(list(room.glob("*.py"))) <= 13, f"{room.relative_to(ROOT)} holds more than twelve files"


def test_extension_is_imported_by_native_alone():
    importers = {found.file for found in imports_under(KERNELS, TRAINER) if names(found, "prime_kernels._C")}
    assert importers == {NATIVE / "__init__.py"}


def test_native_is_imported_inside_functions():
    """It loads the extension when it is imported itself."""
    found = [one for one in imports_under(KERNELS) if names(one, "prime_kernels._native") and not one.lazy]
    wrong = [one for one in found if NATIVE not in one.file.parents]
    assert not wrong, listed(wrong)


def test_triton_stays_among_its_kernels():
    """Kernel files decorate with triton where they are read, so the folder as a whole is what loads lazily."""
    found = imports_under(KERNELS, TRAINER)
    outside = [one for one in found if names(one, "triton") and TRITON_KERNELS not in one.file.parents]
    assert not outside, listed(outside)
    eager = [
        one
        for one in found
        if names(one, "prime_kernels._triton") and not one.lazy and TRITON_KERNELS not in one.file.parents
    ]
    assert not eager, listed(eager)


def test_kernels_are_leaves():
    wrong = [found for found in imports_under(TRITON_KERNELS, NATIVE) if names(found, "prime_kernels.ops")]
    assert not wrong, listed(wrong)


def test_contract_file_holds_nothing_but_the_contract():
    allowed = (ast.ImportFrom, ast.Assign, ast.Expr)
    tree = ast.parse((KERNELS / "__init__.py").read_text())
    assert all(isinstance(node, allowed) for node in tree.body)
    assert all(hasattr(prime_kernels, name) for name in prime_kernels.__all__)


def fresh(code: str) -> str:
    """What a new interpreter prints."""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_needs_only_torch():
    code = "import sys, torch; before = set(sys.modules); import prime_kernels; print(*(set(sys.modules) - before))"
    loaded = fresh(code).split()
    roots = {name.partition(".")[0] for name in loaded}
    assert "prime_kernels" in roots
    assert not roots & {"triton", "transformers", "vllm", "prime_trainer"}
    assert "prime_kernels._C" not in loaded


def test_drop_ins_import_no_trainer():
    """Only patch() does."""
    code = "import sys; from prime_kernels.integrations import openrlhf, skyrl, trl, verl; print(*sys.modules)"
    roots = {name.partition(".")[0] for name in fresh(code).split()}
    assert "prime_kernels" in roots and not roots & {
        "trl",
        "verl",
        "openrlhf",
        "skyrl",
        "transformers",
        "prime_trainer",
    }


def test_import_takes_under_a_second_beyond_torch():
    seconds = float(
        fresh(
            "import time, torch; start = time.process_time(); import prime_kernels; print(time.process_time() - start)"
        )
    )
    assert seconds < 1.0
