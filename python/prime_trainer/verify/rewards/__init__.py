"""A reward of the user's own, `task.reward = "module:function"`, in worker processes."""

from __future__ import annotations

from .pool import RewardPool

__all__ = ["RewardPool"]
