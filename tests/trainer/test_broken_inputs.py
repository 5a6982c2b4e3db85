"""Every command against a table of broken inputs: exit status 2, one line with the file and the place, no traceback."""

import gzip
import json
import os
import random
import shutil

import pytest
import torch
from helpers import ranks
from safetensors.torch import load_file, save_file

from prime_trainer.cli import COMMANDS, main
from prime_trainer.rollout.vllm import engine, server

NESTED = b"[" * 100_000 + b"]" * 100_000
ROW = {"prompt": "What is 2 + 3?", "question": "What is 2 + 3?", "response": "5", "answer": "5", "label": 1}


def refused(capsys, *words) -> str:
    """The one line that a command ends with."""
    capsys.readouterr()
    status = main([str(word) for word in words])
    said = capsys.readouterr().err
    assert "Traceback" not in said and "prime-trainer: error: " in said, said
    # transformers and torch may say things of their own before.
    message = said[said.index("prime-trainer: error: ") :].removeprefix("prime-trainer: error: ").rstrip("\n")
    assert status == 2, f"{status}: {message}"
    assert len(message.splitlines()) == 1, message
    return message


def lines(*rows) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def damaged_parquet() -> bytes:
    import io

    import pyarrow
    import pyarrow.parquet

    rng, file = random.Random(0), io.BytesIO()
    texts = ["".join(rng.choices("abcdefgh", k=200)) for _ in range(200)]
    pyarrow.parquet.write_table(pyarrow.table({"prompt": texts, "answer": texts}), file, use_dictionary=False)
    data = bytearray(file.getvalue())
    data[200:8000] = b"\xff" * 7800
    return bytes(data)


# name of the file, its content (None: a directory), what the message must say
ROWS = {
    "not UTF-8": ("x.jsonl", b'{"prompt": "\xff"}\n', "line 1: not UTF-8"),
    "nested deeply": ("x.jsonl", NESTED, "line 1: JSON that is nested too deeply"),
    "cut short": ("x.jsonl", b'{"prompt": "2 +', "line 1: not JSON"),
    "no object": ("x.jsonl", b"[1]\n", "line 1: expected an object"),
    "half a surrogate": (
        "x.jsonl",
        b'{"prompt": "\\ud800", "answer": "5"}\n',
        "line 1: prompt has half of a surrogate",
    ),
    "a directory": ("x.jsonl", None, "a file is expected, got a directory"),
    "no gzip": ("x.jsonl.gz", b"plain text\n", "not gzip data"),
    "gzip cut short": (
        "x.jsonl.gz",
        gzip.compress(random.Random(0).randbytes(4000).hex().encode())[:-900],
        "the gzip file is cut short",
    ),
    "no parquet": ("x.parquet", b"PAR1 and no more", "is not a parquet file"),
    "a damaged page": ("x.parquet", damaged_parquet(), "after row 0"),
}
# The words that name a file of rows, for each command that reads one.
READERS = {
    "rl": ("--task.kind", "{kind}", "--task.path", "{file}"),
    "eval": ("--task.kind", "{kind}", "--task.path", "{file}"),
    "eval bench": ("--bench.tasks", '["amc"]', "--bench.paths", '{{"amc": "{file}"}}'),
    "generate": ("--bench.tasks", '["amc"]', "--bench.paths", '{{"amc": "{file}"}}'),
    "sft": ("--sft.path", "{file}"),
    "prm": ("--train_prm.path", "{file}"),
    "score": ("--score.path", "{file}", "--score.reference", "{model}"),
    "select": ("--select.paths", '["{file}"]'),
    "processbench": ("--processbench.tune", "{file}"),
}


@pytest.fixture
def write(tmp_path):
    """A file of a name with a content; None makes it a directory."""

    def make(name, content):
        path = tmp_path / "broken" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir() if content is None else path.write_bytes(content)
        return path

    return make


