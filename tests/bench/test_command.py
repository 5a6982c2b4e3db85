"""`python -m prime_kernels bench` at its smallest sizes, its verdicts, and what it says of what fails."""

import json
from types import SimpleNamespace

import pytest
import torch

from prime_kernels import __main__ as package
from prime_kernels import _tuning, available_backends
from prime_kernels._bench import cases, formulas, report, run, tiles, timing
from prime_kernels._bench.report import NO_TIME, Row
from prime_kernels._dispatch import OPERATIONS
from prime_kernels.ops import _tiled_head

SMALL = ["--device", "cpu", "--tokens", "8", "16", "--vocabulary", "300", "--width", "8"]


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """One round of everything, of functions that are not compiled, without other packages."""
    monkeypatch.setattr(timing, "MOST_ROUNDS", 1)
    monkeypatch.setattr(timing, "SHORTEST_ROUND", 0.0)
    monkeypatch.setattr(torch, "compile", lambda function: function)
    monkeypatch.setattr(formulas, "PEERS", {})


@pytest.fixture
def bench(tmp_path, capsys):
    """`bench("--ops", ..)`: exit status, standard output, standard error, the JSON."""

    def run(*words):
        status = package.main(["bench", *SMALL, "--output", str(tmp_path / "out"), *words])
        said = capsys.readouterr()
        return status, said.out, said.err, json.loads((tmp_path / "out" / "bench.json").read_text())

    return run


@pytest.fixture
def ours():
    if available_backends()["cpu"] is not None:
        pytest.skip("the extension is not built")


