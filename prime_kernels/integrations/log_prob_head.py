"""Token log-probabilities of a Hugging Face causal language model, without its logits."""

from typing import Any

from torch import Tensor, nn

from prime_kernels import _checks
from prime_kernels.integrations._heads import head_log_probs
from prime_kernels.integrations.causal_head import causal_head, output_layer
from prime_kernels.ops.linear_log_probs import check_logits_dtype
from prime_kernels.ops.log_probs import check_temperature

IGNORED = -100


class LogProbHead(nn.Module):
    """Scores the tokens of a batch with a causal language model whose logits are never made.

    The backbone gives hidden states, and :func:`prime_kernels.linear_log_probs` takes them through the weight of
    the output layer. Parameters are those of the model: train it as before.

    Args:
        model: a Hugging Face causal language model, such as ``AutoModelForCausalLM`` gives (of a PEFT model, its
            ``get_base_model()``, which holds the adapters).
        temperature: above 0, divides the logits.
        with_entropy: also return the entropy of each token's distribution.
        logits_dtype: "float32" or "input", as in :func:`prime_kernels.linear_log_probs`; "input" rounds to the dtype of
            the hidden states, or of autocast.

    Raises:
        TypeError: the model has no backbone or no output layer.
        ValueError: logits that follow from more than the last hidden states, the output layer, a factor and a cap
            (:class:`prime_kernels.integrations.CausalHead`), as a probe of two short forward passes finds; a
            temperature that is not above 0; another logits_dtype.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        temperature: float = 1.0,
        with_entropy: bool = False,
        logits_dtype: str = "float32",
    ) -> None:
        super().__init__()
        _checks.flag("with_entropy", with_entropy)
        check_logits_dtype(logits_dtype)
        self.model, self.with_entropy, self.logits_dtype = model, with_entropy, logits_dtype
        self.temperature = check_temperature("temperature", temperature)
        self.head = causal_head(model)

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
            attention_mask: [B, L], 0 at padding, or None. Goes to the model; padding is not scored, nor is a token
                that follows padding.
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
            # Of two real tokens: the first one after padding on the left has nothing that predicts it.
            scored = scored & attention_mask[:, 1:].bool() & attention_mask[:, :-1].bool()
        layer = output_layer(self.model)
        logp, entropy = head_log_probs(
            output.last_hidden_state[:, :-1],
            layer.weight,
            layer.bias,
            targets,
            mask=scored,
            temperature=self.temperature,
            with_entropy=self.with_entropy,
            logits_dtype=self.logits_dtype,
            head=self.head,
        )
        return logp if entropy is None else (logp, entropy)
