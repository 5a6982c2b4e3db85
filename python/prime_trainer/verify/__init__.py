"""Scores responses in processes of their own, with a hard time limit for every answer."""

from __future__ import annotations

from .boxed import last_boxed
from .verifier import Verdict, Verifier, VerifierError

__all__ = ["Verdict", "Verifier", "VerifierError", "last_boxed"]
