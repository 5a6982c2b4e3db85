"""Scores responses in processes of their own, with a hard time limit for every answer and every program."""

from __future__ import annotations

from .extract import last_boxed
from .sandbox import SandboxError
from .verdict import TIME_LIMIT, Verdict
from .verifier import Verifier, confinement_for
from .worker_pool import VerifierError

__all__ = ["TIME_LIMIT", "SandboxError", "Verdict", "Verifier", "VerifierError", "confinement_for", "last_boxed"]
