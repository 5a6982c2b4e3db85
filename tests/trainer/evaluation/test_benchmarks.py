"""The loaders on small files of every form, and on the real ones; then generate and eval with the tiny model."""

import dataclasses
import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prime_trainer.cli import main
from prime_trainer.config.sections import BenchConfig
from prime_trainer.evaluation import benchmark_table, benchmarks, responses
from prime_trainer.verify.answers import MathAnswer

SHARED = Path(os.environ.get("PRIME_KERNELS_SHARED", Path(__file__).resolve().parents[4] / "shared"))
AMC = [{"id": i, "question": f"What is {i}+1?", "answer": float(i + 1)} for i in range(3)]


@pytest.fixture
def sized(monkeypatch):
    """`sized(amc=3)`: the benchmark has so many items."""

    def resize(**items):
        for name, count in items.items():
            changed = dataclasses.replace(benchmarks.BENCHMARKS[name], items=count)
            monkeypatch.setitem(benchmarks.BENCHMARKS, name, changed)

    return resize


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(name, row, sized, tmp_path):
    """The one problem that a row becomes."""
    sized(**{name: 1})
    path = write(tmp_path / "one.jsonl", [row])
    (problem,) = benchmarks.load(name, BenchConfig(paths={name: path}))
    return problem


def test_real_files_have_their_items():
    if not (SHARED / "data").is_dir():
        pytest.skip(f"no {SHARED / 'data'}: the benchmark files are not here")
    cfg = BenchConfig(data=SHARED / "data")
    problems = {name: benchmarks.load(name, cfg) for name in benchmarks.BENCHMARKS}
    assert {name: len(found) for name, found in problems.items()} == {
        "aime24": 30, "math500": 500, "amc": 83, "minerva": 272, "olympiad": 675, "humaneval": 164, "mbpp": 399,
    }  # fmt: skip
    references = {name: found[0].reference for name, found in problems.items()}
    assert references["amc"] == "142" and references["minerva"] == "1.6" and references["olympiad"] == "2"
    assert {p.answer.tolerance for p in problems["olympiad"]} == {None, 0.1}
    assert sum(p.answer.tolerance is not None for p in problems["olympiad"]) == 1
    assert problems["math500"][0].messages[0]["content"].endswith("LaTex format: \\boxed{Your answer}")
    assert problems["mbpp"][0].answer.names == ["similar_elements"]
    assert [p.id for p in benchmarks.load("amc", BenchConfig(data=SHARED / "data", limit=2))] == ["amc/0", "amc/1"]


def test_rows_in_the_forms_that_are_around(sized, tmp_path):
    problem = read("minerva", {"problem": "p", "solution": "so \\boxed{1} \\boxed{\\frac{1}{2}}"}, sized, tmp_path)
    assert problem.reference == "\\frac{1}{2}"
    assert read("aime24", {"Problem": "p", "Answer": 7, "ID": "2024-I-1"}, sized, tmp_path).reference == "7"
    row = {"question": "q", "context": "c", "final_answer": ["4.2"], "error": "1e-1"}
    problem = read("olympiad", row, sized, tmp_path)
    assert problem.answer == MathAnswer("4.2", tolerance=0.1)
    assert problem.messages[0]["content"].startswith("c\nq\n\nPresent")
    row = {
        "text": "Write f.", "code": "import math\ndef g(x):\n    return x\ndef f(x):\n    return g(x)",
        "test_list": ["assert math.isclose(f(1), 1)"], "test_setup_code": "import re",
    }  # fmt: skip
    problem = read("mbpp", row, sized, tmp_path)
    assert problem.answer.names == ["f"] and problem.answer.setup == "import re\nimport math"
    assert problem.messages[0]["content"].startswith("Write f.\nassert math.isclose(f(1), 1)\n\nWrite Python code")
    row = {"prompt": "def f(x):\n", "entry_point": "f", "test": "def check(c):\n    assert c(1) == 1"}
    assert read("humaneval", row, sized, tmp_path).answer.tests == [row["test"] + "\ncheck(f)\n"]


