"""No script of bench/ rots: each one's main runs at its smallest size, with a model of 100,000 weights."""

import json
import re
import runpy
import shutil
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="the trainer's packages are not installed: pip install '.[train]'")

from conftest import SHARED
from helpers import tiny

import prime_kernels as pk
from prime_kernels.ops import segment_sum
from prime_trainer import cli, loop
from prime_trainer.models.attention import blockwise
from prime_trainer.verify import sandbox

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "bench"
EXAMPLES = ROOT / "examples"
DEMO = EXAMPLES / "demo.toml"
HERE = {
    "adapters", "candidates", "compiled", "demo/results", "faults_table", "lora_rollouts", "merged_rounding",
    "plan_seconds", "plan_table", "precision", "precision_study", "prm/first_wrong_step", "prm/results", "prm/sample",
    "products", "rollout", "shared_prompts", "step", "step_share", "study/chains", "study/study", "trainer_cost",
    "trl_table", "verify/math_answers", "verify/programs", "verify/rates",
}  # fmt: skip
# What other tests of this folder and of docs, packaging, integrations, triton_backend and the trainer run.
ELSEWHERE = {
    "conformance",
    "conftest",
    "gpu_targets",
    "measure",
    "readme_charts",
    "smoke",
    "step_openrlhf",
    "table",
    "trl_steps",
    "tune",
    "verify/forms",
    "zoo",
}
DATA = SHARED / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no {DATA}: the benchmark files are not here")


@pytest.fixture(scope="module")
def shared_step(small, tmp_path_factory):
    """bench/step_share.py of one step: the directory of its run, and what it printed."""
    output = tmp_path_factory.mktemp("share") / "rl-0"
    with pytest.MonkeyPatch.context() as patch:
        # The script puts clocks there and leaves them.
        for name in ("rloo_advantages", "prm_loss", "ppo_loss", "segment_sum"):
            patch.setattr(pk, name, getattr(pk, name))
        patch.setattr(segment_sum.SegmentSum, "backward", segment_sum.SegmentSum.__dict__["backward"])
        patch.setattr(loop.Run, "train_step", loop.Run.train_step)
        said = []
        patch.setattr("builtins.print", lambda *words, **_: said.append(" ".join(map(str, words))))
        patch.setattr(sys, "argv", ["step_share.py", str(DEMO), *small, "--steps", "1", "--output", str(output)])
        runpy.run_path(str(BENCH / "step_share.py"), run_name="__main__")
    return output, "\n".join(said)


def test_none_is_left_out():
    found = {str(path.relative_to(BENCH).with_suffix("")) for path in BENCH.rglob("*.py")}
    assert {name for name in found if not name.startswith("test_")} == HERE | ELSEWHERE


def test_step_share(shared_step):
    line = re.search(r"^step 1: ([\d.]+) s; (.*); ([\d.]+) % in all$", shared_step[1], re.MULTILINE)
    parts = dict(re.findall(r"([\w ]+?) ([\d.]+) ms", line[2]))
    assert {"rloo_advantages", "prm_loss"} <= {name.strip() for name in parts}
    assert all(float(value) > 0 for value in parts.values()) and 0 < float(line[3]) < 100
    assert pk.rloo_advantages.__module__ == "prime_kernels.ops.rloo_advantages"


def test_candidates(script):
    said = script("candidates", "--tokens", 3, "--vocabulary", 50, "--width", 4, "--repeats", 1)
    lines = re.findall(r"^(logits|head) +min_prob ([\d.]+) .* ([\d.]+)x$", said, re.MULTILINE)
    assert [line[:2] for line in lines] == [(form, p) for p in ("0.05", "0.1", "0.2") for form in ("logits", "head")]
    assert all(float(line[2]) > 0 for line in lines)


def test_compiled(script, small):
    """With a backend that makes no code: minutes would go into that."""
    torch._dynamo.reset()
    words = dict(zip(small[::2], small[1::2], strict=True))
    said = script(
        "compiled", "--models", words["--model.path"], "--rounds", 1, "--dtype", "float32", "--backend", "aot_eager"
    )
    rows = [line.strip("| ").split(" | ") for line in said.splitlines() if line.startswith("| /")]
    assert [row[1] for row in rows] == ["eager, nothing recomputed", 'eager, "selective"', "compiled"]
    assert [float(row[6].split(" / ")[1]) < 1e-5 for row in rows] == [True] * 3 and rows[1][6] == "0.0e+00 / 0.0e+00"


