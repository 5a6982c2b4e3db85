"""Implicit process reward models offline: train one, score steps with it, choose with it, look at it."""

from .step_scorer import StepRewards, score_steps

__all__ = ["StepRewards", "score_steps"]
