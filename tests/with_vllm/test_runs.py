"""Whole runs with each engine: the same statistics, exact resumes, and what happens when the engine dies."""

import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
import torch
from helpers import ranks
from helpers.checkpoints import load_latest
from helpers.engines import Engine, processes, prompts, rows, same_weights, shared_memory

from prime_trainer import loop
from prime_trainer.cli import main
from prime_trainer.config.sections import ModelConfig
from prime_trainer.models import loading, tokenizers
from prime_trainer.rollout import EngineDied
from prime_trainer.rollout.vllm import engine as vllm_engine
from prime_trainer.verify import Verdict

ENGINES = ("transformers", "vllm", "vllm-server")
# Without AVX-512 a bfloat16 product takes several times as long as one in float32.
DTYPE = "bfloat16" if torch.backends.cpu.get_cpu_capability() == "AVX512" else "float32"


class Contains:
    """1 where the reference answer is among a text's words: the untrained model is right now and then."""

    def score(self, items):
        words = [text.replace("=", " ").replace(".", " ").replace("*", " ").split() for _, text in items]
        return [
            Verdict(float(answer.entry["answer"] in found), None)
            for (answer, _), found in zip(items, words, strict=True)
        ]

    def close(self):
        pass


@pytest.fixture(autouse=True)
def verifier(monkeypatch):
    monkeypatch.setattr(loop.Verifier, "from_config", lambda _cfg: Contains())


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """As an ordinary directory: reading the GGUF file takes longer than a run."""
    cfg = ModelConfig(chat_template="bare")
    try:
        model, tokenizer = loading.load_model(cfg), tokenizers.load_tokenizer(cfg)
    except loading.ModelError as error:
        pytest.skip(str(error))
    directory = tmp_path_factory.mktemp("smollm2") / "model"
    loading.save(model, tokenizer, directory)
    return directory


def test_every_engine_has_the_same_statistics(smollm2, configure):
    """Three steps of the same problems; samples differ, their means by no more than sampling allows."""
    means = {}
    for engine in ENGINES:
        cfg = configure(
            engine,
            rollout={"prompts_per_step": 16, "n": 4, "max_new_tokens": 20, "batch_size": 64, "vllm": {}},
            model={"path": str(smollm2), "device": "cpu", "dtype": DTYPE},
            algorithm={"process_coef": 0.0},
            policy={"lr": 1e-6, "minibatches": 1},
            filter={"low": 0.1, "high": 0.9, "max_rounds": 1},
        )
        loop.run(cfg)
        assert not processes(f"prime_trainer.rollout.vllm.server_main\0{os.getpid()}") and not shared_memory()
        steps = rows(cfg.output)
        assert len(steps) == 3 and all(row["groups_sampled"] == 16 for row in steps)
        assert {row["lag"] for row in steps} == {0.0}
        for row in steps if engine != "transformers" else ():
            # In bfloat16 the two sides round differently, a token's log-prob by some hundredths.
            assert 0 < row["mismatch"] < 0.15 and row["mismatch_max"] < 3 and 0 <= row["mismatch_kl"] < 0.05
            assert 0.9 < row["mismatch_ess"] <= 1 and row["tis_capped"] < 0.02
        print(engine, [{k: round(row[k], 4) for k in sorted(row) if k.startswith(("mism", "tis"))} for row in steps])
        means[engine] = {key: sum(row[key] for row in steps) / 3 for key in ("reward", "groups_kept", "entropy")}
    for engine in ENGINES[1:]:
        one, other = means["transformers"], means[engine]
        # The problems are the same for both, so what differs is the draws: of 192 responses, and of 48 groups.
        for key, draws, unit in (("reward", 192, 1), ("groups_kept", 48, 16)):
            share = (one[key] + other[key]) / 2 / unit
            assert abs(one[key] - other[key]) / unit < 4 * math.sqrt(2 * share * (1 - share) / draws)
        assert abs(one["entropy"] - other["entropy"]) < 0.5
        assert 0 < other["reward"] < 1


def test_two_ranks_share_one_server(configure):
    """The same run as in one process: the first rank drives the server, both train on what it samples."""
    runs = {size: configure("vllm-server", steps=3, policy={"lr": 2e-5}, prm={"lr": 3e-4}) for size in (0, 2)}
    for size, cfg in runs.items():
        ranks.train(cfg, size)
        assert not processes(str(cfg.output)) and not shared_memory()
    ranks.assert_close_runs(runs[0].output, runs[2].output, 1e-4)