def test_faults_table(script, tmp_path):
    """Counts of a part, the moments of kills, and the name of what failed."""
    report = tmp_path / "faults.xml"
    report.write_text(
        """<testsuites><testsuite>
        <testcase classname="tests.trainer.scale.test_kills" name="held">
        <system-out>sft: killed after 2.0 s of 4.0 s</system-out></testcase>
        <testcase classname="tests.trainer.test_payloads" name="ran"><failure/></testcase>
        <testcase classname="tests.trainer.test_payloads" name="left"><skipped/></testcase>
        </testsuite></testsuites>"""
    )
    script("faults_table", report, tmp_path / "faults")
    text = (tmp_path / "faults" / "README.md").read_text()
    assert "| Hidden code | 1 | 0 | 1 | 1 |" in text and "* `tests.trainer.test_payloads.ran`" in text
    assert "| Broken inputs | 0 | 0 | 0 | 0 |" in text


def test_demo_results(shared_step, script, tmp_path):
    script("demo/results", tmp_path / "seeds", shared_step[0])
    text = (tmp_path / "seeds" / "README.md").read_text()
    assert "| basic_arithmetic" in text and "| PRIME | 1 |" in text and str(shared_step[0].parent) not in text
    assert (tmp_path / "seeds" / "curves.png").read_bytes().startswith(b"\x89PNG")
    rows = (tmp_path / "seeds" / "rl-0.metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows if '"rl"' in row][-1] == 1


def test_rollout(small, shared_step, script, tmp_path):
    results, target = tmp_path / "results.json", tmp_path / "table"
    measure = ["--model", small[1], "--rounds", "1", "--batches", "8", "--engines", "transformers"]
    script("rollout", "measure", results, *measure)
    rounds = [row for row in json.loads(results.read_text())["results"] if "round" in row]
    assert [row["engine"] for row in rounds] == ["generate", "transformers"]
    assert all(row["batch"] == 8 and 8 <= row["tokens"] <= 8 * 48 and row["seconds"] > 0 for row in rounds)
    script("rollout", "table", results, target, shared_step[0])
    text = (target / "README.md").read_text()
    rate = f"{rounds[0]['tokens'] / rounds[0]['seconds']:.0f}"
    assert f"| generate | {rate} | 1.00x |" in text and "| rl-0 | transformers | 1 |" in text


def test_trainer_cost(small, script):
    said = script("trainer_cost", DEMO, "--rounds", "1", *small)
    assert ": 2 groups of 2, " in said and "medians of 1 rounds" in said
    rows = [line.strip("| ").split(" | ") for line in said.splitlines() if line.startswith("| ")]
    values = {row[0]: row[1:] for row in rows}
    assert values["a padded row a response"][-1] == "1.00" and len(values) == 3 + 6 + 2 + 3
    assert all(
        re.fullmatch(r"[+-]\d+%", cell) for name in ("freeze", "policy") for cell in values[f"ref_type = {name}"]
    )


def test_trainer_cost_by_length(small, script, monkeypatch):
    """Where rollouts take 53 % of a step, 47 % of what process rewards add to the rest is left."""
    passes = [0]  # of modules, and the only time that goes by: a model this small takes as long as what disturbs it

    def passed(*_):
        passes[0] += 1

    monkeypatch.setattr(time, "process_time", lambda: float(passes[0]))
    monkeypatch.setattr(time, "perf_counter", lambda: float(passes[0]))
    hook = torch.nn.modules.module.register_module_forward_pre_hook(passed)
    try:
        said = script(
            "trainer_cost", DEMO, "--rounds", "1", "--lengths", "2,9", "--prompt-tokens", "3", "--rank", "4", *small
        )
    finally:
        hook.remove()
    assert ": 2 groups of 2, prompts of 3 tokens" in said
    head, _, *rows = [line.strip("| ").split(" | ") for line in said.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows] == ["2"] * 5 + ["9"] * 5 and {len(row) for row in [head, *rows]} == {6}
    for at in (0, 5):
        seconds = [sum(float(cell) for cell in row[2:4]) for row in rows[at : at + 5]]
        assert seconds[1] > seconds[2] > seconds[0] > 0 and seconds[4] > seconds[3]
        for row in (rows[at + 1], rows[at + 2], rows[at + 4]):
            alone, whole = (int(cell.strip("%")) for cell in row[4:])
            assert whole == pytest.approx(0.47 * alone, abs=1)


def test_shared_prompts(script):
    said = script("shared_prompts", "--layers", "1", "--rounds", "1", "--shapes", "4x2x3")
    rows = [line.strip("| ").split(" | ") for line in said.splitlines() if line.startswith("| 4, 2 of 3")]
    assert [row[2] for row in rows] == ["prompt once", "prompt once, mask of all pairs", "prompt repeated"]
    assert all(row[1] == "10" and float(row[-1].replace(",", "")) > 0 for row in rows)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_precision(small, script, dtype):
    said = script("precision", DEMO, "--tokens", "50", *small, "--model.dtype", dtype)
    rows = [line.strip("| ").split(" | ") for line in said.splitlines() if line.startswith("| ")]
    assert rows[0] == ["log-probs", "error", "calls of 37 tokens", "another layout"] and len(rows) == 5
    errors = {row[0]: float(row[1].split(" / ")[1]) for row in rows[2:]}
    assert "50 next tokens of " in said and "Largest log-ratio of equal weights: 0.0\n" in said
    assert errors["kernels, float32 logits"] <= 2e-5
    assert (errors["kernels, rounded logits"] > 1e-4) == (errors["eager PyTorch"] > 1e-4) == (dtype == "bfloat16")
    if pk.available_backends()["cpu"] is None:
        assert all(row[2] == "0.0e+00 / 0.0e+00" for row in rows[2:4])


def test_mismatch_of_an_engine(small, script, monkeypatch):
    """Hidden states of one attention kernel differ by padding alone; with logits that agree the head adds nothing."""
    monkeypatch.setattr(blockwise, "_multiplies_bfloat16", lambda: False)
    said = script("precision", DEMO, "--tokens", "20", "--mismatch", *small, "--model.dtype", "bfloat16")
    rows = [line.strip("| ").split(" | ") for line in said.splitlines() if line.startswith("| ")][5:]
    assert rows[0][:3] == ["logits of transformers", "of the trainer", "mismatch"]
    found = {tuple(row[:2]): float(row[2].split(" / ")[0]) for row in rows[2:]}
    assert len(found) == 4 and found["float32", "float32"] < min(
        found["float32", "rounded"], found["rounded", "float32"]
    )


def test_products(script, monkeypatch):
    monkeypatch.setenv("PRIME_BENCH_SMALL", "1")
    monkeypatch.delitem(sys.modules, "measure", raising=False)
    threads = torch.get_num_threads()
    said = script("products", "--rounds", "2")
    torch.set_num_threads(threads)
    rows = [line.strip("| ").split(" | ") for line in said.splitlines() if line.startswith("| ")][2:]
    found = {(row[0], row[1]): row[2:] for row in rows}
    firsts = [row[2:] for at, row in enumerate(rows) if at == 0 or row[0] != rows[at - 1][0]]
    assert len(found) == len(rows) and len(firsts) == 4
    assert all(row[2].startswith("1.00 / 1.00") for row in firsts)
    assert all(float(share) > 0 for row in found.values() for share in row[2].removesuffix(" |").split(" / "))
    errors = {way: float(found["forward", way][3]) for way in ("linear_log_probs", "eager PyTorch")}
    assert errors["linear_log_probs"] < 2e-5 < errors["eager PyTorch"]
    for way in ("linear_log_probs", "linear_nll", "linear_ppo_loss", "eager PyTorch: nll", "torch.compile: ppo"):
        assert 0.0 < float(found["forward and backward", way][3]) < 0.02, way  # bfloat16 gradients
    for way in ("linear_log_probs", "linear_nll", "linear_ppo_loss", "eager PyTorch: nll"):
        assert 0.0 < float(found["forward and backward, frozen head", way][3]) < 0.02, way


def test_merged_rounding(script, small, tmp_path):
    """Without an update only the base's own rounding is left, in trainer and merged weights the same."""
    import peft
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = Path(dict(zip(small[::2], small[1::2], strict=True))["--model.path"])
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            weight.mul_(0.01 if "lora_B" in name else 1.0)
    adapted.save_pretrained(tmp_path / "adapter")
    said = script("merged_rounding", tmp_path / "adapter", tmp_path / "base", "--problems", 2, "--scales", "0,1")
    none, whole = [line.strip("| ").split(" | ") for line in said.splitlines() if line.startswith("| ")][2:]
    assert [none[0], whole[0]] == ["0", "1"]
    update, *errors = [float(cell.split(" ")[0]) for cell in none[1:]]
    assert update == 0 and len(set(errors[:-1])) == 1 and errors[-1] == 0
    update, trainer, of_peft, merged, nearest, _ = [float(cell.split(" ")[0]) for cell in whole[1:]]
    assert 0 < trainer < of_peft < update and 0 < merged != nearest > 0


def test_adapters(script, small, tmp_path):
    """Both arms of a step, and the table."""
    found = []
    for arm, words in (("full", []), ("rank 4", ["--model.adapter.rank", 4])):
        (row,) = json.loads(script("adapters", "one", DEMO, 1, *small, *words).splitlines()[-1])
        found.append({"arm": arm, **row})
    assert found[0]["tokens"] == found[1]["tokens"] and found[0]["trained"] > found[1]["trained"] > 0
    assert all(row["most GB"] > 0 and row["held GB"] > 0 and row["cpu s"] > 0 for row in found)
    (tmp_path / "step.json").write_text(json.dumps({"rows": found}))
    table = script("adapters", "table", tmp_path / "step.json", tmp_path / "table").splitlines()
    assert [line.split(" | ")[0] for line in table[2:]] == ["| full", "| rank 4"]


def test_lora_rollouts(script, tmp_path):
    """The table alone: it is the committed one, and the README's."""
    committed = BENCH / "results" / "adapters"
    text = script("lora_rollouts", "table", committed / "lora_rollouts.json", tmp_path)
    assert (tmp_path / "lora_rollouts.md").read_text() == text.rstrip("\n") + "\n"
    assert text.strip() in (committed / "README.md").read_text()
    assert {line.split(" | ")[0] for line in text.splitlines()[2:] if line} == {"| merged", "| lora"}


def test_plan_table(script):
    sums = re.findall(r"^\| \*\*sum\*\* \| (.*) \|$", script("plan_table"), re.MULTILINE)
    stages = [[float(cell.strip("* ")) for cell in row.split("|")] for row in sums]
    assert len(stages) == 5 and all(value > 1 for row in stages for value in row)
    assert all(one < other for one, other in zip(stages[0], stages[1], strict=True))
    # With adapters a GPU alone takes less than each of eight without, but for sampling.
    assert all(one < other for one, other in zip(stages[3][2:], stages[1][2:], strict=True))


def test_trl_table(module, monkeypatch):
    """The table alone, of the committed numbers: it is the committed one."""
    committed = BENCH / "results" / "integrations" / "trl"
    numbers = json.loads((committed / "results.json").read_text())
    monkeypatch.setattr(metadata, "version", lambda name: "1.16.0")
    runs = {way: [run for run in numbers["runs"] if run["patched"] is way] for way in (False, True)}
    text = module("trl_table").readme(runs, numbers["part"], steps=5, longest=24)
    lines, want = ([line for line in each.splitlines() if line.startswith(("|", "Largest"))]
                   for each in (text, (committed / "README.md").read_text()))  # fmt: skip
    assert lines == want and len(lines) == 2 + 4 + 1 + 2 + 5


def test_plan_seconds(small, script, tmp_path):
    text = script("plan_seconds", DEMO, *small, "--output", tmp_path / "run", "--policy.minibatches", "1")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows] == ["stage", "rollout", "policy", "score and prm", "**sum**"]
    parts = [[float(cell) for cell in row[1:3]] for row in rows[1:]]
    for column in zip(*parts, strict=True):
        assert sum(column[:3]) == pytest.approx(column[3], abs=0.011) and column[3] > 0


