"""Seconds of a step from measured rates: what each stage does, counted as `loop.Run.train_step` does it.

    rollout  batches x (first token + longest x overhead of a token + mean x one more token of each)
    score    groups x passes without gradients: old policy, reference, and a PRM that scores apart from its update
    prm      groups x (PRM pass + a pass more where responses are coupled) + optimizer steps
    policy   groups x epochs x policy pass + optimizer steps

The longest response of a batch is taken to have `rollout.max_new_tokens`. Verification, groups that the filter drops
and that are sampled again, and the arithmetic between the stages are not in it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..config.needs import Needs
from ..config.sections import COUPLED_KINDS, PolicyConfig, PRMConfig, RolloutConfig
from ..report.markdown import grid


@dataclass(frozen=True)
class Rates:
    """Measured seconds of one device, at the run's layout and lengths."""

    score: float
    """A group in a pass without gradients."""
    prm: float
    """A group in forward and backward of the PRM's loss."""
    policy: float
    """A group in forward and backward of the policy's loss."""
    optimizer: float
    """One optimizer step."""
    first_token: float | None = None
    """Reading the prompts of a batch of responses and drawing their first tokens; None: this engine is not probed."""
    overhead: float = 0.0
    """Of drawing one more token, however many responses there are."""
    next_token: float = 0.0
    """Drawing one more token for each response of a batch, beside the overhead."""


def predict(
    rates: Rates, needs: Needs, policy: PolicyConfig, prm: PRMConfig, rollout: RolloutConfig, response_tokens: int
) -> dict[str, float]:
    """Seconds by stage; stages that a run does not have are left out."""
    groups = rollout.prompts_per_step
    updates = needs.prm and prm.update != "none"
    found: dict[str, float] = {}
    if rates.first_token is not None:
        batches = math.ceil(rollout.prompts_per_step / max(1, rollout.batch_size // rollout.n))
        tokens = (rollout.max_new_tokens - 1) * rates.overhead + (response_tokens - 1) * rates.next_token
        found["rollout"] = batches * (rates.first_token + tokens)
    # With `prm.update = "after"` the pass that scores is the one that updates.
    scoring = int(needs.reference) + int(needs.old_logp) + int(needs.prm and prm.update != "after")
    if scoring:
        found["score"] = groups * scoring * rates.score
    if updates:
        again = rates.score if prm.kind in COUPLED_KINDS else 0.0
        found["prm"] = groups * (rates.prm + again) + prm.minibatches * rates.optimizer
    found["policy"] = groups * policy.epochs * rates.policy + policy.optimizer_steps * rates.optimizer
    return found


def render(rates: Rates, seconds: dict[str, float], rollout: RolloutConfig, response_tokens: int) -> str:
    """The prediction as Markdown."""
    total = sum(seconds.values())
    rows = [[stage, f"{value:.1f}", f"{value / total:.0%}"] for stage, value in seconds.items()]
    rows.append(["**sum**", f"**{total:.1f}**", ""])
    missing = "" if rates.first_token is not None else f", rollouts of {rollout.engine} apart, which are not probed"
    title = f"A step with responses of {response_tokens} tokens by probes of this device{missing}:"
    return f"{title}\n\n" + grid(["seconds of a step", "", "share"], rows, numbers=True).rstrip()
