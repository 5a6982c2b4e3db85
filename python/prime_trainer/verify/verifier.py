"""One verifier for every kind of answer: worker processes for answers, sandboxes for programs, both at once."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from .answers import Answer, AssertTests, CallTests, MathAnswer, OwnReward, ProgramTests, ScoredAnswer
from .extract import last_answer, last_boxed, plain, programs
from .programs import CodeRunner
from .rewards import RewardPool
from .sandbox import Confinement, Limits, confinement
from .verdict import Verdict
from .worker_pool import WorkerPool

if TYPE_CHECKING:
    from ..config.sections import TaskConfig


class Verifier:
    """Scores `(answer, response)` pairs; a context manager whose processes start when they are needed.

    `answer` is `Problem.answer`, the response the model's whole text. Of it counts the last `\\boxed{...}`, or for
    code the last fenced block of Python. A response without one is wrong: score 0, no failure. With `any_answer`, the
    last number or formula of a response without a box counts. A `reward` gets whole responses.
    """

    def __init__(
        self,
        seconds: float,
        workers: int | None = None,
        *,
        any_answer: bool = False,
        interval_as_inequality: bool = True,
        code: CodeOptions | None = None,
        reward: RewardPool | None = None,
    ) -> None:
        self._any_answer, self._interval_as_inequality = any_answer, interval_as_inequality
        self._code = code or CodeOptions()
        self._pool = WorkerPool(seconds, workers, self._code.confine)
        self._runner: CodeRunner | None = None
        self._reward = reward

    @classmethod
    def from_config(cls, cfg: TaskConfig) -> Verifier:
        """The verifier of a run. Raises VerifierError where `task.reward` cannot be imported."""
        reward = None
        if cfg.reward is not None:
            reward = RewardPool(cfg.reward, cfg.verify_seconds, cfg.verify_workers, cfg.reward_batch)
            reward.check()
        limits = Limits(cfg.code_seconds, cfg.code_memory_mb)
        code = CodeOptions(lambda: confinement_for(cfg), limits, cfg.code_workers, cfg.code_partial_credit)
        return cls(
            cfg.verify_seconds, cfg.verify_workers, any_answer=cfg.any_answer,
            interval_as_inequality=cfg.interval_as_inequality, code=code, reward=reward,
        )  # fmt: skip

    def __enter__(self) -> Verifier:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends every process; the next `score` starts new ones."""
        self._pool.close()
        if self._reward is not None:
            self._reward.close()
        runner, self._runner = self._runner, None
        if runner is not None:
            runner.close()

    def answer(self, answer: Answer, response: str) -> str | None:
        """What of a response is scored: its answer or its program; None where there is none; all for a reward."""
        if isinstance(answer, OwnReward):
            return response
        if isinstance(answer, ProgramTests):
            found = candidates(answer, response)
            return found[0] if found else None
        boxed = last_boxed(response)
        return last_answer(response) if boxed is None and self._any_answer else boxed

    def score(self, items: Sequence[tuple[Answer, str]]) -> list[Verdict]:
        """Returns one verdict an item, in order.

        Raises VerifierError when no worker starts, and SandboxError when no sandbox works; a batch is scored whole or
        not at all.
        """
        verdicts = [Verdict(0.0, None)] * len(items)
        answers: list[tuple[int, ScoredAnswer, str]] = []
        submitted: list[tuple[int, ProgramTests, list[str]]] = []
        rewarded = [(i, answer, text) for i, (answer, text) in enumerate(items) if isinstance(answer, OwnReward)]
        if rewarded and self._reward is None:
            raise ValueError("answers of kind 'reward' need a reward function (task.reward)")
        for i, (answer, response) in enumerate(items):
            if isinstance(answer, ProgramTests):
                if found := candidates(answer, response):
                    submitted.append((i, answer, found))
            elif not isinstance(answer, OwnReward) and (text := self.answer(answer, response)) is not None:
                answers.append((i, self._with_options(answer), text))
        try:
            running = {i: self._programs().submit(answer, *found) for i, answer, found in submitted}
            scored = self._score_answers([(answer, text) for _, answer, text in answers])
            for (i, _, _), verdict in zip(answers, scored, strict=True):
                verdicts[i] = verdict
            if self._reward is not None:
                given = self._reward.score([(answer, text) for _, answer, text in rewarded])
                for (i, _, _), verdict in zip(rewarded, given, strict=True):
                    verdicts[i] = verdict
            for i, future in running.items():
                verdicts[i] = future.result()
        except BaseException:
            # Ctrl-C above all: answers are in flight, and their replies must not be taken for later ones.
            self.close()
            raise
        return verdicts

    def _score_answers(self, items: Sequence[tuple[ScoredAnswer, str]]) -> list[Verdict]:
        """Those that are not settled by their digits go to the processes."""
        settled = [_settled(answer, text) for answer, text in items]
        left = iter(self._pool.score([item for item, verdict in zip(items, settled, strict=True) if verdict is None]))
        return [next(left) if verdict is None else verdict for verdict in settled]

    def _with_options(self, answer: ScoredAnswer) -> ScoredAnswer:
        if isinstance(answer, MathAnswer) and not self._interval_as_inequality:
            return replace(answer, interval_as_inequality=False)
        return answer

    def _programs(self) -> CodeRunner:
        if self._runner is None:
            self._runner = self._code.runner()
        return self._runner

    def group(self, problems: Sequence[Sequence[str | None]]) -> list[list[int | None]]:
        """Groups the mathematical answers of each problem by equivalence.

        Answers with the same number are equivalent; the groups of a problem are numbered in the order in which they
        are first seen, and None (no answer) stays None. An answer is compared with the first of each group, and one
        that cannot be compared in time is alone.
        """
        groups: list[dict[str, int]] = [{} for _ in problems]
        waiting = [list(dict.fromkeys(plain(a) for a in answers if a is not None)) for answers in problems]
        written = [{plain(a): a for a in reversed(answers) if a is not None} for answers in problems]
        rounds = 0
        while any(waiting):
            pairs = [(p, a) for p, answers in enumerate(waiting) for a in answers[1:]]
            items = [(MathAnswer(written[p][waiting[p][0]]), written[p][a]) for p, a in pairs]
            same = {pair for pair, v in zip(pairs, self._score_answers(items), strict=True) if v.score == 1.0}
            for p, answers in enumerate(waiting):
                joined = [a for i, a in enumerate(answers) if i == 0 or (p, a) in same]
                groups[p] |= dict.fromkeys(joined, rounds)
                waiting[p] = [a for a in answers if a not in groups[p]]
            rounds += 1
        return [
            [None if a is None else found[plain(a)] for a in answers]
            for answers, found in zip(problems, groups, strict=True)
        ]