@pytest.fixture
def config(run_config, tmp_path):
    """The small run as a file of settings."""
    path = tmp_path / "run.toml"
    found = json.loads(run_config(steps=1).model_dump_json(exclude_defaults=True))
    params = ", ".join(f"{k} = {v}" for k, v in found["task"].pop("params").items())
    text = "".join(f"{k} = {json.dumps(v)}\n" for k, v in found.items() if not isinstance(v, dict))
    for name, section in found.items():
        if isinstance(section, dict):
            text += f"[{name}]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in section.items())
            text += f"params = {{ {params} }}\n" if name == "task" else ""
    path.write_text(text)
    return path


@pytest.mark.parametrize("fault", ROWS)
@pytest.mark.parametrize("reader", READERS)
def test_rows(capsys, config, write, model_dir, reader, fault):
    name, content, told = ROWS[fault]
    path = write(name, content)
    kind = "parquet" if name.endswith("parquet") else "jsonl"
    words = [word.format(file=path, kind=kind, model=model_dir) for word in READERS[reader]]
    message = refused(capsys, reader.split()[0], config, *words)
    if "bench.tasks" in words[0] and content is None:  # a folder is a dataset there
        told = "has no parquet, JSONL or JSON files"
    assert told in message and str(path) in message, message


def weights_changed(change):
    def apply(directory):
        tensors = load_file(directory / "model.safetensors")
        change(tensors)
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})

    return apply


def pickled(directory):
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()


def replaced(name, content):
    def apply(directory):
        (directory / name).unlink()
        (directory / name).mkdir() if content is None else (directory / name).write_bytes(content)

    return apply


UP = "model.layers.0.mlp.up_proj.weight"
CONFIGS = {
    "a configuration that is not UTF-8": (replaced("config.json", b"\xff\xfe"), "config.json: not UTF-8"),
    "a nested configuration": (replaced("config.json", NESTED), "config.json: JSON that is nested too deeply"),
    "a directory for the configuration": (replaced("config.json", None), "has no config.json"),
    "pickled weights": (pickled, "has its weights in pytorch_model.bin, a pickle"),
}
TOKENIZERS = {
    "a cut tokenizer": (replaced("tokenizer.json", b'{"model": '), "tokenizer.json: not JSON"),
    "a directory for the tokenizer": (replaced("tokenizer.json", None), "tokenizer.json"),
}
WEIGHTS = {
    "a damaged header": (replaced("model.safetensors", b"\xff" * 100), "model.safetensors: Error while deserializing"),
    "a cut file": (
        lambda d: os.truncate(d / "model.safetensors", 9000),
        "model.safetensors: Error while deserializing",
    ),
    "a missing weight": (weights_changed(lambda t: t.pop(UP)), f"1 missing: {UP}"),
    "an unknown weight": (
        weights_changed(lambda t: t.update({"v_head.weight": torch.zeros(2)})),
        "1 that the model does not have: v_head.weight",
    ),
    "a weight of another shape": (
        weights_changed(lambda t: t.update({"model.norm.weight": torch.zeros(63)})),
        "1 of another shape: model.norm.weight ([63] in place of [64])",
    ),
    "a damaged generation config": (replaced("generation_config.json", b"{"), "generation_config.json: not JSON"),
}
MODELS = {
    **{command: CONFIGS | TOKENIZERS | WEIGHTS for command in ("rl", "sft", "prm", "score", "eval", "generate")},
    "plan": CONFIGS,
    "serve": {name: CONFIGS[name] for name in ("a directory for the configuration", "pickled weights")},
}


