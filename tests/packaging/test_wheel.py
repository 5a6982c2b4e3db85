"""sdist -> wheel -> an empty environment: the library imports, computes, and asks for nothing but torch."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# torch comes from the outer environment; what the library must do without is refused by name.
USE = """
import sys, time

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"triton", "transformers", "vllm", "prime_trainer"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refuse())
sys.path.append(sys.argv[1])
import torch
start = time.perf_counter()
import prime_kernels
assert time.perf_counter() - start < 1.0, "slow import"
assert prime_kernels.__file__.startswith(sys.prefix), prime_kernels.__file__
assert prime_kernels.available_backends()["cpu"] is None, prime_kernels.available_backends()

from prime_kernels import _native
assert _native._C.__file__.startswith(sys.prefix), _native._C.__file__
logits, ids = torch.randn(5, 321), torch.randint(0, 321, (5,))
logits.requires_grad_()
logp = prime_kernels.log_probs(logits, ids, backend="cpu")
torch.testing.assert_close(logp, logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0])
logp.sum().backward()
assert logits.grad.abs().sum() > 0
assert not {"triton", "transformers", "vllm", "prime_trainer"} & set(sys.modules)
print("works")
"""


def run(*command, **environment):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, env={**clean, **environment}, cwd="/"
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """Both archives; `build` makes the wheel out of the unpacked sdist, so the sdist is proved complete."""
    for tool in ("build", "pybind11", "setuptools", "wheel", "cmake", "ninja"):
        pytest.importorskip(tool)
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, PRIME_KERNELS_CUDA="OFF")
    return folder


@pytest.fixture(scope="module")
def wheel(dist):
    (path,) = dist.glob("*.whl")
    return path


def test_wheel_contents(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    assert {"prime_kernels/__init__.py", "prime_kernels/py.typed", f"prime_kernels/_C{suffix}"} <= names
    assert "prime_trainer/__init__.py" in names
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"prime_kernels", "prime_trainer", f"prime_kernels-{version('prime-kernels')}.dist-info"}
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    assert not [name for name in names if "test" in name or name.endswith((".cpp", ".cu", ".h"))]
    sources = {str(path.relative_to(ROOT)) for path in ROOT.glob("prime_kernels/**/*.py")}
    sources |= {str(path.relative_to(ROOT / "python")) for path in ROOT.glob("python/prime_trainer/**/*.py")}
    assert {name for name in names if name.endswith(".py")} == sources


def test_wheel_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    lines = archive.read(metadata).decode().splitlines()
    required = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]
    assert [name for name in required if "extra ==" not in name] == ["torch>=2.9"]
    extras = {line.removeprefix("Provides-Extra: ") for line in lines if line.startswith("Provides-Extra: ")}
    assert {"train", "triton", "vllm", "vllm-cpu", "cuda", "test"} <= extras
    (entry_points,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
    assert "prime-trainer = prime_trainer.cli:main" in archive.read(entry_points).decode()


def test_works_in_an_empty_environment(wheel, tmp_path):
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    # The outer pip installs into the new environment, which so stays empty.
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    outer = sysconfig.get_path("platlib")
    # Added to sys.path by hand, so that no .pth file of the outer environment runs (an editable install has one).
    script = tmp_path / "use.py"
    script.write_text(USE)
    assert run(python, script, outer).strip() == "works"
