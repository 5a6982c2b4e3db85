import json

import pytest

from prime_trainer.run.jsonl import read_jsonl
from prime_trainer.run.metrics import MetricsWriter


def test_log_and_samples_are_readable_at_once(tmp_path):
    writer = MetricsWriter(tmp_path, None)
    writer.log("rl", 1, {"reward": 0.5, "time/total": 2})
    writer.samples(1, [{"prompt": "p", "process_rewards": [0.5, float("nan")]}])
    (row,) = read_jsonl(tmp_path / "metrics.jsonl")
    assert row.pop("time") > 0
    assert row == {"stage": "rl", "step": 1, "reward": 0.5, "time/total": 2.0}
    assert read_jsonl(tmp_path / "samples.jsonl") == [{"step": 1, "prompt": "p", "process_rewards": [0.5, None]}]
    writer.close()


def test_nan_and_infinity_become_null(tmp_path):
    writer = MetricsWriter(tmp_path, None)
    writer.log("sft", 3, {"loss": float("nan"), "lr": float("inf"), "tokens": 7})
    writer.close()
    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert (row["loss"], row["lr"], row["tokens"]) == (None, None, 7.0)


def test_resume_drops_later_lines_of_the_resumed_stages_alone(tmp_path):
    writer = MetricsWriter(tmp_path, None)
    writer.log("sft", 9, {"loss": 1.0})
    for step in range(1, 6):
        writer.log("rl", step, {"reward": step})
        writer.samples(step, [{"prompt": str(step)}])
    writer.log("eval", 2, {"greedy": 0.2})
    writer.log("eval", 4, {"greedy": 0.4})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "rl", "st')  # the crash
    resumed = MetricsWriter(tmp_path, 3)
    resumed.log("rl", 4, {"reward": 40})
    resumed.close()
    rows = [(row["stage"], row["step"]) for row in read_jsonl(tmp_path / "metrics.jsonl")]
    assert rows == [("sft", 9), ("rl", 1), ("rl", 2), ("rl", 3), ("eval", 2), ("rl", 4)]
    assert [row["step"] for row in read_jsonl(tmp_path / "samples.jsonl")] == [1, 2, 3]
    assert not list(tmp_path.glob("*.partial"))


def test_a_bad_line_in_the_middle_is_an_error_with_its_place(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"stage": "rl", "step": 1}\nnonsense\n{"stage": "rl", "step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: not JSON"):
        MetricsWriter(tmp_path, 1)


def test_tensorboard_has_each_step_once_after_a_resume(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = MetricsWriter(tmp_path, None)
    for step in range(1, 5):
        writer.log("rl", step, {"reward": step})
    writer.close()
    resumed = MetricsWriter(tmp_path, 2)
    resumed.log("rl", 3, {"reward": 30})
    resumed.close()
    board = EventAccumulator(str(tmp_path / "tensorboard" / "rl"))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("rl/reward")] == [(1, 1.0), (2, 2.0), (3, 30.0)]
