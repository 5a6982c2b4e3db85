"""A full disk and torn tails: what was whole stays byte for byte."""

import json
import subprocess
import sys
import textwrap

import pytest

from prime_trainer.run.jsonl import JsonlWriter, jsonl_rows, keep_rows, read_jsonl

ROW = {"id": "amc/0", "mode": "greedy", "index": 0, "response": "x" * 80}
LIMIT = 4096


def on_a_full_disk(code, path):
    """Runs `code` in a process in which no file may grow past `LIMIT` bytes; returns what it prints."""
    setup = f"""
        import resource, signal
        from pathlib import Path
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        path = Path({str(path)!r})
        def full():
            resource.setrlimit(resource.RLIMIT_FSIZE, ({LIMIT}, {LIMIT}))
    """
    source = textwrap.dedent(setup) + textwrap.dedent(code)
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def torn(tmp_path):
    """A file of 50 whole rows, more than the limit, and half a row; and its whole rows as bytes."""
    path = tmp_path / "amc.jsonl"
    rows = [{**ROW, "id": f"amc/{i}"} for i in range(50)]
    whole = "".join(json.dumps(row) + "\n" for row in rows).encode()
    assert len(whole) > LIMIT
    path.write_bytes(whole + b'{"id": "amc/50", "mo')
    return path, whole


APPEND = """
    from prime_trainer.run.jsonl import JsonlWriter
    full()
    with JsonlWriter(path) as file:
        try:
            file.append([{"id": "new"}])
        except OSError as error:
            print(error.strerror)
"""
RESPONSES = """
    from types import SimpleNamespace
    from prime_trainer.config.run_config import RunConfig
    from prime_trainer.data.problems import Problem
    from prime_trainer.evaluation import responses
    problems = [Problem(f"amc/{i}", [], None) for i in range(60)]
    responses.benchmarks.load = lambda *_: problems
    responses.benchmarks.wanted = lambda *_: ["amc"]
    responses.tokenizers.load_tokenizer = lambda *_: None
    responses.open_sampler = lambda *_: SimpleNamespace(close=lambda: None)
    responses._respond = lambda *_: [{"id": "amc/50", "mode": "greedy", "index": 0, "response": "x" * 80}]
    cfg = RunConfig(output=path.parent.parent)
    full()
    try:
        responses.run(cfg)
    except OSError as error:
        print(error.strerror)
"""
RESUME = """
    from prime_trainer.run.metrics import MetricsWriter
    full()
    try:
        MetricsWriter(path.parent, 40)
    except OSError as error:
        print(error.strerror)
"""


def test_a_failed_append_leaves_the_whole_rows(torn):
    path, whole = torn
    assert on_a_full_disk(APPEND, path) == "File too large\n"
    assert path.read_bytes() == whole


def test_an_append_that_fails_half_way_is_taken_back(tmp_path):
    path = tmp_path / "amc.jsonl"
    with JsonlWriter(path) as file:
        file.append([ROW] * 20)
    before = path.read_bytes()
    assert len(before) < LIMIT < len(before) + 20 * len(json.dumps(ROW))
    code = APPEND.replace('[{"id": "new"}]', f"[{ROW!r}] * 20")
    assert on_a_full_disk(code, path) == "File too large\n"
    assert path.read_bytes() == before


def test_generate_on_a_full_disk_keeps_every_finished_response(torn, tmp_path):
    path, whole = torn
    target = tmp_path / "bench" / "amc.jsonl"
    target.parent.mkdir()
    path.rename(target)
    assert on_a_full_disk(RESPONSES, target) == "File too large\n"
    assert target.read_bytes() == whole


def test_a_resume_on_a_full_disk_keeps_the_old_record(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"stage": "rl", "step": i, "note": "x" * 100} for i in range(50)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = path.read_bytes()
    assert on_a_full_disk(RESUME, path) == "File too large\n"
    assert path.read_bytes() == before and not list(tmp_path.glob("*.partial"))


def test_append_begins_after_the_last_whole_line(torn):
    path, whole = torn
    assert len(read_jsonl(path)) == 50  # the tail does not count before it is cut off either
    with JsonlWriter(path) as file:
        assert file.count == 50
        file.append([{"id": "new"}, {"id": "newer"}])
        assert file.count == 52
    assert path.read_bytes() == whole + b'{"id": "new"}\n{"id": "newer"}\n'


def test_nothing_is_written_of_rows_that_json_cannot_hold(tmp_path):
    path = tmp_path / "rows.jsonl"
    with JsonlWriter(path) as file:
        file.append([{"reward": 1.0}])
        with pytest.raises(ValueError, match="not JSON compliant"):
            file.append([{"reward": 2.0}, {"reward": float("nan")}])
    assert path.read_text() == '{"reward": 1.0}\n'


def test_a_file_is_replaced_only_where_rows_go(torn):
    path, whole = torn
    node = path.stat().st_ino
    keep_rows(path, lambda row: True)
    assert path.stat().st_ino == node and path.read_bytes().startswith(whole)
    keep_rows(path, lambda row: row["id"] in ("amc/3", "amc/7"))
    assert [row["id"] for row in read_jsonl(path)] == ["amc/3", "amc/7"]
    assert [row["id"] for _, row in jsonl_rows(path)] == ["amc/3", "amc/7"]


def test_places_in_messages(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n\n[2]\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 3: expected an object, got list"):
        list(jsonl_rows(path))
    path.write_text('{"a": 1}\n{"a"')
    with pytest.raises(ValueError, match=r"line 2: not JSON: .*the file was cut short"):
        list(jsonl_rows(path))
