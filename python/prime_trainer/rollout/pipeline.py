"""Batches for the loop: updates the engine's weights, restarts it when it dies, samples ahead with `lag = 1`."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, replace
from typing import Any, TypeVar

from ..config.sections import FilterConfig
from ..data.groups import Group, group_from
from ..data.problems import Task
from ..models.protocols import CausalLM, Tokenizer
from ..run.stage_clock import StageClock
from ..scale.ranks import SINGLE, Ranks
from ..verify import Verifier
from . import EngineConfig, EngineDied, Sampler, make_sampler, weights
from .collector import Collector, NothingPasses

Result = TypeVar("Result")
Collected = tuple[list[Group], dict[str, float]]


class Rollouts:
    """With `lag = 0` a batch is sampled when it is asked for, by the policy as it is.

    With `lag = 1` the batch of step k is sampled in a thread while step k - 1 trains, by the weights that step k - 1
    began with. A checkpoint waits for that batch and holds it, so that a resumed run trains on the same.
    """

    def __init__(
        self,
        engine: EngineConfig,
        group_filter: FilterConfig,
        model: CausalLM,
        tokenizer: Tokenizer,
        task: Task,
        verifier: Verifier,
        *,
        seed: int,
        steps: int,
        eval_batch_size: int,
        ranks: Ranks = SINGLE,
    ) -> None:
        """`steps` is the run's last step, after which nothing is sampled ahead."""
        self.cfg, self.model, self.steps = engine.rollout, model, steps
        # A separate group: the thread that samples ahead must not interleave with the collectives of training.
        self.ranks = ranks = replace(ranks, group=ranks.sampling)
        self.sampler = self.evaluating = make_sampler(engine, model, tokenizer, ranks=ranks)
        if self.cfg.engine == "transformers":
            # It holds its whole batch at once, and evaluation may have room for another size.
            self.evaluating = make_sampler(engine, model, tokenizer, batch_size=eval_batch_size)
        if self.cfg.lag:
            tokenizer = copy.deepcopy(tokenizer)  # fast tokenizers are not for two threads at once
        self.collector = Collector(self.cfg, group_filter, seed, task, tokenizer, self.sampler, verifier, ranks)
        self.restarts = self.cfg.vllm.restarts
        self._thread = ThreadPoolExecutor(1) if self.cfg.lag else None
        self._ahead: Future[Collected] | None = None
        self._before: tuple[int, list[Group]] = (0, [])
        self._handed_out: tuple[int, Collected] | None = None

    def batch(self, step: int, clock: StageClock) -> Collected:
        """The groups that step `step` trains on, sampled by the policy after `step - 1` updates or, with a lag, before
        the last of them; and metrics. Raises NothingPasses, EngineDied."""
        collected, self._ahead = self._ahead, None
        try:
            found = self._collect(step, clock) if collected is None else self._collected(collected, step, clock)
            if self._thread is not None and step < self.steps:
                self._with_engine(step - 1, lambda: None, clock)
        except NothingPasses:
            raise
        except Exception:
            self._undo()  # a resumed run starts this step over
            raise
        self._handed_out = (step, found)
        if self._thread is None:
            self.sampler.release()
        elif step < self.steps:
            self._start(self._thread, step + 1)
        return found

    def take_back(self, step: int) -> None:
        """Makes the batch of `step`, which could not be trained on, the next one again: a checkpoint then holds it."""
        if self._handed_out is None or self._handed_out[0] != step:
            return
        if self._ahead is not None:
            wait([self._ahead])
            self._undo()
        self._ahead = Future()
        self._ahead.set_result(self._handed_out[1])

    def evaluate(self, version: int, work: Callable[[Sampler], Result]) -> Result:
        """Calls `work` with a sampler that holds the current policy, which is at `version`."""
        if self._ahead is not None:
            wait([self._ahead])
        return self._with_engine(version, lambda: work(self.evaluating))

    def state_dict(self) -> dict[str, Any]:
        ahead = None
        if self._ahead is not None:
            try:
                groups, values = self._ahead.result()
                ahead = {"groups": [asdict(g) for g in groups], "values": values}
            except Exception:  # comes up again where the batch is asked for
                self._undo()
                self._ahead = None
        return self.collector.state_dict() | {"ahead": ahead}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.collector.load_state_dict(state)
        if state["ahead"] is not None:
            self._ahead = Future()
            self._ahead.set_result(([group_from(g) for g in state["ahead"]["groups"]], state["ahead"]["values"]))

    def close(self) -> None:
        if self._ahead is not None and not self.cfg.engine.endswith("server"):
            wait([self._ahead])  # an engine in this process cannot be taken away from under its thread
        self.sampler.close()
        if self._thread is not None:
            self._thread.shutdown()

    def _start(self, thread: ThreadPoolExecutor, step: int) -> None:
        """Collects the batch of `step` in the thread, with a separate clock."""
        self._before = (self.collector.position, list(self.collector.surplus))

        def collect() -> Collected:
            clock = StageClock()
            groups, values = self.collector.collect(step, clock)
            return groups, values | clock.stages()

        self._ahead = thread.submit(collect)

    def _undo(self) -> None:
        self.collector.position, self.collector.surplus = self._before

    def _collected(self, ahead: Future[Collected], step: int, clock: StageClock) -> Collected:
        try:
            with clock("wait"):
                return ahead.result()
        except EngineDied as error:
            self._undo()
            self._replace(error)
            return self._collect(step, clock)

    def _collect(self, step: int, clock: StageClock) -> Collected:
        self._before = (self.collector.position, list(self.collector.surplus))

        def collect() -> Collected:
            self._undo()
            return self.collector.collect(step, clock)

        return self._with_engine(step - 1, collect, clock)

    def _with_engine(self, version: int, work: Callable[[], Result], clock: StageClock | None = None) -> Result:
        """`work` when the engine holds the policy, which is at `version`; again with a new engine if it dies."""
        while True:
            try:
                if self.sampler.version != version:
                    with (clock or StageClock())("weights"):
                        self.sampler.update_weights(weights(self.cfg, self.model), version)
                return work()
            except EngineDied as error:
                self._replace(error)

    def _replace(self, error: EngineDied) -> None:
        """A new engine without weights. Raises EngineDied once `rollout.vllm.restarts` are used up."""
        if self.restarts == 0:
            raise EngineDied(f"{error}; all of rollout.vllm.restarts = {self.cfg.vllm.restarts} are used up")
        self.restarts -= 1
        if self.ranks.first:
            print(f"\nthe rollout engine is replaced: {error}", file=sys.stderr, flush=True)
        self.sampler.restart()