_WHOLE_NUMBER = re.compile(r"0|-?[1-9][0-9]{0,17}")


def _settled(answer: ScoredAnswer, text: str) -> Verdict | None:
    """The verdict on a whole number where the reference is one, both written in the one shortest way; else None. To
    compare the digits evaluates nothing, so it needs no process."""
    if not isinstance(answer, MathAnswer) or answer.tolerance is not None:
        return None
    if not all(map(_WHOLE_NUMBER.fullmatch, (answer.reference, text))):
        return None
    return Verdict(float(answer.reference == text), None)


def candidates(answer: ProgramTests, response: str) -> list[str]:
    """The blocks of a response that may be the program that is tested, the likeliest first."""
    if isinstance(answer, CallTests):
        return programs(response, [answer.fn_name])
    if isinstance(answer, AssertTests):
        return programs(response, answer.names)
    return programs(response, reads_input=any(answer.inputs))


@dataclass(frozen=True)
class CodeOptions:
    """How programs are run; `confine` is asked at the first program."""

    confine: Callable[[], Confinement] = lambda: confinement("auto")
    limits: Limits = field(default_factory=Limits)
    workers: int = 2
    partial_credit: bool = False

    def runner(self) -> CodeRunner:
        return CodeRunner(self.confine(), self.limits, self.workers, self.partial_credit)


def confinement_for(cfg: TaskConfig) -> Confinement:
    """The sandbox that a configuration asks for. Raises SandboxError where it does not work on this machine."""
    return confinement(cfg.sandbox, cfg.code_packages, cfg.allow_unsafe)
