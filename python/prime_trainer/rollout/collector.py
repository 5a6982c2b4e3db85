"""Collects a batch: sample, verify, filter, and keep surplus groups for the next step."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ..config.sections import FilterConfig, RolloutConfig
from ..data.groups import Group, Response, group_from
from ..data.problems import BadRow, Task, prompt_ids
from ..errors import RunError
from ..models.protocols import Tokenizer
from ..run.seeds import derive_seed
from ..run.stage_clock import StageClock
from ..scale.ranks import SINGLE, Ranks
from ..verify import TIME_LIMIT, Verdict, Verifier
from . import Sampler, Sampling


class NothingPasses(RunError):
    """No sampled group passed the filter."""


class Collector:
    """Holds the position in the training stream and the groups that passed but did not fit the last batch."""

    def __init__(
        self,
        rollout: RolloutConfig,
        group_filter: FilterConfig,
        seed: int,
        task: Task,
        tokenizer: Tokenizer,
        sampler: Sampler,
        verifier: Verifier,
        ranks: Ranks = SINGLE,
    ) -> None:
        self.rollout, self.filter, self.seed, self.task = rollout, group_filter, seed, task
        self.tokenizer, self.sampler, self.verifier, self.ranks = tokenizer, sampler, verifier, ranks
        self.position = self._bad_rows = 0
        self.surplus: list[Group] = []

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, "surplus": [asdict(g) for g in self.surplus]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]
        self.surplus = [group_from(g) for g in state["surplus"]]

    def collect(self, step: int, clock: StageClock) -> tuple[list[Group], dict[str, float]]:
        """`rollout.prompts_per_step` groups, or fewer if `filter.max_rounds` rounds do not find as many."""
        wanted = self.rollout.prompts_per_step
        kept, self.surplus = self.surplus, []
        sampled: list[Group] = []
        verdicts: list[Verdict] = []
        too_long = self._bad_rows = 0
        for _ in range(self.filter.max_rounds):
            if len(kept) >= wanted:
                break
            # The pass rate so far estimates how many prompts the rest needs.
            rate = max(0.1, sum(map(self._passes, sampled)) / len(sampled)) if sampled else 1.0
            groups, scored, dropped = self._round(min(wanted, round((wanted - len(kept)) / rate)), step, clock)
            too_long += dropped
            verdicts += scored
            sampled += groups
            kept += [g for g in groups if self._passes(g)]
        failures = sum(v.failure is not None for v in verdicts)
        if not kept and not sampled:
            beside = f" beside {self._bad_rows} bad rows" if self._bad_rows else ""
            raise NothingPasses(
                f"step {step}: all {too_long} prompts are too long: with rollout.max_new_tokens = "
                f"{self.rollout.max_new_tokens} they exceed the {self.sampler.limit} positions of model or "
                f"engine{beside}"
            )
        if not kept:
            mean = sum(g.accuracy for g in sampled) / len(sampled)
            raise NothingPasses(
                f"step {step}: none of {len(sampled)} groups has a mean accuracy in [{self.filter.low}, "
                f"{self.filter.high}] (their mean is {mean:.3f}, {failures} answers could not be verified); make the "
                "task easier or harder, widen filter.low and filter.high, raise rollout.n or filter.max_rounds"
            )
        batch, self.surplus = kept[:wanted], kept[wanted:]
        responses = [r for g in sampled for r in g.responses]
        count = max(1, len(responses))
        values = {
            "groups_sampled": len(sampled),
            "groups_kept": len(batch),
            "surplus": len(self.surplus),
            "prompts_too_long": too_long,
            "bad_rows": self._bad_rows,
            "verifier_failures": failures,
            "verifier_timeouts": sum(v.failure == TIME_LIMIT for v in verdicts),
            # Policy updates between the sampling weights and the weights being trained.
            "lag": sum(step - 1 - r.weight_version for g in batch for r in g.responses)
            / max(1, sum(len(g.responses) for g in batch)),
            "tokens": sum(len(r.ids) for g in batch for r in g.responses),
            "reward": sum(r.outcome for r in responses) / count,
            "response_length": sum(len(r.ids) for r in responses) / count,
            "truncated": sum(r.truncated for r in responses) / count,
            # At temperature 1 the mean of -log p over sampled tokens is an unbiased estimate of the entropy.
            "entropy": -sum(sum(r.logprobs or ()) for r in responses) / max(1, sum(len(r.ids) for r in responses)),
        }
        return batch, values if sampled else {k: v for k, v in values.items() if k not in _NEED_SAMPLES}

    def _passes(self, group: Group) -> bool:
        cfg = self.filter
        if cfg.drop_truncated and any(r.truncated for r in group.responses):
            return False
        return cfg.low <= group.accuracy <= cfg.high

    def _round(self, prompts: int, step: int, clock: StageClock) -> tuple[list[Group], list[Verdict], int]:
        """Groups of the next `prompts` problems, verdicts, and how many prompts were left out as too long."""
        cfg = self.rollout
        problems = self.task.train(self.position, prompts)
        seeds = [derive_seed(self.seed, "rollout", step, self.position + i) for i in range(len(problems))]
        self.position += len(problems)
        asked = []
        for problem, seed in zip(problems, seeds, strict=True):
            try:
                asked.append((problem, seed, prompt_ids(self.tokenizer, problem)))
            except BadRow as error:
                if self.task.bad_rows == "error":
                    raise BadRow(f"{error} (task.bad_rows = 'skip' leaves such rows out)") from None
                self._bad_rows += 1
        limit = self.sampler.limit
        fitting = [a for a in asked if limit is None or len(a[2]) + cfg.max_new_tokens <= limit]
        # Each rank samples and verifies its share; the filter sees all groups on every rank.
        mine = self.ranks.share(fitting)
        problems, seeds, ids = [a[0] for a in mine], [a[1] for a in mine], [a[2] for a in mine]
        with clock("rollout"):
            samples = self.sampler.generate(ids, cfg.n, Sampling(cfg.max_new_tokens, cfg.temperature), seeds)
        texts = [[self.tokenizer.decode(s.ids, skip_special_tokens=True) for s in group] for group in samples]
        with clock("verify"):
            answers = [(p.answer, text) for p, group in zip(problems, texts, strict=True) for text in group]
            verdicts = self.verifier.score(answers)
        groups = []
        for i, (problem, group) in enumerate(zip(problems, samples, strict=True)):
            scored = verdicts[i * cfg.n : (i + 1) * cfg.n]
            responses = [
                Response(s.ids, v.score, s.logprobs, s.finish_reason == "length", s.weight_version)
                for s, v in zip(group, scored, strict=True)
            ]
            text = problem.messages[-1]["content"]
            groups.append(Group(ids[i], responses, problem.id, text, problem.reference))
        every = [verdict for part in self.ranks.gather(verdicts) for verdict in part]
        return self.ranks.join(groups), every, len(asked) - len(fitting)


_NEED_SAMPLES = {"reward", "response_length", "truncated", "entropy"}
