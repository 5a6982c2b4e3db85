"""Scores responses in processes of their own, with a hard time limit for every answer and every program."""

from __future__ import annotations

from .boxed import last_boxed
from .host import SandboxError
from .pool import VerifierError
from .verdict import TIME_LIMIT, Verdict
from .verifier import Verifier, sandbox

__all__ = ["TIME_LIMIT", "SandboxError", "Verdict", "Verifier", "VerifierError", "last_boxed", "sandbox"]
