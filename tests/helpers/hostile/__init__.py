"""Programs that a trainer must survive. Each tries to harm, to escape, or to be scored right without being right.

A program can be right only by finding out `SECRET`: it is the expected result, it stands in files, in the environment
and in the memory of other processes, and no program is told it. In braces stand the places to attack. A program writes
`print(..)` for what it found; `solve` returns it where the tests call a function.
"""

from .forging import FORGING
from .harming import HARMING
from .looking import CHOOSE, HAND_IN, HELPERS, LOOKING


def programs(places: dict[str, object]) -> dict[str, str]:
    """Every program by its name, with the places filled in."""
    found = {f"looking: {k}": HELPERS + v + "\n" + CHOOSE + HAND_IN for k, v in LOOKING.items()}
    found |= {f"harming: {k}": v for k, v in HARMING.items()}
    found |= {f"forging: {k}": v for k, v in FORGING.items()}
    return {name: text.format(**places) for name, text in found.items()}
