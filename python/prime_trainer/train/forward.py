"""Hidden states that predict response tokens, and their log-probs."""

from __future__ import annotations

from torch import Tensor

import prime_kernels as pk

from ..models import lm_head
from ..models.forward import hidden_states
from ..models.protocols import CausalLM
from .batch import Micro


def log_probs(model: CausalLM, micro: Micro, ids: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probs of ids [T] or [T, K] at the micro-batch's response tokens; logits never exist for more than a tile."""
    return lm_head.log_probs(model, predicting(model, micro), ids, temperature=temperature)[0]


def candidates(
    model: CausalLM, micro: Micro, ids: Tensor, *, min_prob: float, temperature: float = 1.0
) -> pk.Candidates:
    """Log-probs of ids [T] and all tokens of at least `min_prob` beside them."""
    return lm_head.candidates(model, predicting(model, micro), ids, min_prob=min_prob, temperature=temperature)


def predicting(model: CausalLM, micro: Micro) -> Tensor:
    """[T, H] the hidden states that predict the response tokens."""
    hidden = hidden_states(model, micro.input_ids, micro.position_ids, micro.attention_mask)
    return hidden.flatten(0, 1)[micro.predictors]
