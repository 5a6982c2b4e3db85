"""Token log-probabilities of a Hugging Face causal language model, without its logits."""

from typing import Any

from torch import Tensor, nn

from prime_kernels import _checks
from prime_kernels.integrations._heads import head_log_probs
from prime_kernels.ops.log_probs import check_temperature

IGNORED = -100
# What models multiply their logits by, or divide them by.
FACTORS = ("logit_scale", "output_multiplier", "lm_head_multiplier")


class LogProbHead(nn.Module):
    """Scores the tokens of a batch with a causal language model whose logits are never made.

    The backbone gives hidden states, and :func:`prime_kernels.linear_log_probs` takes them through the weight of
    the output layer. Parameters are those of the model: train it as before.

    Args:
        model: a Hugging Face causal language model, such as ``AutoModelForCausalLM`` gives (of a PEFT model, its
            ``get_base_model()``, which holds the adapters).
        temperature: above 0, divides the logits.
        with_entropy: also return the entropy of each token's distribution.

    Raises:
        TypeError: the model has no backbone or no output layer.
        ValueError: the model caps its logits (``final_logit_softcapping``), or a temperature that is not above 0.
    """

    def __init__(self, model: nn.Module, *, temperature: float = 1.0, with_entropy: bool = False) -> None:
        super().__init__()
        getter: Any = getattr(model, "get_output_embeddings", lambda: None)
        backbone = getattr(model, "base_model", model)
        if backbone is model or getattr(getter(), "weight", None) is None:
            raise TypeError(
                f"model: expected a Hugging Face causal language model with a backbone (base_model) and an output "
                f"layer (get_output_embeddings), got {type(model).__name__}"
            )
        config: Any = getattr(model, "config", None)
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        if getattr(config, "final_logit_softcapping", None) is not None:
            raise ValueError("model: expected logits linear in the hidden states, got final_logit_softcapping")
        _checks.flag("with_entropy", with_entropy)
        self.model, self.with_entropy = model, with_entropy
        self.temperature = check_temperature("temperature", temperature) / _factor(config)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        **model_inputs: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Log-probability of each token given those before it.

        Args:
            input_ids: [B, L], int64.
            attention_mask: [B, L], 0 at padding, or None. Goes to the model; padding is not scored.
            labels: [B, L], the tokens to score, -100 where none; None scores ``input_ids``.
            model_inputs: what else the model's backbone takes, such as position_ids.

        Returns:
            logp [B, L - 1], or (logp, entropy): at t the token t + 1, 0 where it is not scored; float32.
        """
        output = self.model.base_model(  # type: ignore[operator]
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **model_inputs
        )
        if getattr(output, "last_hidden_state", None) is None:
            raise TypeError(f"model: expected a backbone that gives last_hidden_state, got {type(output).__name__}")
        targets = (input_ids if labels is None else labels)[:, 1:]
        scored = targets != IGNORED
        if attention_mask is not None:
            scored = scored & attention_mask[:, 1:].bool()
        layer: Any = self.model.get_output_embeddings()  # type: ignore[operator]
        logp, entropy = head_log_probs(
            output.last_hidden_state[:, :-1],
            layer.weight,
            getattr(layer, "bias", None),
            targets,
            mask=scored,
            temperature=self.temperature,
            with_entropy=self.with_entropy,
        )
        return logp if entropy is None else (logp, entropy)


def _factor(config: Any) -> float:
    """What the model multiplies its logits by."""
    factor = next((value for name in FACTORS if (value := getattr(config, name, None)) is not None), None)
    if factor is None:
        scaling = getattr(config, "logits_scaling", None)
        # Granite and MiniCPM3 divide by it, HyperCLOVA X multiplies.
        multiplies = getattr(config, "model_type", None) == "hyperclovax"
        factor = 1.0 if scaling is None else scaling if multiplies else 1.0 / scaling
    if not factor > 0:
        raise ValueError(f"model: expected logits scaled by a factor above 0, got {factor}")
    return float(factor)
