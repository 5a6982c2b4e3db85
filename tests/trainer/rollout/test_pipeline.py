"""Which weights sample what, engines that die, and working one step ahead: with an engine that only keeps count."""

import json
import threading

import pytest
import torch

from prime_trainer import loop
from prime_trainer.config.load import load
from prime_trainer.config.run_config import RunConfig
from prime_trainer.config.sections import ServerConfig
from prime_trainer.data.tasks import load_task
from prime_trainer.models import lm_head
from prime_trainer.models.loading import named_tensors
from prime_trainer.rollout import EngineConfig, EngineDied, Sample, follow_logits, make_sampler, pipeline
from prime_trainer.rollout.sampler import model_shape
from prime_trainer.rollout.vllm.server import check_transfer, without_launcher
from prime_trainer.run.stage_clock import StageClock
from prime_trainer.verify import Verdict


class Engine:
    """Notes every call; dies in the calls that `deaths` names, counted over all engines."""

    limit, logits_dtype = None, "float32"

    def __init__(self, deaths=()):
        self.deaths, self.calls, self.version, self.alive = set(deaths), [], 0, True

    def _call(self, *what):
        self.calls.append(what)
        if len(self.calls) in self.deaths:
            self.alive = False
            raise EngineDied(f"died in {what[0]}")

    def generate(self, prompts, n, sampling, seeds):
        assert self.alive
        self._call("generate", self.version)
        return [[Sample([5 + k, 2], [-1.0, -1.0], "stop", self.version) for k in range(n)] for _ in prompts]

    def update_weights(self, tensors, version):
        assert self.alive and len(dict(tensors)) > 10
        self._call("update", version)
        self.version = version

    def release(self):
        self.calls.append(("release",))

    def restart(self):
        self.calls.append(("restart",))
        self.alive, self.version = True, -1

    def close(self):
        self.calls.append(("close",))


class Verifier:
    def score(self, items):
        return [Verdict(float(i % 2), None) for i in range(len(items))]


def engine_config(cfg):
    return EngineConfig(cfg.rollout, cfg.model, cfg.output)


def rollouts(cfg, model, tokenizer):
    return pipeline.Rollouts(
        engine_config(cfg), cfg.filter, model, tokenizer, load_task(cfg.task, 0), Verifier(),
        seed=cfg.seed, steps=cfg.steps, eval_batch_size=cfg.eval.batch_size,
    )  # fmt: skip


@pytest.fixture
def make(run_config, model, tokenizer, monkeypatch):
    def build(deaths=(), **rollout):
        cfg = run_config(steps=9, rollout={"engine": "vllm", **rollout})
        engine = Engine(deaths)
        monkeypatch.setattr(pipeline, "make_sampler", lambda *args, **options: engine)
        return rollouts(cfg, model, tokenizer), engine

    return build


def batch(it, step):
    groups, values = it.batch(step, StageClock())
    return [g.problem for g in groups], values["lag"]


def test_each_batch_is_sampled_by_the_policy_of_its_step(make):
    it, engine = make()
    first, second = batch(it, 1), batch(it, 2)
    assert engine.calls == [("generate", 0), ("release",), ("update", 1), ("generate", 1), ("release",)]
    assert first[1] == second[1] == 0 and not set(first[0]) & set(second[0])
    assert it.evaluate(2, lambda sampler: sampler.version) == 2


def test_with_a_lag_the_next_batch_is_sampled_by_older_weights(make):
    it, engine = make(lag=1)
    lags = [batch(it, step)[1] for step in (1, 2, 3)]
    it.close()
    assert lags == [0, 1, 1]
    assert [c for c in engine.calls if c[0] == "generate"] == [("generate", v) for v in (0, 0, 1, 2)]
    assert engine.calls[-1] == ("close",)


def test_with_a_lag_sampling_goes_on_while_the_caller_works(make):
    it, engine = make(lag=1)
    entered, leave = threading.Event(), threading.Event()
    generate = engine.generate

    def slow(*args):
        if engine.calls:  # not the first batch, which the caller waits for
            entered.set()
            assert leave.wait(20)
        return generate(*args)

    engine.generate = slow
    it.batch(1, StageClock())
    assert entered.wait(20)  # and the batch of step 1 is here
    leave.set()
    it.batch(2, StageClock())
    it.close()


def test_evaluation_waits_for_what_is_sampled_ahead_and_has_the_new_weights(make):
    it, engine = make(lag=1)
    it.batch(1, StageClock())
    assert it.evaluate(1, lambda sampler: sampler.version) == 1
    assert engine.calls[-2:] == [("generate", 0), ("update", 1)]
    assert batch(it, 2)[1] == 1  # sampled before the evaluation, by the weights of then
    it.close()


@pytest.mark.parametrize("lag", [0, 1])
def test_a_state_goes_on_with_the_same_batches(make, lag):
    whole, _ = make(lag=lag)
    want = [batch(whole, step) for step in (1, 2, 3, 4)]
    whole.close()
    part, _ = make(lag=lag)
    got = [batch(part, step) for step in (1, 2)]
    state = part.state_dict()
    part.close()
    rest, engine = make(lag=lag)
    rest.load_state_dict(state)
    got += [batch(rest, step) for step in (3, 4)]
    rest.close()
    assert got == want
    assert engine.calls[0] == ("update", 2)


@pytest.mark.parametrize(("lag", "deaths"), [(0, {3}), (0, {4}), (1, {2}), (1, {3}), (1, {5})])
def test_a_dead_engine_is_replaced_once_and_nothing_is_skipped(make, capsys, lag, deaths):
    calm, _ = make(lag=lag)
    want = [batch(calm, step)[0] for step in (1, 2, 3)]
    calm.close()
    it, engine = make(deaths, lag=lag)
    assert [batch(it, step)[0] for step in (1, 2, 3)] == want
    it.close()
    assert engine.calls.count(("restart",)) == 1
    after = engine.calls[engine.calls.index(("restart",)) + 1]
    assert after[0] == "update"  # a new engine never samples before it has the weights
    assert "the rollout engine is replaced: died in" in capsys.readouterr().err


@pytest.mark.parametrize("lag", [0, 1])
def test_a_second_death_ends_it_where_the_step_began(make, lag):
    it, _ = make({6, 8} if lag else {4, 7}, lag=lag)
    calm, _ = make(lag=lag)
    want = [batch(calm, step)[0] for step in (1, 2, 3, 4)]
    calm.close()
    got = []
    with pytest.raises(EngineDied, match=r"all of rollout\.vllm\.restarts = 1 are used up"):
        for step in (1, 2, 3, 4):
            got.append(batch(it, step)[0])
    state = it.state_dict()
    it.close()
    assert got == want[: len(got)] and len(got) == (3 if lag else 1)
    rest, _ = make(lag=lag)
    rest.load_state_dict(state)
    assert batch(rest, len(got) + 1)[0] == want[len(got)]
    rest.close()


def test_a_run_ends_with_a_checkpoint(run_config, monkeypatch, model, tmp_path):
    engine = Engine({5, 8})
    monkeypatch.setattr(pipeline, "make_sampler", lambda *args, **options: engine)
    fake = type("V", (Verifier,), {"close": lambda self: None})
    monkeypatch.setattr(loop.Verifier, "from_config", lambda _cfg: fake())
    with pytest.raises(EngineDied):
        loop.run(run_config(rollout={"engine": "vllm"}))
    from helpers.checkpoints import load_latest

    assert load_latest(tmp_path / "run")["step"] == 1 and engine.calls[-1] == ("close",)


def test_settings_of_engines():
    assert RunConfig(rollout={"engine": "transformers"}).rollout.tis_cap == 0
    assert RunConfig(rollout={"engine": "vllm"}).rollout.tis_cap == 2
    assert RunConfig(rollout={"engine": "vllm-server", "tis_cap": 5}).rollout.tis_cap == 5
    for bad, message in [
        ({"top_p": 0.9}, r"rollout\.top_p must be off \(1\.0\) for training, got 0\.9"),
        ({"top_k": 5}, r"rollout\.top_k must be off \(0\) for training, got 5"),
        ({"lag": 1}, r"rollout\.lag = 1 needs an engine with weights of its own .* got 'transformers' and 0\.0"),
        ({"lag": 1, "engine": "vllm", "tis_cap": 0}, r"rollout\.lag = 1 needs .* got 'vllm' and 0\.0"),
        ({"lag": 1, "engine": "vllm", "vllm": {"sleep": True}}, r"rollout\.lag must be 0"),
        (
            {"server": {"urls": ["localhost:8000"]}},
            r"rollout\.server\.urls must be like http://.* got 'localhost:8000'",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            RunConfig(rollout={"engine": "transformers", **bad})
    for other in ({"policy": {"kl_coef": 0.1}}, {"prm": {"ref_type": "policy"}}):
        with pytest.raises(ValueError, match=r"rollout\.temperature must be 1 with policy\.kl_coef or prm\.ref_type"):
            RunConfig(rollout={"temperature": 0.7}, **other)


@pytest.mark.parametrize(
    ("installed", "torchrun", "engine"),
    [(True, False, "vllm"), (False, False, "transformers"), (True, True, "transformers")],
)
def test_the_engine_that_auto_stands_for(monkeypatch, installed, torchrun, engine):
    monkeypatch.setattr("prime_trainer.config.sections.rollout.vllm_installed", lambda: installed)
    monkeypatch.setenv("WORLD_SIZE", "2") if torchrun else monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert RunConfig().rollout.engine == engine


def test_weights_that_cannot_reach_a_server_are_refused(run_config, model, tokenizer, monkeypatch):
    monkeypatch.setattr("prime_trainer.rollout.engines.vllm_installed", lambda: True)
    elsewhere, here = "http://192.0.2.7:8000", "http://localhost:8000"
    for server, message in [
        (
            {"transfer": "nccl"},
            r"rollout\.server\.transfer = 'nccl' is for weights on a GPU, and the model is on 'cpu'",
        ),
        (
            {"urls": [here, elsewhere]},
            rf"rollout\.server\.transfer = 'file' is for servers on this host, and {elsewhere}",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            make_sampler(
                engine_config(run_config(rollout={"engine": "vllm-server", "server": server})), model, tokenizer
            )
    check_transfer(ServerConfig(urls=[here, "http://127.0.0.1:1", "http://[::1]:2"]), "cpu")
    check_transfer(ServerConfig(urls=[elsewhere], transfer="nccl"), "cuda")


def test_a_server_is_none_of_torchruns_ranks():
    env = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1", "LOCAL_RANK": "0", "PATH": "p"}
    env |= {"TORCHELASTIC_RUN_ID": "x", "GROUP_RANK": "0", "OMP_NUM_THREADS": "1"}
    assert without_launcher(env) == {"PATH": "p"}
    assert without_launcher({"OMP_NUM_THREADS": "1"}) == {"OMP_NUM_THREADS": "1"}  # somebody's own choice


def test_servers_on_the_command_line():
    urls = ["http://127.0.0.1:8001", "http://127.0.0.1:8002"]
    assert load(None, ["--rollout.server.urls", json.dumps(urls)]).rollout.server.urls == urls


def test_a_missing_vllm_is_said(run_config, model, tokenizer, monkeypatch):
    monkeypatch.setattr("prime_trainer.rollout.engines.vllm_installed", lambda: False)
    for engine in ("vllm", "vllm-server"):
        with pytest.raises(ValueError, match=rf"rollout\.engine = '{engine}' needs vLLM: pip install"):
            make_sampler(engine_config(run_config(rollout={"engine": engine})), model, tokenizer)


def test_a_set_of_weights_is_complete_and_has_each_storage_once(model, tokenizer):
    shape = model_shape(model, tokenizer, 100)
    assert shape.limit == 100 and shape.vocabulary == 301 and list(shape.stops) == [2, 0]
    tensors = dict(named_tensors(model))
    checked = shape.check_weights(tensors.items())
    assert tensors.keys() - checked.keys() == {"lm_head.weight"}  # tied to the embedding
    assert all(torch.equal(tensors[name], tensor) for name, tensor in checked.items())
    del tensors["model.norm.weight"]
    with pytest.raises(ValueError, match=r"all 21 of the model's: 1 are missing \(model\.norm\.weight\), 0 unknown"):
        shape.check_weights(tensors.items())


def test_a_resume_may_move_the_server(run_config, tmp_path, monkeypatch):
    from prime_trainer.run.checkpoint import begin, save

    cfg = run_config(rollout={"engine": "vllm-server", "server": {"port": 1234}})
    cfg.output.mkdir()
    save(cfg.output, 1, {"step": 1, "config": cfg.model_dump_json()}, keep=1)
    moved = run_config(resume=True, rollout={"engine": "vllm-server", "server": {"port": 4321}})
    assert begin(moved, {})["step"] == 1
    with pytest.raises(ValueError, match="the configuration has changed"):
        begin(run_config(resume=True, rollout={"engine": "vllm-server", "n": 9}), {})


@pytest.mark.parametrize(
    ("asked", "has", "dtype", "taken"),
    [
        ("auto", "float32", "bfloat16", "float32"),
        ("auto", "input", "bfloat16", "input"),
        ("float32", "float32", "bfloat16", "float32"),
        ("float32", "input", "bfloat16", r"'float32' is for .* vllm-server rounds its logits to bfloat16: take 'auto'"),
        ("input", "input", "bfloat16", "input"),
        ("input", "float32", "bfloat16", "'input' is for .* vllm-server has float32 logits"),
        ("input", "float32", "float32", "unchanged"),
    ],
)
def test_trainer_and_engine_have_the_same_logits(run_config, asked, has, dtype, taken):
    cfg = run_config(rollout={"engine": "vllm-server"}, model={"dtype": dtype, "logits_dtype": asked})
    engine, models = Engine(), [torch.nn.Linear(1, 1) for _ in range(2)]
    engine.logits_dtype = has
    for model in models:
        lm_head.set_logits_dtype(model, "unchanged")
    if "is for" in taken:
        with pytest.raises(ValueError, match=taken):
            follow_logits(engine_config(cfg), engine, models)
        return
    said = follow_logits(engine_config(cfg), engine, models)
    assert (said is not None) == ((asked, taken) == ("auto", "input"))
    assert {lm_head.logits_dtype(model) for model in models} == {taken}


def test_a_run_follows_its_engine(run_config, monkeypatch, capsys):
    """Policy, PRM and reference; what was decided is said once."""
    engine = Engine()
    engine.logits_dtype = "input"
    monkeypatch.setattr(pipeline, "make_sampler", lambda *args, **options: engine)
    cfg = run_config(rollout={"engine": "vllm"}, model={"dtype": "bfloat16"}, policy={"kl_coef": 0.1})
    run = loop.Run(cfg)
    run.close()
    models = [run.policy.model, run.prm.model, run.ref]
    assert [lm_head.logits_dtype(model) for model in models] == ["input"] * 3
    assert capsys.readouterr().err.count("model.logits_dtype = auto: 'input', as the engine vllm rounds") == 1
    with pytest.raises(ValueError, match="'float32' is for trainer and engine"):
        loop.Run(run_config(rollout={"engine": "vllm"}, model={"dtype": "bfloat16", "logits_dtype": "float32"}))
    assert engine.calls[-1] == ("close",)
