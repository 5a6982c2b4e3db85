"""What the kernels are compared with: plain PyTorch as trainers write it, and other packages that are installed."""

import importlib
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor


def log_probs(logits: Tensor, ids: Tensor) -> Tensor:
    return logits.float().log_softmax(-1).gather(-1, ids[:, None]).squeeze(-1)


def log_ratios(prm: Tensor, ref: Tensor, policy: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
    prm_logp, ref_logp = log_probs(prm, ids), log_probs(ref, ids)
    return prm_logp - ref_logp, prm_logp, ref_logp, log_probs(policy, ids)


def entropy(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    log_p = logits.float().log_softmax(-1)
    return log_p.gather(-1, ids[:, None]).squeeze(-1), -(log_p.exp() * log_p).sum(-1)


def candidates(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    log_p = logits.float().log_softmax(-1)
    best = log_p.topk(10, -1).values.exp()
    return log_p.gather(-1, ids[:, None]).squeeze(-1), best.where(best >= 0.1, 0.0)


def linear_log_probs(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    return log_probs(hidden @ weight.T, ids)


def linear_log_ratios(prm: Tensor, ref: Tensor, policy: Tensor, weight: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
    prm_logp, ref_logp = linear_log_probs(prm, weight, ids), linear_log_probs(ref, weight, ids)
    return prm_logp - ref_logp, prm_logp, ref_logp, linear_log_probs(policy, weight, ids)


def linear_nll(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy((hidden @ weight.T).float(), ids)


def linear_ppo_loss(hidden: Tensor, weight: Tensor, ids: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
    ratio = (linear_log_probs(hidden, weight, ids) - old).exp()
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2)).mean()


def trl(logits: Tensor, ids: Tensor) -> Tensor:
    return importlib.import_module("trl.trainer.utils").selective_log_softmax(logits, ids)


def liger(logits: Tensor, ids: Tensor) -> Tensor:
    functional = importlib.import_module("liger_kernel.transformers.functional")
    return -functional.liger_cross_entropy(logits, ids, reduction="none")


def quack(logits: Tensor, ids: Tensor) -> Tensor:
    return -importlib.import_module("quack.cross_entropy").cross_entropy(logits, ids, reduction="none")


def trl_head(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """The fused head of TRL 1.15 and later, with the width of tiles that its trainers give it."""
    function = importlib.import_module("trl.kernels.chunked_logprob").ChunkedLogProbFunction
    return function.apply(hidden, weight, None, ids, 1.0, 32768, None, 1.0, ("log_probs",))[0]


def verl_head(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """verl's Triton kernel, which `impl_backend: triton` takes; it makes the entropy, too."""
    kernel = importlib.import_module("verl.utils.kernel.linear_cross_entropy")
    return kernel.linear_cross_entropy(hidden, weight, ids, 1.0, "none")[0]


def liger_linear_nll(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    functional = importlib.import_module("liger_kernel.transformers.functional")
    return functional.liger_fused_linear_cross_entropy(hidden, weight, ids)


def cut_cross_entropy(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    return importlib.import_module("cut_cross_entropy").linear_cross_entropy(hidden, weight, ids)


# Operation -> name -> (module that it needs, whether it runs on CPUs, function).
PEERS: dict[str, dict[str, tuple[str, bool, Callable[..., Tensor]]]] = {
    "log_probs": {
        "trl": ("trl", True, trl),
        "liger": ("liger_kernel", False, liger),
        "quack": ("quack", False, quack),
    },
    "linear_log_probs": {
        "trl": ("trl", True, trl_head),
        "verl": ("verl", False, verl_head),
    },
    "linear_nll": {
        "liger": ("liger_kernel", False, liger_linear_nll),
        "cut-cross-entropy": ("cut_cross_entropy", False, cut_cross_entropy),
    },
}


def peers(op: str, device_type: str) -> dict[str, Callable[..., Tensor]]:
    """The installed packages that do ``op`` on this kind of device."""
    return {
        name: function
        for name, (module, on_cpu, function) in PEERS.get(op, {}).items()
        if (on_cpu or device_type != "cpu") and importlib.util.find_spec(module) is not None
    }
