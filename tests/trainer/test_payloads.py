"""Code hidden in the files of a run or a model is not run, whichever command reads them."""

import hashlib
import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from prime_trainer import cli, loop, sft
from prime_trainer.run import checkpoint_files


class Payload:
    """Unpickled without restrictions it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def plant_index(directory, payload):
    """As the whole index, then as one entry in it: the second form torch unpickles when the entry is read."""
    (directory / ".metadata").write_bytes(pickle.dumps(payload))


def plant_entry(directory, payload):
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    index = pickle.loads((directory / ".metadata").read_bytes())
    key = next(iter(index.state_dict_metadata))
    index.state_dict_metadata[key] = BytesStorageMetadata()
    (directory / ".metadata").write_bytes(pickle.dumps(index))
    for place, info in index.storage_data.items():
        if place.fqn == key:
            data = bytearray((directory / info.relative_path).read_bytes())
            (directory / info.relative_path).write_bytes(data[: info.offset] + pickle.dumps(payload) + bytes(4000))


def plant_elsewhere(directory, payload):
    index = pickle.loads((directory / ".metadata").read_bytes())
    info = next(iter(index.storage_data.values()))
    info.relative_path = f"../../{info.relative_path}"
    (directory / ".metadata").write_bytes(pickle.dumps(index))


def plant_state(directory, payload):
    torch.save({"config": payload, "step": 1}, directory / "state.pt")


def signed(directory):
    """Whoever plants a file can write its checksum, too."""
    facts = {
        path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in directory.iterdir()
        if path.name != "manifest.json"
    }
    (directory / "manifest.json").write_text(json.dumps(facts))


@pytest.mark.parametrize("plant", [plant_index, plant_entry, plant_elsewhere, plant_state])
@pytest.mark.parametrize("command", ["rl", "sft"])
def test_a_checkpoint(run_config, tmp_path, monkeypatch, capsys, command, plant):
    from helpers import ranks

    monkeypatch.setattr(loop, "Verifier", ranks.RandomVerifier)
    {"rl": loop, "sft": sft}[command].run(run_config(steps=1, checkpoint={"every": 1}))
    directory = max((tmp_path / "run" / "checkpoints").glob("step_*"))
    plant(directory, Payload(tmp_path / "touched"))
    signed(directory)
    monkeypatch.setattr(cli, "_config", lambda words: run_config(steps=2, resume=True, checkpoint={"every": 1}))
    assert cli.main([command]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert ".metadata is not the index of a checkpoint" in message or "state.pt is not the state of a run" in message
    assert not (tmp_path / "touched").exists()


def test_an_index_as_it_was_written_is_read_as_torch_reads_it(tmp_path):
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros((), dtype=torch.bfloat16)}
    checkpoint_files.write(tmp_path, {"step": 1}, tensors)
    index = checkpoint_files.read_index(tmp_path)
    assert index == pickle.loads((tmp_path / ".metadata").read_bytes())
    plain = {"a": {"__tensor__": "a"}, "b": {"__tensor__": "b"}}
    found = checkpoint_files.plain_tensors(tmp_path, plain)
    assert {k: (v.shape, v.dtype) for k, v in found.items()} == {k: (v.shape, v.dtype) for k, v in tensors.items()}


def own_code(model, path):
    """A model that brings the code of its architecture and of its tokenizer."""
    code = f"open({str(path)!r}, 'w')\nclass Config: pass\nclass Model: pass\nclass Tokenizer: pass\n"
    (model / "own.py").write_text(code)
    for name, classes in (
        ("config.json", {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["own.Tokenizer", "own.Tokenizer"]}),
    ):
        found = json.loads((model / name).read_text()) | {"auto_map": classes}
        if name == "config.json":
            found["model_type"] = "own"
        (model / name).write_text(json.dumps(found))


def pickled_weights(model, path):
    (model / "model.safetensors").unlink()
    torch.save({"weight": Payload(path)}, model / "pytorch_model.bin")


def pickle_of_another_name(model, path):
    (model / "model.safetensors").write_bytes(pickle.dumps(Payload(path)))


COMMANDS = ["rl", "sft", "prm", "score", "eval", "generate", "plan"]


@pytest.mark.parametrize("plant", [own_code, pickled_weights, pickle_of_another_name])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_model(run_config, model_dir, tmp_path, monkeypatch, capsys, command, plant):
    broken = shutil.copytree(model_dir, tmp_path / "model")
    plant(broken, tmp_path / "touched")
    rows = tmp_path / "rows.jsonl"
    row = {"prompt": "2 + 3?", "response": "5", "label": 1}
    rows.write_text("".join(json.dumps(row | {"label": k}) + "\n" for k in (0, 1)))
    problems = tmp_path / "amc.jsonl"
    problems.write_text("".join(json.dumps({"question": f"{k} + 1?", "answer": k + 1}) + "\n" for k in range(83)))
    cfg = run_config(
        model={"path": str(broken)},
        train_prm={"path": rows, "cache": tmp_path / "cache"},
        score={"path": rows, "reference": model_dir},
        bench={"paths": {"amc": problems}, "tasks": ("amc",)} if command == "generate" else {},
    )
    monkeypatch.setattr(cli, "_config", lambda words: cfg)
    if command == "plan" and plant is pickle_of_another_name:
        assert cli.main([command]) == 0  # reads no weights
    else:
        assert cli.main([command]) == 2
        assert str(broken) in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "touched").exists()


def test_the_cache_of_the_reference(run_config, tmp_path, monkeypatch, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{k}?", "response": "5", "label": k % 2}) + "\n" for k in range(8)))
    cfg = run_config(train_prm={"path": rows, "cache": tmp_path / "cache"})
    monkeypatch.setattr(cli, "_config", lambda words: cfg)
    assert cli.main(["prm"]) == 0
    for file in (tmp_path / "cache").glob("*.safetensors"):
        file.write_bytes(pickle.dumps(Payload(tmp_path / "touched")))
    cfg = run_config(train_prm={"path": rows, "cache": tmp_path / "cache"}, output=tmp_path / "other")
    capsys.readouterr()
    assert cli.main(["prm"]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith(f"prime-trainer: error: {tmp_path / 'cache'}") and not (tmp_path / "touched").exists()


def test_a_cache_with_other_values_is_not_taken(tmp_path):
    from prime_trainer.prm import reference_cache

    path = tmp_path / "x.safetensors"
    save_file({"other": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"x\.safetensors"):
        reference_cache._load(path)
    assert load_file(path)["other"].shape == (3,)