def test_folders_of_datasets_and_compressed_files(sized, tmp_path):
    sized(amc=3, humaneval=1)
    hub = tmp_path / "hub" / "data"
    hub.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(AMC[:2]), hub / "test-00000-of-00002.parquet")
    pq.write_table(pa.Table.from_pylist(AMC[2:]), hub / "test-00001-of-00002.parquet")
    pq.write_table(pa.Table.from_pylist(AMC * 9), hub / "train-00000-of-00001.parquet")
    problems = benchmarks.load("amc", BenchConfig(paths={"amc": tmp_path / "hub"}))
    assert [p.reference for p in problems] == ["1", "2", "3"]
    row = {"prompt": "def f():\n", "entry_point": "f", "test": "def check(c):\n    pass"}
    with gzip.open(tmp_path / "HumanEval.jsonl.gz", "wt") as file:
        file.write(json.dumps(row) + "\n")
    assert len(benchmarks.load("humaneval", BenchConfig(data=tmp_path))) == 1
    system = BenchConfig(paths={"amc": write(tmp_path / "a.jsonl", AMC)}, system_prompt="S")
    assert benchmarks.load("amc", system)[0].messages[0] == {"role": "system", "content": "S"}


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("amc", {"question": "q"}, r"line 1: a row must have answer, got question"),
        ("amc", {"answer": 1}, r"line 1: a row must have question or problem, got answer"),
        ("amc", {"question": " ", "answer": 1}, r"line 1: question or problem must be text, got ' '"),
        ("amc", {"question": "q", "answer": True}, r"line 1: answer must hold the reference answer .* got True"),
        ("minerva", {"problem": "p", "solution": "none"}, r"line 1: solution must end with"),
        ("olympiad", {"question": "q", "final_answer": ["1", "2"]}, r"final_answer must be a list of one answer"),
        ("olympiad", {"question": "q", "final_answer": ["1"], "error": "x"}, r"error must be a number, got 'x'"),
        ("humaneval", {"prompt": "p", "entry_point": "f"}, r"a row must have test, got prompt, entry_point"),
        ("mbpp", {"prompt": "p", "code": "x = 1", "test_list": ["assert 1"]}, r"test_list must call a function"),
        ("mbpp", {"prompt": "p", "code": "def f(", "test_list": ["assert f"]}, r"must be Python: "),
        ("mbpp", {"prompt": "p", "code": "x", "test_list": []}, r"test_list must be a list of assertions, got \[\]"),
    ],
)
def test_bad_rows_are_named(name, row, message, sized, tmp_path):
    with pytest.raises(ValueError, match=message):
        read(name, row, sized, tmp_path)


def test_bad_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"one\.jsonl: AMC has 83 items, found 3"):
        benchmarks.load("amc", BenchConfig(paths={"amc": write(tmp_path / "one.jsonl", AMC)}))
    with pytest.raises(ValueError, match=r"no file of AMC: set bench\.data .* looked for .*amc\.jsonl"):
        benchmarks.load("amc", BenchConfig(data=tmp_path))
    with pytest.raises(ValueError, match=r"has no parquet, JSONL or JSON files"):
        (tmp_path / "amc").mkdir()
        benchmarks.load("amc", BenchConfig(data=tmp_path))
    with pytest.raises(ValueError, match=r"notes\.txt: a benchmark file must end with \.parquet"):
        (tmp_path / "notes.txt").write_text("x")
        benchmarks.load("amc", BenchConfig(paths={"amc": tmp_path / "notes.txt"}))


def test_generate_goes_on_where_it_stopped_and_refuses_another_way(run_config, sized, tmp_path, monkeypatch):
    sized(amc=3)
    bench = {"paths": {"amc": write(tmp_path / "amc.jsonl", AMC)}, "tasks": ["amc"], "max_new_tokens": 5, "samples": 2}
    cfg = run_config(bench=bench, eval={"batch_size": 2})
    path = responses.run(cfg) / "amc.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted((r["id"], r["mode"], r["index"]) for r in rows) == sorted(
        (f"amc/{i}", mode, k) for i in range(3) for mode, k in (("greedy", 0), ("sampled", 0), ("sampled", 1))
    )
    assert all(1 <= r["tokens"] <= 5 and r["finish_reason"] in ("stop", "length") for r in rows)
    # A crash in the middle of a line: the same responses come again, and nothing that was whole is generated twice.
    path.write_text("".join(json.dumps(r) + "\n" for r in rows[:-2]) + json.dumps(rows[-2])[:20])
    responses.run(cfg)
    again = {(r["id"], r["mode"], r["index"]): r["response"] for r in map(json.loads, path.read_text().splitlines())}
    assert again == {(r["id"], r["mode"], r["index"]): r["response"] for r in rows}

    def never(*_):
        raise AssertionError("no model is needed")

    monkeypatch.setattr(responses, "open_sampler", never)
    responses.run(cfg)
    with pytest.raises(ValueError, match=r"made in another way \(bench\.max_new_tokens was 5, is 6\): set another"):
        responses.run(run_config(bench={**bench, "max_new_tokens": 6}))


