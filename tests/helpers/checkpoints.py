"""What a run left on disk."""

from pathlib import Path
from typing import Any

from prime_trainer.run import checkpoint


def load_latest(run_dir: Path) -> dict[str, Any] | None:
    """The newest state, None where there is none."""
    found = sorted((run_dir / "checkpoints").glob("step_*"))
    return checkpoint.load(found[-1]) if found else None