def test_every_operation(bench, ours, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install '.[train]'")
    status, said, progress, results = bench("--minutes", "10")
    assert status == 0, said
    rows = results["rows"]
    measured = {(row["op"], row["level"], row["way"]) for row in rows if row["seconds"]}
    for op in OPERATIONS:
        assert {(op, level, way) for level in (0, 1) for way in ("eager", "cpu")} <= measured, said
        assert (op, 1, "torch.compile") in measured
        assert f"\n{op}, " in said and f"{op}, " in progress
    for row in rows:
        assert row["failure"] is None and row["of_ceiling"] > 0 and row["rounds"] == 1
        assert (row["error"] is None) == (row["level"] > 0)
        # 16-bit gradients of plain PyTorch are the least exact.
        assert row["level"] > 0 or row["error"] < 0.05, row
        if row["way"] == "cpu" and row["which"] == "forward" and not row["op"].startswith("linear"):
            assert row["level"] > 0 or row["error"] < 1e-5, row
    assert results["copy_bytes_per_second"] > 0 and results["product_flops_per_second"] > 0
    assert set(results["verdicts"]) == {f"{row['op']}, {row['which']}" for row in rows}
    folder = tmp_path / "out"
    assert (folder / "bench.png").read_bytes().startswith(b"\x89PNG")
    tuning = _tuning.read(str(folder / "tuning.json"))
    assert tuning.backends == dict.fromkeys(OPERATIONS, "cpu")
    assert (tuning.device, tuning.versions) == (_tuning.device_name("cpu"), _tuning.versions())


def test_calls_on_a_cpu_are_timed_one_by_one(monkeypatch):
    """Of twenty short calls one waits for another process: no round of a GPU's length would be without."""
    clock, calls = [0.0], [0]

    def call():
        calls[0] += 1
        clock[0] += 0.02 if calls[0] % 20 == 0 else 1e-4

    monkeypatch.setattr(timing, "MOST_ROUNDS", 9)
    monkeypatch.setattr(timing, "SHORTEST_ROUND", 2e-3)
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    found = timing.timed(call, torch.device("cpu"), 1.0)
    assert found.median == pytest.approx(1e-4) and found.rounds == 180


def test_without_time_no_inputs_are_made(bench, monkeypatch):
    """Of the smallest sizes only, which say what there would be; and one line of progress for all of it."""
    made, real = [], run.cases
    monkeypatch.setattr(run, "cases", lambda sizes, *rest: made.append(sizes) or real(sizes, *rest))
    _, _, progress, results = bench("--minutes", "1e-4", "--ops", "log_probs", "segment_sum")
    assert {sizes.tokens for sizes in made} == {8}
    rows = {(row["op"], row["which"], row["level"], row["way"]) for row in results["rows"]}
    ways = {way for *_, way in rows}
    assert "torch.compile" in ways and "eager" in ways
    passes = [("log_probs", "forward"), ("log_probs", "backward"), ("segment_sum", "forward")]
    assert rows == {(*each, level, way) for each in passes for level in (0, 1) for way in ways - {"torch.compile"}} | {
        (*each, 0, "torch.compile") for each in passes
    }
    assert progress.count("no time was left") == 1


def test_without_time_it_says_so(bench):
    status, said, _, results = bench("--minutes", "1e-4", "--ops", "log_probs", "segment_sum")
    assert status == 0
    assert {row["failure"] for row in results["rows"] if row["seconds"] is None} == {NO_TIME}
    assert "Not measured, as no time was left: " in said and "2 of torch.compile" not in said


def test_errors_in_their_own_words(bench, ours, monkeypatch):
    """Of another package and of a compiler they end nothing; one of ours is the exit status."""

    def broken(*arguments, backend=None):
        if backend != "eager":
            raise RuntimeError("no such instruction\nmore")
        return real(*arguments, backend=backend)

    real = cases.pk.segment_sum
    monkeypatch.setattr(formulas, "log_probs", broken)
    status, said, _, results = bench("--minutes", "10", "--ops", "log_probs")
    assert status == 0 and "RuntimeError: no such instruction" in said
    assert (
        "cpu alone at 16 x 300 (eager: RuntimeError: no such instruction" in results["verdicts"]["log_probs, forward"]
    )
    monkeypatch.setattr(cases.pk, "segment_sum", broken)
    assert bench("--minutes", "10", "--ops", "segment_sum")[0] == 1


def test_out_of_memory_is_a_result(bench, monkeypatch):
    def too_large(*arguments):
        raise torch.OutOfMemoryError("Tried to allocate 80 GiB")

    monkeypatch.setattr(formulas, "log_probs", too_large)
    status, _, _, results = bench("--minutes", "10", "--ops", "log_probs")
    assert status == 0 and {row["failure"] for row in results["rows"] if row["way"] == "eager"} == {"out of memory"}


def test_a_wrong_kernel_has_a_large_error(bench, ours, monkeypatch):
    real = cases.pk.segment_sum
    monkeypatch.setattr(
        cases.pk, "segment_sum", lambda *a, backend=None: real(*a, backend=backend) * (1.0 + 0.01 * (backend == "cpu"))
    )
    rows = bench("--minutes", "10", "--ops", "segment_sum")[3]["rows"]
    errors = {row["way"]: row["error"] for row in rows if row["level"] == 0}
    assert errors["eager"] < 1e-6 and errors["cpu"] == pytest.approx(0.01, rel=0.01)


def test_no_picture_without_matplotlib(bench, monkeypatch, tmp_path):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said = bench("--minutes", "10", "--ops", "segment_sum")[1]
    assert "no picture: matplotlib cannot be imported" in said and not (tmp_path / "out" / "bench.png").exists()


WRONG = [
    (["--minutes", "0"], "--minutes: expected a positive number, got 0.0"),
    (["--tokens", "0"], "--tokens: expected positive numbers, got 0"),
    (["--width", "-1"], "--width: expected a positive number, got -1"),
    (["--ops", "softmax"], "invalid choice: 'softmax'"),
]


@pytest.mark.parametrize("words, message", WRONG, ids=[words[0] for words, _ in WRONG])
def test_wrong_options(words, message, capsys, tmp_path):
    with pytest.raises(SystemExit) as ended:
        package.main(["bench", "--output", str(tmp_path), *words])
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_a_folder_that_cannot_be(capsys, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as ended:
        package.main(["bench", "--output", str(tmp_path / "file" / "out")])
    assert ended.value.code == 2
    assert "--output: expected a folder that can be written, got [Errno 20]" in capsys.readouterr().err


def test_a_tuning_in_use_is_not_measured(bench, monkeypatch, tmp_path):
    """Nor read: it may be broken, and the command is what writes another."""
    (tmp_path / "torn.json").write_text("{")
    monkeypatch.setenv(_tuning.ENVIRONMENT_VARIABLE, str(tmp_path / "torn.json"))
    monkeypatch.setattr(_tiled_head, "HEAD_KERNELS", frozenset())  # which have no tiles to look up
    status, _, progress, results = bench("--minutes", "10", "--ops", "linear_nll")
    assert status == 0 and not any(row["failure"] for row in results["rows"])
    assert "PRIME_KERNELS_TUNING is not used here" in progress


@pytest.mark.parametrize("kept_is_faster, by_default", [(True, True), (True, False), (False, True), (False, False)])
def test_whether_logits_are_kept_is_measured(monkeypatch, kept_is_faster, by_default):
    """Only another answer than the one in use is written down."""
    sizes = cases.Sizes(16, 300, 8, 64)
    all_bytes = 4 * 16 * 300
    monkeypatch.setattr(_tiled_head, "HEAD_KERNELS", frozenset())
    monkeypatch.setattr(_tiled_head, "KEPT_BYTES", {"cpu": all_bytes if by_default else all_bytes - 1})

    def timed(call, *options):
        call()
        kept = _tiled_head.kept_bytes("cpu") >= all_bytes
        return timing.Timing(1.0 if kept == kept_is_faster else 2.0, 1)

    monkeypatch.setattr(timing, "timed", timed)
    found = tiles.best(torch.device("cpu"), torch.float32, sizes, 100.0)
    want = {} if kept_is_faster == by_default else {"kept_bytes": all_bytes if kept_is_faster else 1}
    assert {kind: size for kind, size in found.items() if kind == "kept_bytes"} == want


def test_sizes_that_fail_or_give_other_results_are_not_chosen(monkeypatch, capsys):
    def timed(call, *options):
        return timing.Timing(1.0 / _tuning.tile("fused_bytes", "cpu", 1), 1)  # the larger the faster

    plain = tiles.pk.linear_nll
    monkeypatch.setattr(_tiled_head, "HEAD_KERNELS", frozenset())
    monkeypatch.setattr(tiles, "FACTORS", (1, 2))
    monkeypatch.setattr(_tiled_head, "FUSED_BYTES", 2000)
    monkeypatch.setattr(timing, "timed", timed)
    find = (torch.device("cpu"), torch.float32, cases.Sizes(16, 300, 8, 64), 100.0)
    assert tiles.best(*find)["fused_bytes"] == 4000

    def wrong(*columns):
        return plain(*columns) * (1 + (_tuning.tile("fused_bytes", "cpu", 1) == 4000))

    monkeypatch.setattr(tiles.pk, "linear_nll", wrong)
    assert "fused_bytes" not in tiles.best(*find)
    assert "fused_bytes 4000: AssertionError" in capsys.readouterr().err


@pytest.mark.parametrize("right", [True, False])
def test_a_fused_product_is_chosen_by_both_ways(monkeypatch, capsys, right):
    """By the time of a pass without gradients and one with them, whose values count, too."""
    plain, seen = tiles.pk.linear_log_probs, []

    def log_probs(hidden, weight, ids):
        hidden.register_hook(lambda grad: seen.append(grad) or (grad if right or not columns() else 2 * grad))
        return plain(hidden, weight, ids, backend="eager")

    def columns():
        return _tuning.tile("fused_columns", "cpu", 0)

    def timed(call, *options):
        seen.clear()
        call()
        return timing.Timing(1.0 / (1 + columns() * len(seen)), 1)  # the more columns the faster, backward alone

    monkeypatch.setattr(_tiled_head, "HEAD_KERNELS", frozenset())
    monkeypatch.setattr(tiles, "backends", lambda device: ["triton"])
    monkeypatch.setattr(tiles.pk, "linear_log_probs", log_probs)
    monkeypatch.setattr(tiles.pk, "linear_nll", lambda *of: plain(*of, backend="eager").sum())
    monkeypatch.setattr(timing, "timed", timed)
    found = tiles.best(torch.device("cpu"), torch.float32, cases.Sizes(16, 300, 8, 64), 100.0)
    assert found.get("fused_columns") == (256 if right else None)
    assert ("fused_columns 128: AssertionError" in capsys.readouterr().err) != right


def test_an_unknown_command(capsys):
    assert package.main(["benchmark"]) == 2
    assert "unknown command 'benchmark'" in capsys.readouterr().err


def rows(*levels, op="log_probs"):
    """Rows of one pass, a table of seconds for each size."""
    return [
        Row(op, "forward", f"size {level}", level, way, way in ("cpu", "triton", "cuda"), seconds)
        for level, ways in enumerate(levels)
        for way, seconds in ways.items()
    ]


VERDICTS = [
    ([{"eager": 3.0, "torch.compile": 2.0, "cuda": 1.5, "triton": 1.0}],
     "triton is the fastest of 4 tried, 2.00 times as fast as torch.compile at size 0"),
    ([{"eager": 1.0, "triton": 2.5}], "eager is faster: 2.50 times as fast as triton at size 0"),
    ([{"eager": 1.0, "triton": 1.01}], "triton and eager are level at size 0"),
    ([{"eager": 1.0, "cpu": 2.0}, {"eager": 9.0, "cpu": 3.0}],
     "cpu is the fastest of 2 tried, 3.00 times as fast as eager at size 1"),
    ([{"eager": 1.0, "cpu": 2.0}, {"eager": None, "cpu": 3.0}],
     "eager is faster: 2.00 times as fast as cpu at size 0"),
    ([{"eager": 1.0}], "not measured"),
]  # fmt: skip


@pytest.mark.parametrize("levels, verdict", VERDICTS)
def test_verdicts(levels, verdict):
    assert report.verdicts(rows(*levels)) == {"log_probs, forward": verdict}


def test_backends_are_chosen_over_all_sizes_at_which_both_ran():
    levels = [{"triton": 1.0, "cuda": 2.0}, {"triton": 8.0, "cuda": 3.0}, {"triton": 0.1, "cuda": None}]
    assert report.best_backends(rows(*levels)) == {"log_probs": "cuda"}
    assert report.best_backends(rows({"eager": 1.0})) == {}


def test_the_table_is_relative_to_eager_of_the_same_size():
    head, *lines = report.table(rows({"eager": 2.0, "cpu": 0.5}, {"eager": None, "cpu": 1.0})).splitlines()
    assert head.split()[:4] == ["operation", "size", "way", "ms"]
    assert lines[1].split()[-3:] == ["cpu", "500", "4.00"] and lines[3].split()[-2:] == ["cpu", "1e+03"]
