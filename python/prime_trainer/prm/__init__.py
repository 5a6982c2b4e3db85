"""Implicit process reward models offline: train one, score steps with it, choose with it, look at it."""

from .score import StepRewards, score_steps

__all__ = ["StepRewards", "score_steps"]
