"""What of a vLLM server needs no vLLM: its token, its port, its words, and what a client makes of bad answers."""

import asyncio
import json
import os
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from prime_trainer.cli import main
from prime_trainer.errors import RunError
from prime_trainer.rollout import EngineDied
from prime_trainer.rollout.vllm.client import Client
from prime_trainer.rollout.vllm.server import (
    TOKEN_VARIABLE,
    TokenGuard,
    arguments,
    check_port,
    make_token,
    read_token,
)


def asked(guard, path, *headers, kind="http"):
    """The status of a request: 200 where it reached the server behind the guard."""
    sent = []

    async def send(message):
        sent.append(message)

    asyncio.run(guard({"type": kind, "path": path, "headers": list(headers)}, None, send))
    return sent[0]["status"] if sent else None


@pytest.fixture
def guard(monkeypatch):
    async def behind(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    monkeypatch.setenv(TOKEN_VARIABLE, "secret")
    return TokenGuard(behind)


def test_the_guard_lets_health_and_the_token_through(guard):
    right = (b"authorization", b"Bearer secret")
    assert asked(guard, "/health") == 200
    assert asked(guard, "/update_weights", right) == asked(guard, "/v1/completions", right) == 200
    assert asked(guard, "/", kind="lifespan") == 200
    for wrong in [
        (),
        ((b"authorization", b"Bearer secre"),),
        ((b"authorization", b"secret"),),
        ((b"x", b"Bearer secret"),),
    ]:
        for path in ("/update_weights", "/v1/completions", "/health/", "/metrics"):
            assert asked(guard, path, *wrong) == 401
    assert asked(guard, "/v1/realtime", kind="websocket") is None


def test_a_token_is_made_once_and_for_its_owner(tmp_path):
    path = tmp_path / "runs" / "token"
    with pytest.raises(
        ValueError, match=r"rollout\.server\.token_file: no such file: .*; prime-trainer serve makes one"
    ):
        read_token(path)
    token = make_token(path)
    assert len(token) > 30 and make_token(path) == read_token(path) == token
    assert path.stat().st_mode & 0o777 == 0o600 and list(path.parent.iterdir()) == [path]
    path.write_text(" \n")
    with pytest.raises(ValueError, match="is empty"):
        read_token(path)


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o640, 0o604, 0o666])
def test_a_token_that_others_may_read_or_write_is_refused(tmp_path, mode):
    path = tmp_path / "token"
    make_token(path)
    path.chmod(mode)
    for read in (read_token, make_token):
        with pytest.raises(
            ValueError, match=rf"token_file: others than its owner may read or write .* \(mode {mode:04o}\)"
        ):
            read(path)
    path.chmod(0o400)
    assert read_token(path)


def test_a_token_of_somebody_else_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "token"
    make_token(path)
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 7)
    if path.stat().st_uid == 0:  # root may choose every token anyway
        os.chown(path, 12345, 12345)
    with pytest.raises(ValueError, match=r"token_file: .* belongs to user \d+, not to this one"):
        read_token(path)


def test_a_taken_port_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"rollout\.server\.port = {port} cannot be used on .* in use"):
            check_port("127.0.0.1", port)
    check_port("127.0.0.1", port)
    with pytest.raises(ValueError, match=r"rollout\.server\.host = '203\.0\.113\.1'"):
        check_port("203.0.113.1", 8000)


def test_the_servers_words(run_config):
    cfg = run_config(rollout={"engine": "vllm-server", "batch_size": 7})
    words = arguments(cfg.rollout, cfg.model, "model", "127.0.0.1", 81, dummy=True)
    given = dict(zip(words, [*words[1:], None], strict=True))
    assert given["--host"] == "127.0.0.1" and given["--port"] == "81" and given["--max-num-seqs"] == "7"
    assert given["--load-format"] == "dummy" and given["--logprobs-mode"] == "processed_logprobs"
    assert given["--generation-config"] == "vllm" and "--enforce-eager" in words
    assert given["--middleware"] == "prime_trainer.rollout.vllm.server.TokenGuard"
    assert json.loads(given["--weight-transfer-config"]) == {"backend": "file"}
    assert json.loads(given["--hf-overrides"]) == {"head_dtype": "float32"}
    rounded = cfg.model.model_copy(update={"logits_dtype": "input"})
    assert "--hf-overrides" not in arguments(cfg.rollout, rounded, "model", "127.0.0.1", 81, dummy=True)


def test_serve_without_vllm_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setattr("prime_trainer.rollout.vllm.server.vllm_installed", lambda: False)
    assert main(["serve"]) == 2
    assert "serve needs vLLM: pip install 'prime-process-rewards[vllm]'" in capsys.readouterr().err


@pytest.fixture
def server():
    """Answers by path; `/health` is refused for the first `server.ill` requests."""

    class Handler(BaseHTTPRequestHandler):
        answers = {  # noqa: RUF012
            "/weight_info": (200, {"weight_version": "default"}),
            "/refused": (401, {"error": {"message": "no"}}),
            "/broken": (500, {"error": {"message": "out of memory"}}),
            "/wrong": (400, {"error": {"message": "bad prompt"}}),
        }

        def do_GET(self):
            if self.path == "/health":
                self.server.ill -= 1
                status, body = (503 if self.server.ill >= 0 else 200), {}
            else:
                status, body = self.answers.get(self.path, (404, {}))
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        http.ill = 0
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield http
        http.shutdown()


def test_a_client_waits_until_the_server_is_well(server, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # must not stand between
    server.ill = 4
    client = Client(f"http://127.0.0.1:{server.server_port}/", "secret")
    client.wait_ready(20)
    assert server.ill == -1 and client.weight_version() == "default"
    server.ill = 10**6
    with pytest.raises(EngineDied, match=r"did not answer within rollout\.server\.start_seconds = 0\.3"):
        client.wait_ready(0.3)
    with pytest.raises(EngineDied, match="it is gone"):
        Client(client.url, "secret", lambda: "it is gone").wait_ready(20)
    client.close()


def test_a_client_says_what_it_was_answered(server):
    client = Client(f"http://127.0.0.1:{server.server_port}", "secret")
    for path, kind, message in [
        ("/refused", RunError, "refuses the token in rollout.server.token_file"),
        ("/broken", EngineDied, "/broken answered 500: out of memory"),
        ("/wrong", RunError, "/wrong answered 400: bad prompt"),
        ("/none", RunError, "has no /none: is it a server of prime-trainer serve"),
    ]:
        with pytest.raises(RunError, match=message) as caught:
            client.call("GET", path)
        assert caught.type is kind
    client.close()


def test_a_watch_ends_with_the_server(server):
    async def watch(client):
        await asyncio.wait_for(client.watch(), 60)

    client = Client(f"http://127.0.0.1:{server.server_port}", "secret")
    server.ill = 3
    with pytest.raises(EngineDied, match="failed 3 health checks in a row"):
        asyncio.run(watch(client))
    with pytest.raises(EngineDied, match="it is gone"):
        asyncio.run(watch(Client(client.url, "secret", lambda: "it is gone")))
    client.close()
