"""Scores responses in processes of their own, with a hard time limit for every answer."""

from __future__ import annotations

from .boxed import last_boxed
from .verifier import Verdict, Verifier

__all__ = ["Verdict", "Verifier", "last_boxed"]
