"""The distribution that this package belongs to, and others that bring a package of the same import name."""

import re
from collections.abc import Iterable

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
        from importlib.metadata import packages_distributions

        distributions = packages_distributions().get("prime_kernels", [])
    others = sorted({re.sub(r"[-_.]+", "-", name).lower() for name in distributions} - {NAME})
    if not others:
        return None
    return (
        f"{' and '.join(others)} and {NAME} bring the same package prime_kernels, and what was installed last has "
        f"replaced files of the other; an environment takes one of them: pip uninstall -y {' '.join(others)} {NAME}, "
        f"then pip install {NAME} (importlib.metadata.packages_distributions()['prime_kernels'] lists both)"
    )
