"""Names on the Hugging Face Hub, read from a local cache in the Hub's own layout, offline."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from prime_trainer import sft
from prime_trainer.config.sections import ModelConfig, TaskConfig
from prime_trainer.data.readers import read_rows
from prime_trainer.data.tasks import load_task
from prime_trainer.models import loading, tokenizers
from prime_trainer.run import hub
from prime_trainer.run.provenance import environment

OLD, NEW = "0" * 39 + "a", "0" * 39 + "b"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and no network; `cache(kind, name, commit, files)` adds a commit, which main then is."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "_commits", {})
    monkeypatch.setattr(hub, "_folders", {})
    monkeypatch.chdir(tmp_path)

    def add(kind, name, commit, files):
        folder = tmp_path / "hub" / f"{kind}s--{name.replace('/', '--')}"
        for place, content in files.items():
            blob, link = folder / "blobs" / f"{commit[-1]}-{Path(place).name}", folder / "snapshots" / commit / place
            blob.parent.mkdir(parents=True, exist_ok=True)
            link.parent.mkdir(parents=True, exist_ok=True)
            blob.write_bytes(content)
            link.symlink_to(blob)
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / "main").write_text(commit)

    return add


@pytest.fixture
def files(model_dir):
    return {path.name: path.read_bytes() for path in model_dir.iterdir()}


def forget(monkeypatch):
    """As a new process has it."""
    monkeypatch.setattr(hub, "_commits", {})
    monkeypatch.setattr(hub, "_folders", {})


def weights(model):
    return torch.cat([value.flatten() for value in model.state_dict().values()])


def test_model_and_tokenizer_are_those_of_the_cache(cache, files, model_dir):
    cache("model", "some/tiny", OLD, files)
    named, local = (ModelConfig(path=p, dtype="float32") for p in ("some/tiny", str(model_dir)))
    assert torch.equal(weights(loading.load_model(named)), weights(loading.load_model(local)))
    one, other = tokenizers.load_tokenizer(named), tokenizers.load_tokenizer(local)
    assert one.encode("What is 2 + 3?") == other.encode("What is 2 + 3?")
    assert loading.fingerprint(named) == loading.fingerprint(local)
    assert hub.commits() == environment()["hub"] == {"models/some/tiny": OLD}


def test_a_local_directory_wins(cache, files, model_dir, tmp_path):
    cache("model", "some/tiny", OLD, {"config.json": b"{}"})
    shutil.copytree(model_dir, tmp_path / "some" / "tiny")
    assert loading.directory(ModelConfig(path="some/tiny")) == "some/tiny" and hub.commits() == {}


def test_revisions_are_told_apart_and_kept(cache, files, monkeypatch, tmp_path):
    cache("model", "some/tiny", OLD, files)
    first = loading.directory(ModelConfig(path="some/tiny"))
    cache("model", "some/tiny", NEW, files | {"new.json": b"{}"})
    assert loading.directory(ModelConfig(path="some/tiny")) == first  # for the life of the process
    assert loading.directory(ModelConfig(path=f"some/tiny@{NEW}")).endswith(NEW)
    (tmp_path / "environment.json").write_text(json.dumps(environment()))
    forget(monkeypatch)
    assert loading.directory(ModelConfig(path="some/tiny")).endswith(NEW)
    forget(monkeypatch)
    hub.resume(tmp_path)
    assert loading.directory(ModelConfig(path="some/tiny")) == first
    assert hub.commits() == {"models/some/tiny": OLD, f"models/some/tiny@{NEW}": NEW}


def test_a_resumed_run_takes_the_commits_that_it_began_with(cache, files, run_config, monkeypatch):
    rows = b'{"instruction": "2 + 2?", "response": "4"}\n'
    cache("model", "some/tiny", OLD, files)
    cache("dataset", "some/chats", OLD, {"train.jsonl": rows * 4})
    cfg = run_config(
        model={"path": "some/tiny"}, sft={"path": "hf://datasets/some/chats/train.jsonl", "batch_size": 2},
        checkpoint={"every": 1},
    )  # fmt: skip
    sft.run(cfg)
    began = json.loads((cfg.output / "environment.json").read_text())["hub"]
    assert began == {"models/some/tiny": OLD, "datasets/some/chats": OLD}
    changed = json.loads(files["config.json"]) | {"initializer_range": 0.5}
    cache("model", "some/tiny", NEW, files | {"config.json": json.dumps(changed).encode()})
    forget(monkeypatch)
    sft.run(cfg.model_copy(update={"resume": True}))  # else the files would not be what they were
    assert json.loads((cfg.output / "environment.json").read_text())["hub"] == began


def test_rows_of_several_files(cache, tmp_path):
    parts = {f"data/train-{k}.jsonl": f'{{"question": "q{k}", "answer": {k}}}\n'.encode() for k in range(3)}
    cache("dataset", "some/sums", OLD, parts | {"data/test-0.jsonl": b'{"question": "t", "answer": 9}\n'})
    path = Path("hf://datasets/some/sums/data/train-*.jsonl")
    found = list(read_rows(path, "task.path"))
    assert [place for place, _ in found] == [f"train-{k}.jsonl, line 1" for k in range(3)]
    assert [row["answer"] for _, row in found] == [0, 1, 2]
    task = load_task(
        TaskConfig(kind="jsonl", path=path, eval_path=Path(f"hf://datasets/some/sums@{OLD}/data/test-0.jsonl")), 0
    )
    assert [problem.reference for problem in task.held_out()] == ["9"]
    assert sorted(problem.reference for problem in task.train(0, 3)) == ["0", "1", "2"]
    with pytest.raises(ValueError, match=r"task\.path: some/sums has no files like data/dev-\*\.jsonl"):
        read_rows(Path("hf://datasets/some/sums/data/dev-*.jsonl"), "task.path")


def test_what_is_not_to_be_had_is_one_line(cache):
    said = r"{}: some/{} is neither a local path nor to be had from the Hugging Face Hub or its cache: "
    with pytest.raises(ValueError, match=said.format(r"model\.path", "absent")):
        loading.directory(ModelConfig(path="some/absent"))
    with pytest.raises(ValueError, match=said.format(r"sft\.path", "rows")):
        read_rows(Path("hf://datasets/some/rows/a.jsonl"), "sft.path")
    for path in ("/no/such", "one", "a/b/c"):
        with pytest.raises(ValueError, match=r"must be a model directory, a name on the Hugging Face Hub or .* got"):
            loading.directory(ModelConfig(path=path))