def test_eval_makes_the_cards_table_from_responses(run_config, sized, tmp_path, capsys):
    sized(amc=3, mbpp=1)
    mbpp = {"prompt": "Write f.", "code": "def f(x):\n    return x", "test_list": ["assert f(1) == 1"]}
    paths = {"amc": write(tmp_path / "amc.jsonl", AMC), "mbpp": write(tmp_path / "mbpp.jsonl", [mbpp])}
    cfg = run_config(bench={"paths": paths, "tasks": ["mbpp", "amc"], "samples": 4})
    target = responses.folder(cfg)
    answers = {  # greedy, then four samples
        "amc/0": ["\\boxed{1}", "\\boxed{1}", "\\boxed{2}", "\\boxed{1.0}", "none"],
        "amc/1": ["\\boxed{3}", "\\boxed{1/2}", "\\boxed{0.5}", "\\boxed{2}", "none"],
        "amc/2": ["none", "none", "none", "none", "none"],
        "mbpp/0": ["```python\ndef f(x):\n    return x\n```", "none", "```\ndef f(x):\n    return 2\n```", "", ""],
    }
    rows = [
        {"id": i, "mode": "greedy" if k == 0 else "sampled", "index": max(0, k - 1), "response": text, "tokens": 4,
         "finish_reason": "stop"}
        for i, texts in answers.items()
        for k, text in enumerate(texts)
    ]  # fmt: skip
    for name in ("amc", "mbpp"):
        write(target / f"{name}.jsonl", [r for r in rows if r["id"].startswith(name)])
    table = benchmark_table.run(cfg).read_text()
    figures = json.loads((target / "summary.json").read_text())
    assert list(figures) == ["amc", "mbpp"]
    amc, code = figures["amc"], figures["mbpp"]
    assert amc["greedy"] == pytest.approx([1 / 3, 0.0615, 0.7923], abs=1e-3)  # Wilson
    assert amc["avg@4"][0] == pytest.approx((2 / 4 + 1 / 4 + 0) / 3)
    assert amc["maj@4"][0] == pytest.approx(1 / 3)  # amc/1: one half, written twice, outvotes the right 2
    assert amc["pass@4"][0] == pytest.approx(2 / 3) and code["pass@4"][0] == 0.0
    assert code["greedy"][0] == 1.0 and "maj@4" not in code
    assert amc["items"] == 3 and amc["answered"] == pytest.approx(8 / 15) and amc["failures"] == 0
    scored = [json.loads(line) for line in (target / "amc.scored.jsonl").read_text().splitlines()]
    assert [(r["answer"], r["score"], r["reference"]) for r in scored[:2]] == [("1", 1.0, "1"), ("1", 1.0, "1")]
    assert "| Eurus-2-7B-PRIME (published) | 26.7 | 79.2 | 57.8 | 38.6 | 42.1 | 48.9 | – | – |" in table
    assert f"| {Path(cfg.model.path).name} | – | – | 33.3 | – | – | – | – | 100.0 |" in table
    assert "| AMC | 3 | 33.3 [6.1, 79.2] |" in table


def test_the_commands(run_config, sized, tmp_path, capsys, model_dir):
    sized(amc=3)
    words = [
        "--output", str(tmp_path / "out"), "--model.path", str(model_dir), "--model.dtype", "float32",
        "--bench.paths", json.dumps({"amc": str(write(tmp_path / "amc.jsonl", AMC))}), "--bench.tasks", '["amc"]',
        "--bench.limit", "2", "--bench.max_new_tokens", "4",
    ]  # fmt: skip
    assert main(["generate", *words]) == 0
    assert f"responses: {tmp_path / 'out' / 'bench'}" in capsys.readouterr().out
    assert main(["eval", *words]) == 0
    out = capsys.readouterr().out
    assert "first 2 items of each" in out and f"table: {tmp_path / 'out' / 'bench' / 'table.md'}" in out
    words[words.index('["amc"]')] = '["amd"]'
    assert main(["eval", *words]) == 2
    assert "bench.tasks.0: Input should be 'aime24'" in capsys.readouterr().err
