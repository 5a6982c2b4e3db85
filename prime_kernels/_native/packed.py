"""Packed kernels in C++ and CUDA C++.

Kernels get named arguments: a tensor stands for its address and stays alive during the call, None for no address.
CUDA launches go to the current stream of the tensors' device and nothing waits for them. Callers have checked shapes,
dtypes and ranges; the assertions only guard memory.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from prime_kernels._backends import ClipRange, PPOResults, PPOTokens, PRMBatch, PRMResults, RlooBatch, RlooSettings
from prime_kernels._constants import NORMALIZE_EPS
from prime_kernels._launch_counters import arrivals
from prime_kernels._layout import column, mask_column, offsets_column
from prime_kernels._native import _C, DTYPES
from prime_kernels._segment_math import leave_one_out, pair_accuracy

Argument = Tensor | int | float | None


class CpuKernels:
    """Packed kernels for CPU tensors, on as many threads as torch has."""

    def scan_segments(
        self, values: Tensor, cu_seqlens: Tensor, gamma: float, reverse: bool, factor: Tensor | None = None
    ) -> Tensor:
        values = values.contiguous()
        assert values.dtype in (torch.float32, torch.float64)
        out = torch.empty_like(values)
        self._launch(
            "segment_scan",
            values.device,
            **_segments(cu_seqlens, values.device),
            **self._published(values.device),
            values=values,
            n_tokens=values.numel(),
            gamma=gamma,
            dtype=DTYPES[values.dtype],
            reverse=reverse,
            factor=column(factor, torch.float32, 1, values.device),
            out=out,
        )
        return out

    def sum_segments(self, values: Tensor, cu_segments: Tensor) -> Tensor:
        device = values.device
        out = torch.empty(cu_segments.numel() - 1, dtype=torch.float64, device=device)
        self._launch(
            "segment_sum",
            device,
            **_segments(cu_segments, device),
            **self._published(device),
            **self._arrived(device),
            values=column(values, torch.float32, values.numel(), device),
            n_tokens=values.numel(),
            out=out,
        )
        return out

    def fill_segments(self, values: Tensor, cu_segments: Tensor, total: int, factor: Tensor | None = None) -> Tensor:
        device = values.device
        out = torch.empty(total, dtype=torch.float32, device=device)
        self._launch(
            "segment_fill",
            device,
            **_segments(cu_segments, device),
            values=column(values, torch.float64, cu_segments.numel() - 1, device),
            factor=column(factor, torch.float32, 1, device),
            n_tokens=total,
            out=out,
        )
        return out

    def rloo_returns(
        self, batch: RlooBatch, settings: RlooSettings, over_ranks: Callable[[Tensor], None] | None
    ) -> tuple[Tensor, Tensor]:
        """In two steps; what lies between them is a few numbers per response."""
        outcomes, responses, device = batch.outcomes, batch.outcomes.numel(), batch.outcomes.device
        cu_seqlens = offsets_column(batch.cu_seqlens, device)
        centred = outcomes - leave_one_out(outcomes, cu_seqlens.diff() > 0, batch.cu_groups)[0]
        rewards = column(batch.process_rewards, torch.float32, batch.total, device)
        tokens: dict[str, Argument] = {
            "rewards": rewards,
            "mask": None if rewards is None else mask_column(batch.reward_mask, batch.total, device),
            "cu_seqlens": cu_seqlens,
            "n_responses": responses,
            "n_tokens": batch.total,
        }
        scale = shift = torch.zeros_like(centred)
        if rewards is not None:
            sums, counts = torch.empty(2, responses, dtype=torch.float64, device=device)
            largest: Tensor = torch.empty((), dtype=torch.float64, device=device)
            self._launch("rloo_sums", device, **tokens, sums=sums, counts=counts, largest=largest)
            factor = 1.0
            if settings.normalize_process:
                if over_ranks is not None:
                    over_ranks(largest)
                factor = 1.0 / (float(largest) + NORMALIZE_EPS)
            means = sums * factor / counts.clamp(min=1.0)
            scale, shift = _process_terms(means, counts > 0, batch.cu_groups, settings.process_baseline)
            scale = scale * factor
        out = torch.empty(batch.total, dtype=torch.float32, device=device)
        moments = torch.empty(1, 3, dtype=torch.float64, device=device)
        self._launch(
            "rloo_returns",
            device,
            **tokens,
            scale=column(scale, torch.float64, responses, device),
            shift=column(shift, torch.float64, responses, device),
            outcomes=column(centred, torch.float64, responses, device),
            gamma_process=settings.gamma_process,
            gamma_outcome=settings.gamma_outcome,
            process_coef=settings.process_coef,
            outcome_coef=settings.outcome_coef,
            out=out,
            moments=moments,
        )
        return out, moments

    def whiten(self, values: Tensor, moments: Tensor) -> Tensor:
        device = values.device
        assert moments.shape[1:] == (3,)
        out = torch.empty_like(values)
        self._launch(
            "whiten",
            device,
            values=column(values, torch.float32, values.numel(), device),
            n_tokens=values.numel(),
            moments=column(moments, torch.float64, moments.numel(), device),
            n_parts=moments.shape[0],
            out=out,
        )
        return out

    def ppo_loss_and_scale(self, tokens: PPOTokens, clip: ClipRange, denominator: Tensor | float | None) -> PPOResults:
        device = tokens.logp.device
        results = torch.empty(3, dtype=torch.float32, device=device)
        scale = torch.empty((), dtype=torch.float64, device=device)
        number = 0.0  # the valid tokens
        if isinstance(denominator, Tensor):
            denominator = column(denominator, torch.float64, 1, device)
        elif denominator is not None:
            number, denominator = float(denominator), None
        self._launch(
            "ppo_loss",
            device,
            **_ppo(tokens, clip),
            **self._ppo_sums(device),
            **self._arrived(device),
            denominator=denominator,
            denominator_value=number,
            scale=scale,
            results=results,
        )
        # Copies: views of one tensor could not be changed in place by the caller.
        loss, clip_fraction, approx_kl = (each.clone() for each in results)
        return PPOResults(loss, clip_fraction, approx_kl, scale)

    def ppo_gradient(self, tokens: PPOTokens, clip: ClipRange, scale: Tensor, grad: Tensor) -> Tensor:
        device = tokens.logp.device
        out = torch.empty(tokens.logp.numel(), dtype=torch.float32, device=device)
        grad = column(grad, torch.float32, 1, device)
        self._launch("ppo_loss_backward", device, **_ppo(tokens, clip), scale=scale, grad=grad, out=out)
        return out

    def prefix_loss_and_slope(self, batch: PRMBatch, beta: float, margin: float) -> PRMResults:
        """Sums of a few responses, and their order, are plain PyTorch."""
        log_ratio, responses = batch.log_ratio, batch.outcomes.numel()
        losses, scores = torch.empty(2, responses, dtype=torch.float64, device=log_ratio.device)
        slope = torch.empty(log_ratio.numel(), dtype=torch.float32, device=log_ratio.device)
        arguments = _prm(batch) | {"beta": beta, "margin": margin, "scores": scores, "slope": slope}
        self._launch("prefix_loss", log_ratio.device, **arguments, losses=losses)
        accuracy = torch.full((), torch.nan, device=log_ratio.device)
        if batch.cu_groups is not None:
            accuracy = pair_accuracy(scores, batch.outcomes, batch.cu_seqlens.diff() > 0, batch.cu_groups).float()
        return PRMResults(losses.sum().float(), accuracy, slope)

    def pack_tokens(self, padded: Tensor, cu_seqlens: Tensor, total: int, pad_left: bool) -> Tensor:
        rows, length, width = padded.shape
        out = padded.new_empty(total, width)
        sizes = {"n_rows": rows, "n_tokens": total, "length": length, "width": width, "itemsize": out.element_size()}
        self._launch(
            "pack",
            padded.device,
            **sizes,
            cu_seqlens=offsets_column(cu_seqlens, padded.device),
            pad_left=pad_left,
            fill=0,
            out=out,
            **{"in": padded.contiguous()},
        )
        return out

    def unpack_tokens(self, values: Tensor, cu_seqlens: Tensor, length: int, pad_left: bool, fill: float) -> Tensor:
        rows, (total, width) = cu_seqlens.numel() - 1, values.shape
        out = values.new_empty(rows, length, width)
        sizes = {"n_rows": rows, "n_tokens": total, "length": length, "width": width, "itemsize": out.element_size()}
        self._launch(
            "unpack",
            values.device,
            **sizes,
            cu_seqlens=offsets_column(cu_seqlens, values.device),
            pad_left=pad_left,
            fill=element_bits(fill, values.dtype),
            out=out,
            **{"in": values.contiguous()},
        )
        return out

    def _launch(self, kernel: str, device: torch.device, **arguments: Argument) -> None:
        getattr(_C, kernel)(**_addresses(arguments), n_threads=torch.get_num_threads())

    def _published(self, device: torch.device) -> dict[str, Argument]:
        """Scratch memory of CUDA kernels; the CPU kernels need none."""
        return {}

    def _arrived(self, device: torch.device) -> dict[str, Argument]:
        return {}

    def _ppo_sums(self, device: torch.device) -> dict[str, Argument]:
        return {}


class CudaKernels(CpuKernels):
    """Packed kernels for CUDA tensors."""

    def checked_batch(self, batch: RlooBatch) -> RlooBatch:
        responses, device = batch.outcomes.numel(), batch.outcomes.device
        rewards = None if batch.process_rewards is None else batch.process_rewards.float()
        checked = batch._replace(
            process_rewards=column(rewards, torch.float32, batch.total, device),
            outcomes=column(batch.outcomes.double(), torch.float64, responses, device),
            cu_seqlens=offsets_column(batch.cu_seqlens.long(), device),
            cu_groups=offsets_column(batch.cu_groups.long(), device),
        )
        self._launch("rloo_check", device, **_rloo(checked))
        return checked

    def rloo_returns(
        self, batch: RlooBatch, settings: RlooSettings, over_ranks: Callable[[Tensor], None] | None
    ) -> tuple[Tensor, Tensor]:
        """One launch; two if the largest return is combined over ranks in between."""
        responses, device = batch.outcomes.numel(), batch.outcomes.device
        out = torch.empty(batch.total, dtype=torch.float32, device=device)
        moments = torch.empty(_C.MAX_BLOCKS, 3, dtype=torch.float64, device=device)
        doubles = _C.RLOO_WORKSPACE // 8 + _C.MAX_BLOCKS + 5 * responses
        blocks = torch.zeros(1, dtype=torch.int64, device="cpu")
        arguments: dict[str, Argument] = {
            **_rloo(batch),
            "gamma_process": settings.gamma_process,
            "gamma_outcome": settings.gamma_outcome,
            "process_coef": settings.process_coef,
            "outcome_coef": settings.outcome_coef,
            "normalize_process": settings.normalize_process,
            "paper_baseline": settings.process_baseline == "paper",
            "moments": moments,
            "workspace": torch.empty(doubles, dtype=torch.float64, device=device),
            "out": out,
            "n_blocks": blocks,
        }
        largest, with_sums = None, batch.process_rewards is not None
        if over_ranks is not None and settings.normalize_process and with_sums:
            largest, with_sums = torch.empty((), dtype=torch.float64, device=device), False
            self._launch("rloo_returns", device, **arguments, with_sums=True, with_returns=False, largest=largest)
            over_ranks(largest)
        self._launch("rloo_returns", device, **arguments, with_sums=with_sums, with_returns=True, largest=largest)
        return out, moments[: int(blocks)]

    def prm_loss_and_slope(self, batch: PRMBatch, kind: str, beta: float) -> PRMResults:
        device, responses = batch.log_ratio.device, batch.outcomes.numel()
        delta, slope = torch.empty(2, responses, dtype=torch.float64, device=device)
        return self._launch_prm("prm_loss", batch, slope, beta=beta, kind=_C.PRM_KINDS[kind], delta=delta)

    def prefix_loss_and_slope(self, batch: PRMBatch, beta: float, margin: float) -> PRMResults:
        device, responses = batch.log_ratio.device, batch.outcomes.numel()
        sums = torch.empty(_C.MAX_BLOCKS, dtype=torch.float64, device=device)
        scores = torch.empty(responses, dtype=torch.float64, device=device)
        slope = torch.empty(batch.log_ratio.numel(), dtype=torch.float32, device=device)
        return self._launch_prm("prefix_loss", batch, slope, beta=beta, margin=margin, scores=scores, sums=sums)

    def _launch_prm(self, kernel: str, batch: PRMBatch, slope: Tensor, **arguments: Argument) -> PRMResults:
        device = batch.log_ratio.device
        results = torch.empty(2, dtype=torch.float32, device=device)
        self._launch(
            kernel,
            device,
            **self._published(device),
            **self._arrived(device),
            **_prm(batch),
            **arguments,
            cu_groups=None if batch.cu_groups is None else offsets_column(batch.cu_groups, device),
            n_groups=0 if batch.cu_groups is None else batch.cu_groups.numel() - 1,
            slope=slope,
            results=results,
        )
        loss, accuracy = (each.clone() for each in results)
        return PRMResults(loss, accuracy, slope)

    def _launch(self, kernel: str, device: torch.device, **arguments: Argument) -> None:
        # A launch goes to the current device, which need not be that of the tensors.
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream(device).cuda_stream
            getattr(_C, f"cuda_{kernel}")(**_addresses(arguments), stream=stream)

    def _published(self, device: torch.device) -> dict[str, Argument]:
        return {"published": torch.empty(_C.MAX_BLOCKS, 2, dtype=torch.float64, device=device)}

    def _arrived(self, device: torch.device) -> dict[str, Argument]:
        return {"arrived": arrivals(device)}

    def _ppo_sums(self, device: torch.device) -> dict[str, Argument]:
        return {"sums": torch.empty(_C.MAX_BLOCKS, 4, dtype=torch.float64, device=device)}


CPU, CUDA = CpuKernels(), CudaKernels()


def element_bits(fill: float, dtype: torch.dtype) -> int:
    """The bits of an element, as an unsigned number."""
    element = torch.tensor([fill], dtype=dtype, device="cpu")
    return int.from_bytes(bytes(element.view(torch.uint8).tolist()), "little")


def _process_terms(means: Tensor, with_rewards: Tensor, cu_groups: Tensor, baseline: str) -> tuple[Tensor, Tensor]:
    """(scale, shift) of each response: its process reward less the baseline is linear in the reward s.

    "reference": s + (s - m_i) / (n - 1) - (mean of the others); "paper" has no middle term.
    """
    others_mean, others = leave_one_out(means, with_rewards, cu_groups)
    weight = torch.zeros_like(others)
    if baseline == "reference":
        weight = (1.0 / others.clamp(min=1.0)).where(others > 0, 0.0)
    return 1.0 + weight, -weight * means - others_mean


def _segments(offsets: Tensor, device: torch.device) -> dict[str, Argument]:
    return {"cu_seqlens": offsets_column(offsets, device), "n_segments": offsets.numel() - 1}


def _rloo(batch: RlooBatch) -> dict[str, Argument]:
    responses, device = batch.outcomes.numel(), batch.outcomes.device
    rewards = column(batch.process_rewards, torch.float32, batch.total, device)
    return {
        "rewards": rewards,
        "mask": None if rewards is None else mask_column(batch.reward_mask, batch.total, device),
        "outcomes": column(batch.outcomes, torch.float64, responses, device),
        "cu_seqlens": offsets_column(batch.cu_seqlens, device),
        "cu_groups": offsets_column(batch.cu_groups, device),
        "n_responses": responses,
        "n_groups": batch.cu_groups.numel() - 1,
        "n_tokens": batch.total,
    }


def _ppo(tokens: PPOTokens, clip: ClipRange) -> dict[str, Argument]:
    total, device = tokens.logp.numel(), tokens.logp.device
    return {
        "logp": column(tokens.logp, torch.float32, total, device),
        "old_logp": column(tokens.old_logp, torch.float32, total, device),
        "advantages": column(tokens.advantages, torch.float32, total, device),
        "weights": column(tokens.weights, torch.float32, total, device),
        "mask": mask_column(tokens.mask, total, device),
        "n_tokens": total,
        "clip_low": clip.low,
        "clip_high": clip.high,
        "ceiling": clip.ceiling,
    }


def _prm(batch: PRMBatch) -> dict[str, Argument]:
    total, responses, device = batch.log_ratio.numel(), batch.outcomes.numel(), batch.log_ratio.device
    return {
        "log_ratio": column(batch.log_ratio, torch.float32, total, device),
        "outcomes": column(batch.outcomes, torch.float64, responses, device),
        "cu_seqlens": offsets_column(batch.cu_seqlens, device),
        "weights": column(batch.weights, torch.float64, responses, device),
        "shift": column(batch.shift, torch.float64, responses, device),
        "n_tokens": total,
        "n_responses": responses,
    }


def _addresses(arguments: dict[str, Argument]) -> dict[str, int | float]:
    return {
        name: 0 if value is None else value.data_ptr() if isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }
