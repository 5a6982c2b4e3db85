"""`prime-trainer serve` and runs against it: the token, the sharing out, the draining, and every way to go wrong."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest
import torch
from helpers.engines import Engine, processes, prompts, shared_memory

from prime_trainer.errors import RunError
from prime_trainer.rollout import EngineDied, Sampling
from prime_trainer.rollout.vllm.client import Client
from prime_trainer.rollout.vllm.server import free_port, read_token

PROMPTS = prompts()


def start(configure, tmp, *, words=()):
    """`prime-trainer serve` as a user starts it; returns the process, its address and the token's file."""
    cfg, port, token = configure("vllm-server"), free_port(), tmp / "token"
    settings = [
        *("--model.path", cfg.model.path, "--model.dtype", "float32", "--rollout.vllm.kv_cache_gib", "0.125"),
        *("--rollout.server.port", str(port), "--rollout.server.token_file", str(token), *words),
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "prime_trainer.cli", "serve", *settings],
        stdout=(tmp / f"serve-{port}.log").open("w"),
        stderr=subprocess.STDOUT,
    )
    return process, f"http://127.0.0.1:{port}", token


def ended(process, *signals):
    for number in signals:
        process.send_signal(number)
    return process.wait(60)


@pytest.fixture(scope="module")
def served(configure, tmp_path_factory):
    """Two servers with one token, and a sampler that shares its prompts out to them."""
    tmp = tmp_path_factory.mktemp("serve")
    started = [start(configure, tmp)]
    deadline = time.monotonic() + 300
    while not started[0][2].exists():  # the first makes the token, the second takes it
        assert time.monotonic() < deadline and started[0][0].poll() is None
        time.sleep(0.2)
    started.append(start(configure, tmp))
    urls, token = [url for _, url, _ in started], started[0][2]
    engine = None
    try:
        cfg = configure("vllm-server", rollout={"server": {"urls": urls, "token_file": token, "start_seconds": 600}})
        engine = Engine(cfg)
        yield engine, [process for process, _, _ in started]
    finally:
        if engine is not None:
            engine.sampler.close()
        for process, _, _ in started:
            process.kill() if process.poll() is None and ended(process, signal.SIGINT) is None else None


def test_prompts_are_shared_out_and_both_servers_follow(served):
    engine, _ = served
    asked = {client.url: [] for client in engine.sampler.clients}
    for client in engine.sampler.clients:
        sample = client.sample

        async def noted(http, prompt, *rest, client=client, sample=sample):
            asked[client.url].append(len(prompt))
            return await sample(http, prompt, *rest)

        client.sample = noted
    assert engine.disagreements(PROMPTS) == 0
    engine.shake(1)
    engine.push(1)
    assert engine.disagreements(PROMPTS) == 0
    halves = [sorted(set(lengths)) for lengths in asked.values()]
    assert halves == [list(range(140, 156, 2)), list(range(141, 156, 2))]
    assert {client.weight_version() for client in engine.sampler.clients} == {"1"}


def prompt_tokens(engine):
    """Tokens of all prompts that the servers have read since they started."""
    count = 0.0
    for client in engine.sampler.clients:
        text = httpx.get(f"{client.url}/metrics", headers=client.headers, trust_env=False).text
        count += sum(map(float, re.findall(r"^vllm:prompt_tokens_total\{[^}]*\} ([0-9.e+]+)$", text, re.MULTILINE)))
    return count


def test_an_update_waits_for_what_is_under_way(served):
    engine, _ = served
    # None may end early: which do depends on the processor's rounding, and what is left may be over before the update.
    with torch.no_grad():
        engine.model.get_output_embeddings().weight[engine.sampler.shape.stops] = 0.0
    engine.push(2)
    before = engine.greedy(PROMPTS)
    got = []
    long = Sampling(340, temperature=0.0)
    thread = threading.Thread(target=lambda: got.append(engine.sampler.generate(PROMPTS, 4, long, range(16))))
    asked = prompt_tokens(engine) + 4 * sum(map(len, PROMPTS))
    thread.start()
    while prompt_tokens(engine) < asked:
        assert thread.is_alive()
    assert thread.is_alive()
    engine.shake(2)
    engine.push(3)
    thread.join()
    assert [s.ids[:24] for g in got[0] for s in g] == [ids for ids in before for _ in range(4)]
    assert {len(s.ids) for g in got[0] for s in g} == {340}
    assert engine.greedy(PROMPTS) != before and engine.disagreements(PROMPTS) == 0


def test_nothing_but_health_is_open_without_the_token(served):
    engine, _ = served
    url = engine.sampler.clients[0].url
    token = read_token(engine.cfg.rollout.server.token_file)
    assert engine.cfg.rollout.server.token_file.stat().st_mode & 0o077 == 0
    with httpx.Client(base_url=url, trust_env=False) as http:
        assert http.get("/health").status_code == 200
        for wrong in ({}, {"Authorization": "Bearer x" + token}, {"Authorization": token}):
            for method, path in [
                *[
                    ("POST", "/update_weights"),
                    ("POST", "/pause"),
                    ("POST", "/start_weight_update"),
                    ("POST", "/resume"),
                ],
                *[
                    ("POST", "/v1/completions"),
                    ("POST", "/collective_rpc"),
                    ("GET", "/weight_info"),
                    ("GET", "/metrics"),
                ],
            ]:
                answer = http.request(method, path, headers=wrong, json={})
                assert (answer.status_code, answer.json()["error"]["message"]) == (401, "wrong or missing token")
        assert http.get("/weight_info", headers={"Authorization": f"Bearer {token}"}).status_code == 200
    with pytest.raises(RunError, match=f"{url} refuses the token in rollout.server.token_file"):
        Client(url, "wrong").wait_ready(10)


def test_only_this_machine_can_connect(served):
    engine, _ = served
    port = int(engine.sampler.clients[0].url.rpartition(":")[2])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))
        address = probe.getsockname()[0]
    with pytest.raises(OSError), socket.create_connection((address, port), 5):
        pass


def test_an_aborted_response_is_an_error(served):
    engine, _ = served
    engine.push(4)
    client = engine.sampler.clients[0]
    caught = []

    def generate():
        try:
            engine.sampler.generate(PROMPTS[:1], 1, Sampling(340, 1.0), [5])
        except EngineDied as error:
            caught.append(str(error))

    stops, engine.sampler.shape.stops[:] = list(engine.sampler.shape.stops), [300]
    try:
        thread = threading.Thread(target=generate)
        thread.start()
        while thread.is_alive() and not client.call("POST", "/abort_requests", {})["aborted"]:
            time.sleep(0.02)
        thread.join()
    finally:
        engine.sampler.shape.stops[:] = stops
    assert len(caught) == 1 and "with the reason 'abort'" in caught[0]


def test_a_server_that_was_started_anew_is_noticed_and_gets_the_weights(served):
    """Its weights are those of its directory, not the policy's: sampling from it would be silently wrong."""
    engine, _ = served
    engine.push(5)
    client = engine.sampler.clients[1]
    client.call("POST", "/update_weight_version", {"new_version": "default"})
    with pytest.raises(EngineDied, match=rf"{client.url} holds the weights 'default' and not those of version 5"):
        engine.greedy(PROMPTS)
    engine.sampler.restart()
    engine.push(5)
    assert engine.disagreements(PROMPTS) == 0


def test_a_failed_update_is_not_taken_for_a_new_server(served):
    engine, _ = served
    sends = engine.sampler._update_all
    engine.sampler._update_all = lambda _, version: sends(
        [lambda c: c.update_weights({"path": "no such"})] * 2, version
    )
    try:
        with pytest.raises(EngineDied, match="update_weights"):
            engine.push(6)
    finally:
        del engine.sampler._update_all
    with pytest.raises(EngineDied, match="no complete set of weights"):
        engine.greedy(PROMPTS)
    with pytest.raises(EngineDied, match="failed an update and its weights are a mix: start it again"):
        engine.sampler.restart()


def test_ctrl_c_and_sigterm_end_a_server_and_leave_nothing(served):
    """Last of those with `served`: it ends both."""
    engine, started = served
    ports = [client.url.rpartition(":")[2] for client in engine.sampler.clients]
    for process, number, port in zip(started, (signal.SIGINT, signal.SIGTERM), ports, strict=True):
        assert processes(f"--rollout.server.port\0{port}")
        ended(process, number)
        deadline = time.monotonic() + 20
        while processes(f"--rollout.server.port\0{port}") and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not processes(f"--rollout.server.port\0{port}")
    assert not shared_memory()
    with pytest.raises(EngineDied, match=r"does not answer /weight_info: .*refused"):
        engine.sampler.restart = None
        engine.sampler._usable = True
        engine.greedy(PROMPTS)


def serve_fails(*words):
    done = subprocess.run(
        [sys.executable, "-m", "prime_trainer.cli", "serve", *words], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    return done.stderr


def test_what_serve_cannot_do_is_one_message(configure, tmp_path):
    cfg, token = configure("vllm-server"), ("--rollout.server.token_file", str(tmp_path / "token"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        message = serve_fails("--model.path", cfg.model.path, "--rollout.server.port", str(port), *token)
    assert (
        f"rollout.server.port = {port} cannot be used on rollout.server.host = '127.0.0.1': Address already" in message
    )
    assert "model.path must be a model directory" in serve_fails("--model.path", str(tmp_path / "none"), *token)
    assert not os.listdir(tmp_path)


def test_a_server_that_cannot_start_says_why(configure, tmp_path):
    cfg = configure("vllm-server", output=tmp_path / "run", rollout={"vllm": {"kv_cache_gib": 4000}})
    with pytest.raises(EngineDied, match=r"the server ended with status 1: .*[Mm]emory.*server\.log"):
        Engine(cfg)
    assert not processes(str(tmp_path)) and not shared_memory()


def test_urls_need_a_token_and_a_server(configure, tmp_path):
    server = {"urls": [f"http://127.0.0.1:{free_port()}"], "token_file": tmp_path / "token", "start_seconds": 0.5}
    cfg = configure("vllm-server", rollout={"server": server})
    with pytest.raises(
        ValueError, match=r"rollout\.server\.token_file: no such file: .*; prime-trainer serve makes one"
    ):
        Engine(cfg)
    (tmp_path / "token").write_text("secret")
    (tmp_path / "token").chmod(0o644)
    with pytest.raises(ValueError, match=r"token_file: others than its owner may read or write .*0644"):
        Engine(cfg)
    (tmp_path / "token").chmod(0o600)
    with pytest.raises(EngineDied, match=r"did not answer within rollout\.server\.start_seconds = 0\.5"):
        Engine(cfg)
