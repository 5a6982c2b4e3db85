"""The distribution that this package belongs to, and others that bring a package of the same import name."""

import json
import os
import re
import shlex
import shutil
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from urllib.parse import unquote, urlsplit

NAME = "prime-process-rewards"


def conflict(distributions: Iterable[str] | None = None) -> str | None:
    """None, or which other distributions bring a package ``prime_kernels`` and the commands that mend it.

    Files of two such distributions lie in one folder, and those installed last have replaced the others. Installers do
    not look for that.

    Args:
        distributions: names of those that bring ``prime_kernels``; what is installed if None.
    """
    if distributions is None:
        # Reads the metadata of all that is installed: for reports and errors, not for every import.
        distributions = metadata.packages_distributions().get("prime_kernels", [])
    others = sorted({re.sub(r"[-_.]+", "-", name).lower() for name in distributions} - {NAME})
    if not others:
        return None
    return (
        f"{' and '.join(others)} and {NAME} bring the same package prime_kernels, and what was installed last has "
        f"replaced files of the other; an environment takes one of them: pip uninstall -y {' '.join(others)} {NAME}, "
        f"then pip install {NAME} (importlib.metadata.packages_distributions()['prime_kernels'] lists both)"
    )


def how_to_build() -> str:
    """What the C++ extension lacks here and the command that builds it."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    build = f"PRIME_KERNELS_CPU=ON {install_command()}"
    if any(shutil.which(name) for name in names):
        return f"build it with: {build}"
    return (
        f"no C++ compiler ({', '.join(names)}) is on the path: install one (Debian: apt-get install g++), then {build}"
    )


def install_command() -> str:
    """The command that installs the package again from where it came from, and so builds its extension."""
    checkout = Path(__file__).resolve().parent.parent
    if (checkout / "CMakeLists.txt").is_file():
        return f"pip install -e {shlex.quote(str(checkout))}"
    folder = _installed_from()
    again = "pip install --force-reinstall --no-deps"
    # Built from an archive, an installer keeps the wheel, and would take the same one again.
    return (
        f"{again} --no-cache-dir --no-binary {NAME} {NAME}" if folder is None else f"{again} {shlex.quote(str(folder))}"
    )


def _installed_from() -> Path | None:
    """The folder that the distribution was installed from (PEP 610), where it still is there."""
    try:
        url = json.loads(metadata.distribution(NAME).read_text("direct_url.json") or "{}").get("url", "")
    except (metadata.PackageNotFoundError, ValueError):
        return None
    parts = urlsplit(url)
    folder = Path(unquote(parts.path))
    return folder if parts.scheme == "file" and (folder / "CMakeLists.txt").is_file() else None
