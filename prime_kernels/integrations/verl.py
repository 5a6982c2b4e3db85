"""verl on these kernels: log-probs, entropies, RLOO, and the core of its PRIME recipe.

    from prime_kernels.integrations import verl
    verl.patch()

Call it in every worker process, before engines are made: they keep the entropy function that they find (as a Ray
worker's set-up hook, or through verl's ``VERL_USE_EXTERNAL_MODULES``). Results are float32 also for 16-bit logits. The
functions of the recipe (``recipe.prime.prime_core_algos``) are replaced where that package can be imported.

With verl 0.9.1 and later our head can be chosen for ``use_fused_kernels=True``, never by default:

    actor_rollout_ref.model.use_fused_kernels=True
    actor_rollout_ref.model.fused_kernel_options.impl_backend=prime_kernels
"""

import importlib
from typing import Any

import torch
from torch import Tensor

from prime_kernels.integrations import _logits
from prime_kernels.integrations._heads import head_log_probs
from prime_kernels.integrations._patching import (
    Integration,
    IntegrationError,
    Patched,
    Target,
    function_target,
    kernel_of,
)
from prime_kernels.ops.linear_log_probs import check_logits_dtype
from prime_kernels.ops.log_probs import log_probs
from prime_kernels.ops.prm_loss import prm_loss
from prime_kernels.ops.rloo_advantages import rloo_advantages

__all__ = [
    "BACKEND",
    "compute_ce_dpo_loss_rm",
    "compute_dpo_accuracy",
    "compute_rloo_advantage_return",
    "compute_rloo_outcome_advantage",
    "compute_rloo_vectorized_outcome_advantage",
    "entropy_from_logits",
    "entropy_from_logits_with_chunking",
    "logprobs_from_logits",
    "logprobs_from_logits_naive",
    "logprobs_from_logits_v2",
    "patch",
    "unpatch",
]

BACKEND = "prime_kernels"
"""The name of our head in verl's ``fused_kernel_options.impl_backend``."""

_logits_dtype = "float32"
"""Of that head, as the last :func:`patch` has it."""


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """Log-probabilities [...] of ``labels`` [...] under softmax(logits), logits [..., V].

    ``inplace_backward`` lets backward write the gradient over the logits, as verl has it with flash-attn; logits that
    are leaves of the graph, or whose rows are not dense, are left alone all the same.
    """
    return _logits.verl_log_probs(logits, labels, inplace_backward)


def logprobs_from_logits_naive(logits: Tensor, labels: Tensor) -> Tensor:
    """As :func:`logprobs_from_logits`; the logits are kept."""
    return log_probs(logits, labels)


def logprobs_from_logits_v2(logits: Tensor, labels: Tensor) -> Tensor:
    """As :func:`logprobs_from_logits`; the logits are kept."""
    return log_probs(logits, labels)


def entropy_from_logits(logits: Tensor) -> Tensor:
    """Entropy [...] of each row of ``logits`` [..., V], in nats; float32."""
    return _logits.entropy(logits)


def entropy_from_logits_with_chunking(logits: Tensor, chunk_size: int = 2048) -> Tensor:
    """As :func:`entropy_from_logits`; ``chunk_size`` is of no effect, as no softmax is held."""
    return _logits.entropy(logits)