def test_vllm_loads_what_a_run_exports(configure, tmp_path):
    """As vLLM loads any model, without our part in it."""
    from vllm import LLM, SamplingParams

    asked, engine = prompts(), Engine(configure("vllm"))
    engine.shake(5)
    engine.push(1)
    loading.save(engine.model, engine.tokenizer, tmp_path / "final")
    want = engine.greedy(asked)
    engine.sampler.close()
    llm = LLM(**engine.sampler.options, model=str(tmp_path / "final"), skip_tokenizer_init=True)
    greedy = SamplingParams(temperature=0.0, max_tokens=24, stop_token_ids=[0, 2], detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": p} for p in asked], greedy, use_tqdm=False)
    llm.llm_engine.engine_core.shutdown()
    del llm
    vllm_engine._forget_groups()
    assert [list(output.outputs[0].token_ids) for output in outputs] == want


@pytest.mark.parametrize("lag", [0, 1])
def test_resume_is_exact(configure, lag):
    """In float32 the engine is deterministic; with a lag the checkpoint holds the batch that was sampled ahead."""
    options = {"rollout": {"lag": lag}, "steps": 4, "checkpoint": {"every": 2}}
    whole, parts = configure("vllm", **options), configure("vllm", **options)
    loop.run(whole)
    interrupt_after(2, parts)
    loop.run(parts.model_copy(update={"resume": True}))
    assert same_weights(whole.output / "final", parts.output / "final")
    assert [row["lag"] for row in rows(parts.output)] == [0.0, *([float(lag)] * 3)]


def interrupt_after(step, cfg):
    train_step = loop.Run.train_step

    def interrupted(self):
        result = train_step(self)
        if self.step == step:
            signal.raise_signal(signal.SIGINT)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Run, "train_step", interrupted)
        loop.run(cfg)
    assert load_latest(cfg.output)["step"] == step


@pytest.fixture
def killing(monkeypatch):
    """`killing(2)`: kills the engine's process in each of the first steps after step 1, while it samples."""
    from prime_trainer.rollout.vllm.server_sampler import ServerSampler

    generate, kills = ServerSampler.generate, []

    def kill(sampler):
        for child in psutil.Process(sampler.process._process.pid).children(recursive=True):
            if "EngineCore" in child.name() or "EngineCore" in " ".join(child.cmdline()):
                child.kill()

    def arm(times):
        def watched(sampler, *rest):
            if len(kills) < times and sampler.version > max(kills, default=0):
                kills.append(sampler.version)
                threading.Timer(0.15, kill, [sampler]).start()
            return generate(sampler, *rest)

        monkeypatch.setattr(ServerSampler, "generate", watched)
        return kills

    return arm


def test_an_engine_killed_once_is_replaced_and_killed_again_ends_the_run(configure, killing, capfd):
    cfg = configure("vllm-server", rollout={"n": 4, "prompts_per_step": 8, "max_new_tokens": 200}, steps=4)
    kills = killing(2)
    with pytest.raises(EngineDied, match=r"rollout\.vllm\.restarts = 1 are used up"):
        loop.run(cfg)
    said = capfd.readouterr().err
    assert said.count("the rollout engine is replaced: ") == 1 and len(kills) == 2
    saved = load_latest(cfg.output)
    assert kills == [1, 2] and saved["step"] == len(rows(cfg.output)) == 2  # it went on after the first
    assert not processes(str(cfg.output)) and not shared_memory()


def test_a_run_of_its_own_server_ends_with_it(configure, tmp_path):
    """Ctrl-C twice, or the trainer killed: no server outlives the run."""
    for signals in ([signal.SIGINT, signal.SIGINT], [signal.SIGKILL]):
        cfg = configure("vllm-server", output=tmp_path / f"run{len(signals)}", steps=50)
        path = tmp_path / "run.toml"
        path.write_text("")
        words = ["--model.path", cfg.model.path, "--model.dtype", "float32", "--output", str(cfg.output)]
        words += ["--rollout.engine", "vllm-server", "--rollout.vllm.kv_cache_gib", "0.125", "--filter.low", "0"]
        words += ["--rollout.prompts_per_step", "2", "--rollout.max_new_tokens", "64", "--task.eval_size", "2"]
        command = [sys.executable, "-m", "prime_trainer.cli", "rl", str(path), *words]
        run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 400
        while not (cfg.output / "metrics.jsonl").exists() or not rows(cfg.output):
            assert run.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        assert processes(cfg.model.path)
        for number in signals:
            run.send_signal(number)
            time.sleep(0.3)
        run.wait(120)
        while processes(f"prime_trainer.rollout.vllm.server_main\0{run.pid}") and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not processes(f"prime_trainer.rollout.vllm.server_main\0{run.pid}")
        if signals == [signal.SIGKILL]:  # which leaves nobody to remove weights that were just being handed over
            for name in shared_memory():
                shutil.rmtree(f"/dev/shm/{name}")
        assert not shared_memory()


def test_a_missing_model_is_one_message(capsys, tmp_path):
    words = ["--model.path", str(tmp_path / "none"), "--output", str(tmp_path / "run")]
    for engine in ENGINES[1:]:
        assert main(["rl", *words, "--rollout.engine", engine]) == 2
        assert "model.path must be a model directory" in capsys.readouterr().err
    assert not os.path.exists(tmp_path / "run" / "server.log")