def test_step(small, module, tmp_path):
    """Ours at a small size, where lengths are equal and groups are centred: a loss of 0; and the table."""
    step, model = module("step"), Path(small[1])
    sizes = {"tokens": 4, "groups": 2, "n": 3, "prompt": 5}
    rows = []
    for way in ("outcomes", "policy"):
        step.child(way, model, tmp_path / "row.json", sizes, "float32")
        rows.append(json.loads((tmp_path / "row.json").read_text()) | {"note": ""})
    assert rows[0]["loss"] == pytest.approx(0, abs=1e-6) and rows[0]["grad_norm"] > 0.1
    assert rows[1]["time/prm"] > 0 and "time/prm" not in rows[0]
    peer = rows[0] | {"way": "trl", "seconds": 2 * rows[0]["seconds"], "peak_MiB": 4 * rows[0]["peak_MiB"]}
    (line,) = [line for line in step.readme([*rows, peer]).splitlines() if "outcomes alone" in line]
    assert line.split("|")[6].strip() == "2.00" and line.split("|")[8].strip() == "0.25"


SUM = re.compile(r"\d+(?: \+ \d+)+")


def worked(question, off=0):
    """A solution of a sum, a line for each running total; wrong from its first step on by `off`."""
    first, *rest = map(int, SUM.search(question).group().split(" + "))
    lines, total = [], first
    for term in rest:
        lines.append(f"{total} + {term} = {total + term + off}")
        total, off = total + term + off, 0
    return "\n".join([*lines, f"\\boxed{{{total}}}"])