@pytest.mark.parametrize(("command", "fault"), [(c, fault) for c, faults in MODELS.items() for fault in faults])
def test_models(capsys, config, write, model_dir, tmp_path, monkeypatch, command, fault):
    monkeypatch.setattr(server, "vllm_installed", lambda: True)
    monkeypatch.setattr(engine, "serve", pytest.fail)
    breaking, told = MODELS[command][fault]
    broken = shutil.copytree(model_dir, tmp_path / "model")
    breaking(broken)
    rows = write("rows.jsonl", lines(ROW, ROW | {"response": "6", "label": 0}))
    problems = write("amc.jsonl", lines(*[{"question": f"{k} + 1?", "answer": k + 1} for k in range(83)]))
    words = {
        "prm": ("--train_prm.path", rows, "--train_prm.cache", tmp_path / "cache"),
        "score": ("--score.path", rows, "--score.reference", model_dir),
        "generate": ("--bench.tasks", '["amc"]', "--bench.paths", json.dumps({"amc": str(problems)})),
        "serve": ("--rollout.server.token_file", tmp_path / "token"),
    }.get(command, ())
    message = refused(capsys, command, config, "--model.path", broken, *words)
    assert told in message and str(broken) in message, message


SETTINGS = {
    "not UTF-8": (b'output = "\xff"\n', ".toml is not UTF-8"),
    "nested deeply": (b"steps = " + NESTED, ".toml is nested too deeply"),
    "no TOML": (b"steps = = 3\n", ".toml is not TOML"),
    "a directory": (None, "config file expected, got a directory"),
}
VALUES = {
    ("--policy.lr", "inf"): "policy.lr: Input should be a finite number",
    ("--rollout.temperature", "inf"): "rollout.temperature: Input should be a finite number",
    ("--rollout.temperature", "nan"): "rollout.temperature: Input should be",
    ("--steps", 10**22): "steps: Input should be a finite number of at most",
    ("--output", ""): "output: Input should be a path (got '')",
    ("--task.verify_seconds", "1e300"): "task.verify_seconds: Input should be a finite number",
    ("--select.n", "[1, 10000000000000000]"): "select.n: Input should be a finite number",
}
WITH_SETTINGS = [command for command in COMMANDS if command not in ("init", "report", "completion")]


@pytest.mark.parametrize("fault", SETTINGS)
@pytest.mark.parametrize("command", WITH_SETTINGS)
def test_settings_files(capsys, write, command, fault):
    content, told = SETTINGS[fault]
    path = write("run.toml", content)
    message = refused(capsys, command, path)
    assert told in message and str(path) in message


@pytest.mark.parametrize("words", VALUES)
@pytest.mark.parametrize("command", WITH_SETTINGS)
def test_values(capsys, config, command, words):
    assert VALUES[words] in refused(capsys, command, config, *words)


WRITERS = [command for command in READERS if command != "eval"]


@pytest.mark.parametrize("place", ["a file", "below a file", "where nothing can be written"])
@pytest.mark.parametrize("writer", WRITERS)
def test_outputs(capsys, config, write, model_dir, writer, place, monkeypatch):
    """Noticed before a model is loaded."""
    from prime_trainer.models import loading

    monkeypatch.setattr(loading, "load_model", pytest.fail)
    file = write("file", b"")
    output = {"a file": file, "below a file": file / "run", "where nothing can be written": "/proc/sys/run"}[place]
    rows = write("x.jsonl", lines(ROW))
    words = [word.format(file=rows, kind="jsonl", model=model_dir) for word in READERS[writer]]
    message = refused(capsys, writer.split()[0], config, *words, "--output", output)
    assert f"output = '{output}' cannot be written to: " in message


@pytest.fixture(scope="session")
def trained(make_config, tmp_path_factory):
    """A run of one step of each stage that has checkpoints."""
    from prime_trainer import loop, sft
    from prime_trainer.prm import train

    root = tmp_path_factory.mktemp("trained")
    rows = root / "rows.jsonl"
    rows.write_bytes(lines(*[ROW | {"prompt": f"{k} + 1?", "label": k % 2} for k in range(8)]))
    prm = {"path": rows, "cache": root / "cache", "batch_size": 2, "lr": 1e-4}
    common = {"checkpoint": {"every": 1}, "train_prm": prm, "steps": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "Verifier", ranks.RandomVerifier)
        loop.run(make_config(output=root / "rl", **common))
    sft.run(make_config(output=root / "sft", **common))
    train.run(make_config(output=root / "prm", **common))
    return root


def last(run):
    return max((run / "checkpoints").glob("step_*"))


