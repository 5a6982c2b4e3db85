"""Which models, passes and log-probs a step of `rl` needs: one rule for the loop, the update and the plan."""

from __future__ import annotations

from dataclasses import dataclass

from .sections import AlgorithmConfig, PolicyConfig, PRMConfig, RolloutConfig


@dataclass(frozen=True)
class Needs:
    """Beside the policy, which every step trains."""

    prm: bool
    """A process reward model: scored each step, and trained unless `prm.update` is "none"."""
    policy_is_reference: bool
    """The PRM's reference is the policy as it sampled: no third model."""
    reference: bool
    """A frozen copy of the model that training starts from, for the PRM's rewards or the KL penalty."""
    old_logp: bool
    """A scoring pass of the policy before its update: log-probs of the sampled tokens as the trainer computes them."""
    ppo_ratio: bool
    """PPO's ratio compares with `old_logp`. With one optimizer step a batch it is exactly 1 and needs no pass."""
    candidates: bool
    """Probable tokens of each position, scored by policy and PRM."""
    fused_policy_loss: bool
    """The policy's loss is computed together with its gradients, unless the ranks share out the vocabulary."""


def needs_of(policy: PolicyConfig, prm: PRMConfig, algorithm: AlgorithmConfig, rollout: RolloutConfig) -> Needs:
    """The needs of a run; `rollout` is resolved (`RolloutConfig.resolved`)."""
    dense = algorithm.process_coef > 0
    policy_is_reference = dense and prm.ref_type == "policy"
    # An engine's log-probs are not quite the trainer's; those of transformers differ by rounding alone.
    corrects_engine = rollout.engine != "transformers" or rollout.cap > 0
    return Needs(
        prm=dense,
        policy_is_reference=policy_is_reference,
        reference=policy.kl_coef > 0 or (dense and prm.ref_type == "freeze"),
        old_logp=policy.optimizer_steps > 1 or policy_is_reference or corrects_engine,
        ppo_ratio=policy.optimizer_steps > 1,
        candidates=algorithm.candidates.coef > 0,
        fused_policy_loss=policy.fused_loss and algorithm.candidates.coef == 0,
    )