def test_prm(small, module, script, monkeypatch, tmp_path):
    """Sampling, then scores of made solutions (the tiny model adds nothing up), then the tables of them."""
    config, run, model = EXAMPLES / "prm.toml", tmp_path / "runs" / "0", small[1]
    sample = module("prm/sample")
    monkeypatch.setattr(sample, "TRAIN", 3)
    sample.main([str(config), *small, "--output", str(run)])
    counts = {name: (run / f"{name}.jsonl").read_text().count("\n") for name in ("train", "test")}
    assert counts == {"train": 3, "test": 2}
    rows = [json.loads(line) for line in (run / "test.jsonl").read_text().splitlines()]
    for row in rows:
        assert len(row["completions"]) == len(row["correctness"]) == len(row["finished"]) == 2
        question = row["prompt"][-1]["content"]
        row["completions"] = [worked(question), worked(question, off=1)] * 8
        row["correctness"], row["finished"] = [1.0, 0.0] * 8, [True] * 16
        assert row["completions"][0].endswith(f"\\boxed{{{row['reference']}}}")
    (run / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prm = tiny.write_model(tmp_path / "prm", tied=False)
    score = ["score", str(config), *small, "--model.path", str(prm), "--score.reference", model]
    assert cli.main([*score, "--score.path", str(run / "test.jsonl"), "--output", str(run / "scores")]) == 0
    (run / "prm").mkdir()
    (run / "prm" / "metrics.jsonl").write_text('{"step": 1, "loss": 0.7}\n')

    monkeypatch.setattr(shutil, "which", lambda name: None)  # no browser: a picture of the page takes longer than all
    said = script("prm/results", tmp_path / "runs", "0", tmp_path / "results")
    found = json.loads((tmp_path / "results" / "results.json").read_text())["seeds"]["0"]
    assert found["mean accuracy of one"] == 0.5 and found["pass@16"] == 1.0 and found["responses"] == 16
    steps = [worked(row["prompt"][-1]["content"]).count("\n") + 1 for row in rows]
    assert found["chance"] == pytest.approx(sum(1 / n for n in steps) / 2)
    assert found["worked_pairs"] == 2 * 64 and found["best_fixed_place_share"] == 1.0
    assert f"| pair accuracy above 0.70 | {found['pair_accuracy']:.3f} |" in said
    for name in ("floors.md", "page-0.html", "select.md", "select.png"):
        assert (tmp_path / "results" / name).stat().st_size > 0


@needs_data
def test_math_answers(script, tmp_path):
    said = script("verify/math_answers", DATA, "--every", "300", "--output", tmp_path / "math.md")
    assert (tmp_path / "math.md").read_text() in said
    total, *forms = re.findall(r"^\| all \| (\d+) of (\d+) ", said, re.MULTILINE)
    assert total[0] == total[1] == "8"
    assert len(forms) == 1 and forms[0][0] == forms[0][1] and int(forms[0][1]) > 100


@needs_data
@pytest.mark.skipif(all(map(sandbox.obstacle, sandbox.KINDS)), reason="neither bubblewrap nor Landlock works here")
def test_programs(script):
    said = script("verify/programs", DATA, "--every", "200", "--workers", "1")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in said.splitlines() if line.startswith("| ")
    ]
    passed = {(row[0], row[1]): row[2:4] for row in rows[2:]}
    works = [kind for kind in sandbox.KINDS if sandbox.obstacle(kind) is None]
    assert {kind for kind, _ in passed} == set(works)
    for (_, programs), (count, right) in passed.items():
        assert right == ("0" if programs.endswith("wrong") else count), programs


@needs_data
@pytest.mark.skipif(all(map(sandbox.obstacle, sandbox.KINDS)), reason="neither bubblewrap nor Landlock works here")
def test_rates(script, tmp_path):
    said = script(
        "verify/rates", DATA, "--answers", "40", "--hanging", "20", "--workers", "2", "--output", tmp_path / "rates.md"
    )
    rows = re.findall(r"^\| ([^|]+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|", said, re.MULTILINE)
    counts = {title.strip(): tuple(map(int, found)) for title, *found in rows}
    assert counts["countdown, every tenth hangs"] == (20, 18, 0, 2)
    assert counts["reasoning-gym"][:2] == (40, 21)  # one wrong answer is right by chance: as many letters
    assert counts["formulas, all different"][0] == 40
    assert (tmp_path / "rates.md").read_text() in said