def compute_rloo_outcome_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any,
    epsilon: float = 1e-6,
    config: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Leave-one-out advantages of each response's summed reward, on its valid tokens.

    Args:
        token_level_rewards: [B, L].
        response_mask: [B, L], 1 at valid tokens.
        index: [B], which prompt a response answers: anything that can be compared.
        epsilon, config, kwargs: of no effect here, as in verl.

    Returns:
        (advantages, returns), the same tensor [B, L] twice. A response without others keeps its reward.
    """
    advantages = _leave_one_out(token_level_rewards, index)[0][:, None] * response_mask
    return advantages, advantages


def compute_rloo_vectorized_outcome_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any,
    epsilon: float = 1e-6,
    config: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """As :func:`compute_rloo_outcome_advantage`, but a response without others gets 0."""
    advantages, alone = _leave_one_out(token_level_rewards, index)
    advantages = advantages.masked_fill(alone, 0.0)[:, None] * response_mask
    return advantages, advantages


def _leave_one_out(token_level_rewards: Tensor, index: Any) -> tuple[Tensor, Tensor]:
    """(advantage [B], whether a response is its prompt's only one [B])."""
    scores = token_level_rewards.sum(-1)
    numbers: dict[Any, int] = {}
    keys = index.tolist() if hasattr(index, "tolist") else index
    found = [numbers.setdefault(key, len(numbers)) for key in keys]
    group = torch.tensor(found, dtype=torch.int64, device=scores.device)
    order, counts = group.argsort(stable=True), torch.bincount(group)
    # Every response as one token: leave-one-out knows nothing of lengths.
    responses = torch.arange(len(scores) + 1, dtype=torch.int64, device=scores.device)
    cu_groups = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
    centred = rloo_advantages(None, scores[order], responses, cu_groups, whiten=False).returns
    return torch.empty_like(centred).index_copy_(0, order, centred), (counts == 1)[group]


def compute_rloo_advantage_return(
    data: Any, response_mask: Tensor, n_samples: int, config: Any
) -> tuple[Tensor, Tensor]:
    """Advantages and returns of PRIME from process and outcome rewards, padded, as the recipe has them.

    Args:
        data: its ``batch`` holds "rm_scores" [B, L] (the process rewards) and "acc" [B] (the outcomes), either or both.
        response_mask: [B, L], 1 at valid tokens; an outcome lies on the last of them.
        n_samples: responses to each prompt, next to each other.
        config: ``config.algorithm.reward_dpo_coef`` and ``reward_gt_coef``, the factors of the two rewards.

    Returns:
        (advantages, returns), [B, L] each, 0 outside ``response_mask``.
    """
    batch, coefs, valid = data.batch, config.algorithm, response_mask.bool()
    with_process = "rm_scores" in batch.keys() and coefs.reward_dpo_coef != 0.0  # noqa: SIM118 (a TensorDict)
    with_outcome = "acc" in batch.keys() and coefs.reward_gt_coef != 0.0  # noqa: SIM118
    if not (with_process or with_outcome):
        raise ValueError("data: expected 'rm_scores' or 'acc' with a coefficient other than 0, got neither")
    outcomes = batch["acc"].float() if with_outcome else response_mask.new_zeros(len(valid), dtype=torch.float32)
    found = rloo_advantages(
        batch["rm_scores"][valid] if with_process else None,
        outcomes,
        _offsets(valid.sum(-1)),
        _even_groups(outcomes, n_samples),
        process_coef=coefs.reward_dpo_coef,
        outcome_coef=coefs.reward_gt_coef,
        normalize_process=False,
    )
    advantages, returns = (column.new_zeros(valid.shape).masked_scatter(valid, column) for column in reversed(found))
    return advantages, returns


def compute_ce_dpo_loss_rm(token_level_scores: Tensor, acc: Tensor, response_mask: Tensor, beta: float) -> Tensor:
    """Cross-entropy of sigmoid(beta * summed scores) with the outcomes, mean over responses.

    From logits: a score far out keeps its gradient, where the recipe's saturates.

    Args:
        token_level_scores: [B, L], log-ratios of the PRM and its reference.
        acc: [B], in [0, 1].
        response_mask: [B, L], 1 at valid tokens.
        beta: above 0.
    """
    valid = response_mask.bool()
    return prm_loss(token_level_scores[valid], acc.float(), _offsets(valid.sum(-1)), beta=beta).loss


def compute_dpo_accuracy(token_level_scores: Tensor, acc: Tensor, response_mask: Tensor, n_samples: int) -> Tensor:
    """How often the response with the higher summed score is the better one, over the pairs of each prompt.

    Args:
        token_level_scores: [B, L].
        acc: [B], in [0, 1].
        response_mask: [B, L], 1 at valid tokens.
        n_samples: responses to each prompt, next to each other.
    """
    valid = response_mask.bool()
    packed, acc = token_level_scores[valid].detach(), acc.float()
    return prm_loss(packed, acc, _offsets(valid.sum(-1)), cu_groups=_even_groups(acc, n_samples)).pair_accuracy


def _offsets(lengths: Tensor) -> Tensor:
    return torch.cat((lengths.new_zeros(1), lengths.cumsum(0)))


def _even_groups(responses: Tensor, n_samples: int) -> Tensor:
    return torch.arange(0, len(responses) + 1, n_samples, dtype=torch.int64, device=responses.device)


def _selectable_head(original: Any) -> Any:
    """verl's class with :data:`BACKEND` among the names that ``impl_backend`` takes; the others are verl's own code."""

    class FusedLinearForPPO(original):
        def __init__(self, chunk_size: int = 512, impl_backend: str = "torch") -> None:
            super().__init__(chunk_size, "torch" if impl_backend == BACKEND else impl_backend)
            self.impl_backend = impl_backend

        def forward(
            self, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
        ) -> tuple[Tensor, Tensor | None]:
            if self.impl_backend != BACKEND:
                return super().forward(hidden_states, vocab_weights, input_ids, temperature)
            return head_log_probs(
                hidden_states,
                vocab_weights,
                None,
                input_ids.to(torch.int64),
                temperature=temperature,
                with_entropy=True,
                logits_dtype=_logits_dtype,
            )

    FusedLinearForPPO.__doc__ = original.__doc__
    return FusedLinearForPPO


def _forward_with_head(original: Any) -> Any:
    """verl's choice of a model's forward, which takes three names and ignores others."""

    def patch_forward_with_backends(
        model: Any, use_fused_kernels: bool = False, fused_kernels_backend: str | None = None
    ) -> None:
        if not use_fused_kernels or fused_kernels_backend != BACKEND:
            return original(model, use_fused_kernels, fused_kernels_backend)
        # An older verl would take its own head without a word.
        if not hasattr(importlib.import_module(_HEADS).FusedLinearForPPO(), "impl_backend"):
            raise IntegrationError(
                f"fused_kernel_options.impl_backend: expected verl 0.9.1 or later for {BACKEND!r}, got a verl whose "
                f"FusedLinearForPPO has no choice of backend"
            )
        # The forward that calls FusedLinearForPPO, with the backend that the model names.
        original(model, True, "torch")
        model._verl_fused_kernels_backend = BACKEND

    return patch_forward_with_backends


_HEADS = "verl.utils.experimental.torch_functional"
_LOGITS, _ALGORITHMS = "verl.utils.torch_functional", "verl.trainer.ppo.core_algos"
_RECIPE = "recipe.prime.prime_core_algos"
_RLOO = "token_level_rewards, response_mask, index, epsilon=1e-06, config=None, **kwargs"
_INTEGRATION = Integration(
    package="verl",
    versions="0.4.1 to 0.9.1",
    tested="0.9.1",
    namespaces=("verl", "recipe"),
    targets=(
        function_target(
            _LOGITS,
            logprobs_from_logits,
            "logits, labels, inplace_backward=True",
            fused=kernel_of("flash_attn", "on CUDA verl runs flash-attn's cross-entropy"),
        ),
        function_target(_LOGITS, logprobs_from_logits_naive, "logits, labels"),
        function_target(_LOGITS, logprobs_from_logits_v2, "logits, labels"),
        function_target(_LOGITS, entropy_from_logits, "logits"),
        function_target(_LOGITS, entropy_from_logits_with_chunking, "logits, chunk_size=2048"),
        function_target(_ALGORITHMS, compute_rloo_outcome_advantage, _RLOO),
        function_target(_ALGORITHMS, compute_rloo_vectorized_outcome_advantage, _RLOO, optional=True),
        function_target(
            _RECIPE, compute_rloo_advantage_return, "data, response_mask, n_samples, config", optional=True
        ),
        function_target(_RECIPE, compute_ce_dpo_loss_rm, "token_level_scores, acc, response_mask, beta", optional=True),
        function_target(
            _RECIPE, compute_dpo_accuracy, "token_level_scores, acc, response_mask, n_samples", optional=True
        ),
        Target(
            _HEADS,
            "FusedLinearForPPO",
            _selectable_head,
            ("chunk_size=512, impl_backend='torch'; self, hidden_states, vocab_weights, input_ids, temperature=1.0",),
            optional=True,
            addition=True,
        ),
        Target(
            "verl.models.transformers.monkey_patch",
            "patch_forward_with_backends",
            _forward_with_head,
            ("model, use_fused_kernels=False, fused_kernels_backend=None",),
            optional=True,
            addition=True,
        ),
    ),
)


def patch(*, logits_dtype: str = "float32", replace_fused: bool = False) -> Patched:
    """Replace verl's functions by these, in its registry of advantage estimators too, and add :data:`BACKEND` to the
    backends of ``FusedLinearForPPO``.

    Returns and logs what was replaced and what was left. The last call holds.

    Args:
        logits_dtype: of that backend, "float32" or "input", as in :func:`prime_kernels.linear_log_probs`; "input"
            rounds to the dtype of the hidden states, or of autocast, as verl's own do.
        replace_fused: where there is a GPU, also replace ``logprobs_from_logits`` where flash-attn is installed, whose
            cross-entropy verl runs.

    Raises:
        IntegrationError: verl cannot be imported, or is of a version whose functions have changed.
        ValueError: another logits_dtype.
    """
    global _logits_dtype
    check_logits_dtype(logits_dtype)
    done = _INTEGRATION.patch(replace_fused=replace_fused)
    _logits_dtype = logits_dtype
    return done


def unpatch() -> None:
    """Put verl's own functions back; without a patch, nothing happens."""
    _INTEGRATION.unpatch()
