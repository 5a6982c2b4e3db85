"""Trackers get what metrics.jsonl gets, by their real packages in local mode; one that fails leaves the run alone."""

import json
import sys
import threading
import time

import pytest

from prime_trainer.config.sections import MetricsConfig
from prime_trainer.run import trackers
from prime_trainer.run.jsonl import read_jsonl
from prime_trainer.run.metrics import MetricsWriter
from prime_trainer.run.trackers import guarded

CONFIG = {"seed": 3, "policy": {"lr": 1e-6}}
MISSING = "{} is not installed: pip install {}"


def tracked(folder, name, resume_step=None, **settings):
    return MetricsWriter(
        folder, resume_step, tracking=MetricsConfig(trackers=[name], local=True, **settings), config=CONFIG
    )


def train(folder, name, between=lambda: None):
    """A run of three steps, which goes on from its second."""
    writer = tracked(folder, name)
    for step in (1, 2, 3):
        writer.log("rl", step, {"reward": step / 4, "bad": float("nan")})
    writer.log("eval", 3, {"greedy": 0.5})
    writer.close()
    between()
    writer = tracked(folder, name, resume_step=2)
    writer.log("rl", 3, {"reward": 0.25})
    writer.close()


def test_mlflow(tmp_path, capsys):
    tracking = pytest.importorskip("mlflow.tracking", reason=MISSING.format("mlflow", "mlflow-skinny"))
    train(tmp_path / "one", "mlflow")
    assert "switched off" not in capsys.readouterr().err
    client = tracking.MlflowClient(tracking_uri=(tmp_path / "one" / "mlruns").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("prime-trainer").experiment_id])
    assert run.info.run_name == "one" and run.info.status == "FINISHED"
    assert run.data.params == {"seed": "3", "policy.lr": "1e-06"}
    history = client.get_metric_history(run.info.run_id, "rl/reward")
    assert sorted((each.step, each.value) for each in history) == [(1, 0.25), (2, 0.5), (3, 0.25), (3, 0.75)]
    assert run.data.metrics["eval/greedy"] == 0.5 and "rl/bad" not in run.data.metrics


def offline_records(path):
    """Records of a W&B offline file: a LevelDB log of blocks of 32 KiB after a header of 7 bytes."""
    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or the end of one
            yield parts
            parts = b""


def test_wandb(tmp_path, capsys):
    pytest.importorskip("wandb", reason=MISSING.format("wandb", "wandb"))
    from wandb.proto import wandb_internal_pb2

    train(tmp_path / "one", "wandb", lambda: time.sleep(1.1))  # its folders have names of a second
    assert "switched off" not in capsys.readouterr().err
    records, ends = [], time.monotonic() + 20
    while sum(each.HasField("exit") for each in records) < 2 and time.monotonic() < ends:
        time.sleep(0.05)  # its service goes on writing for a moment
        records = []
        for path in sorted((tmp_path / "one" / "wandb").glob("offline-run-*/*.wandb")):
            records += [wandb_internal_pb2.Record.FromString(data) for data in offline_records(path)]
    history = [each.history.item for each in records if each.HasField("history")]
    rows = [{"/".join(part.nested_key) or part.key: json.loads(part.value_json) for part in row} for row in history]
    runs = [each.run for each in records if each.HasField("run")]
    config = {part.key: json.loads(part.value_json) for part in runs[0].config.update}
    found = [(row["rl/step"], row["rl/reward"]) for row in rows if "rl/step" in row]
    assert found == [(1, 0.25), (2, 0.5), (3, 0.75), (3, 0.25)]
    assert [row["eval/greedy"] for row in rows if "eval/step" in row] == [0.5]
    assert (runs[0].project, runs[0].display_name) == ("prime-trainer", "one") and config["policy"] == {"lr": 1e-6}
    assert len({run.run_id for run in runs}) == 1 < len(runs)  # the resumed one is the same


def test_trackio(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio", reason=MISSING.format("trackio", "trackio"))
    monkeypatch.delenv("TRACKIO_SPACE_ID", raising=False)
    train(tmp_path / "one", "trackio")
    assert "switched off" not in capsys.readouterr().err
    (run,) = trackio.Api().runs("prime-trainer")
    assert run.name.startswith("one-")
    rows = trackio.sqlite_storage.SQLiteStorage.get_logs("prime-trainer", run.name)
    found = sorted((row["step"], row["rl/reward"]) for row in rows if "rl/reward" in row)
    assert found == [(1, 0.25), (2, 0.5), (3, 0.25), (3, 0.75)]


class Failing:
    def __init__(self, where):
        self.where = where
        self.seen = []
        if where == "make":
            raise SystemExit("no key")

    def log(self, stage, step, values):
        self.seen.append(step)
        if self.where == "log":
            raise ConnectionError("no\nserver")

    def close(self):
        if self.where == "close":
            raise OSError("no disk")


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
@pytest.mark.parametrize(
    ("where", "said"),
    [("log", "ConnectionError: no server"), ("close", "OSError: no disk")],
)
def test_a_tracker_that_fails_is_switched_off_with_one_message(tmp_path, capsys, monkeypatch, name, where, said):
    made = []
    monkeypatch.setattr(trackers, "_make", lambda name, run: made.append(Failing(where)) or made[0])
    writer = tracked(tmp_path, name)
    for step in (1, 2, 3):
        writer.log("rl", step, {"reward": 1.0})
    writer.close()
    assert made[0].seen == ([1] if where == "log" else [1, 2, 3])
    (line,) = capsys.readouterr().err.splitlines()
    off = "is switched off, the run goes on and metrics.jsonl has every value"
    assert line == f"metrics.trackers: {name} {off} ({said})"
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 3


def test_a_tracker_that_ends_its_process_does_not_end_the_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(trackers, "_make", lambda name, run: Failing("make"))
    writer = tracked(tmp_path, "mlflow")
    writer.log("rl", 1, {"reward": 1.0})
    writer.close()
    assert "mlflow is switched off" in capsys.readouterr().err


def test_a_missing_package_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    tracked(tmp_path, "wandb").close()
    assert "(the package 'wandb' is missing: pip install wandb)" in capsys.readouterr().err


def test_steps_do_not_wait_for_a_tracker_that_hangs(tmp_path, capsys, monkeypatch):
    hold = threading.Event()

    class Hanging(Failing):
        def log(self, stage, step, values):
            hold.wait()

    monkeypatch.setattr(trackers, "_make", lambda name, run: Hanging(""))
    monkeypatch.setattr(guarded, "CLOSE_SECONDS", 0.1)
    writer = tracked(tmp_path, "wandb")
    for step in range(5):
        writer.log("rl", step, {"reward": 1.0})
    writer.close()
    hold.set()
    assert "wandb has not finished after 0.1 s" in capsys.readouterr().err
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 5


def test_local_trackio_refuses_another_place(tmp_path, capsys, monkeypatch):
    pytest.importorskip("trackio", reason=MISSING.format("trackio", "trackio"))
    monkeypatch.setenv("TRACKIO_SPACE_ID", "someone/space")
    tracked(tmp_path, "trackio").close()
    assert "metrics.local = true sends nothing anywhere, but TRACKIO_SPACE_ID is set" in capsys.readouterr().err