def cut(path, size=10):
    os.truncate(path, size)


RUNS = {
    "a changed state": (lambda run: cut(last(run) / "state.pt"), "state.pt has 10 bytes instead of"),
    "a manifest that is not JSON": (
        lambda run: (last(run) / "manifest.json").write_bytes(b"{"),
        "manifest.json cannot be read",
    ),
    "a nested manifest": (
        lambda run: (last(run) / "manifest.json").write_bytes(NESTED),
        "manifest.json cannot be read",
    ),
    "a line of the record": (
        lambda run: (run / "metrics.jsonl").write_bytes(b"\xff\n" + (run / "metrics.jsonl").read_bytes()),
        "metrics.jsonl, line 1: not UTF-8",
    ),
    "a file for the checkpoints": (
        lambda run: (shutil.rmtree(run / "checkpoints"), (run / "checkpoints").write_bytes(b"")),
        "checkpoints",
    ),
}
RESUMED = ("rl", "sft", "prm")


@pytest.mark.parametrize("fault", RUNS)
@pytest.mark.parametrize("command", RESUMED)
def test_runs_to_resume(capsys, make_config, trained, tmp_path, monkeypatch, command, fault):
    run = shutil.copytree(trained / command, tmp_path / "run")
    breaking, told = RUNS[fault]
    breaking(run)
    message = resumed(capsys, make_config, trained, monkeypatch, command, run)
    assert told in message and str(run) in message, message


def resumed(capsys, make_config, trained, monkeypatch, command, run) -> str:
    from prime_trainer import cli

    prm = {"path": trained / "rows.jsonl", "cache": trained / "cache", "batch_size": 2, "lr": 1e-4}
    cfg = make_config(output=run, resume=True, checkpoint={"every": 1}, train_prm=prm, steps=2)
    monkeypatch.setattr(cli, "_config", lambda words: cfg)
    return refused(capsys, command)


REPORTS = {
    "a file": (lambda run: (shutil.rmtree(run), run.write_bytes(b"")), "has no metrics.jsonl"),
    "metrics that are not UTF-8": (lambda run: (run / "metrics.jsonl").write_bytes(b"\xff\n"), "line 1: not UTF-8"),
    "nested metrics": (lambda run: (run / "metrics.jsonl").write_bytes(NESTED + b"\n"), "line 1: JSON that is nested"),
    "metrics of another form": (
        lambda run: (run / "metrics.jsonl").write_bytes(b"[1]\n"),
        "line 1: expected an object",
    ),
    "samples of another form": (lambda run: (run / "samples.jsonl").write_bytes(b'{"step": 1}\n'), "line 1"),
    "a configuration that is none": (lambda run: (run / "config.json").write_bytes(b"[]"), "config.json"),
    "a nested configuration": (lambda run: (run / "config.json").write_bytes(NESTED), "config.json"),
    "a file for the report": (lambda run: (run / "report").write_bytes(b""), "report"),
}


@pytest.mark.parametrize("fault", REPORTS)
def test_runs_to_report(capsys, trained, tmp_path, fault):
    run = shutil.copytree(trained / "rl", tmp_path / "run")
    breaking, told = REPORTS[fault]
    breaking(run)
    message = refused(capsys, "report", run)
    assert told in message and str(run) in message, message


def test_other_files_beside_the_checkpoints_are_none_of_the_runs(trained, tmp_path, make_config):
    from prime_trainer import sft

    run = shutil.copytree(trained / "sft", tmp_path / "run")
    for name in ("step_backup", "step_000009.bak", "old"):
        (run / "checkpoints" / name).mkdir()
    (run / "checkpoints" / "step_000010").write_text("a file")
    prm = {"path": trained / "rows.jsonl", "cache": trained / "cache", "batch_size": 2, "lr": 1e-4}
    cfg = make_config(output=run, resume=True, checkpoint={"every": 1}, train_prm=prm, steps=1)
    shutil.rmtree(run / "final")
    sft.run(cfg)
    assert (run / "final" / "model.safetensors").exists()
