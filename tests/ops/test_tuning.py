"""PRIME_KERNELS_TUNING: defaults of one device from a file, and what is refused."""

import json
import re

import pytest
import torch

import prime_kernels as pk
from prime_kernels import __main__ as package
from prime_kernels import _dispatch, _tuning
from prime_kernels.integrations import tile_sizes
from prime_kernels.ops import _tiled_head

X = torch.zeros(3)


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    monkeypatch.setattr(_tuning, "_read", {})
    monkeypatch.setattr(_tuning, "_matched", set())
    monkeypatch.delenv(_dispatch.ENVIRONMENT_VARIABLE, raising=False)


@pytest.fixture
def tuned(monkeypatch, tmp_path):
    """`tuned(device="other")` writes a file for this machine, changed so, and names it in the environment."""

    def write(**changes):
        here = _tuning.Tuning("cpu", _tuning.device_name("cpu"), _tuning.versions(), {"segment_sum": "eager"}, {})
        path = tmp_path / "tuning.json"
        path.write_text(here._replace(**changes).written())
        monkeypatch.setenv(_tuning.ENVIRONMENT_VARIABLE, str(path))
        return path

    return write


def test_the_backend_of_an_operation(tuned):
    before = _dispatch.resolve("segment_scan", X, None)
    tuned()
    assert _dispatch.resolve("segment_sum", X, None) == "eager"
    assert _dispatch.resolve("segment_scan", X, None) == before


def test_what_is_said_in_the_program_comes_first(tuned, monkeypatch):
    if pk.available_backends()["cpu"] is not None:
        pytest.skip("the extension is not built")
    tuned()
    assert _dispatch.resolve("segment_sum", X, "cpu") == "cpu"
    with pk.use_backend("cpu"):
        assert _dispatch.resolve("segment_sum", X, None) == "cpu"
    monkeypatch.setenv(_dispatch.ENVIRONMENT_VARIABLE, "cpu")
    assert _dispatch.resolve("segment_sum", X, None) == "cpu"


def test_a_backend_that_cannot_run_here(tuned):
    if pk.available_backends()["cuda"] is None:
        pytest.skip("there is a GPU")
    tuned(backends={"segment_sum": "cuda"})
    with pytest.raises(pk.BackendUnavailable, match=r"^PRIME_KERNELS_TUNING: backend 'cuda' is not available: "):
        pk.segment_sum(X, torch.tensor([0, 3]))


def test_tiles(tuned, monkeypatch):
    monkeypatch.setattr(_tiled_head, "HEAD_KERNELS", frozenset())  # which use no tiles
    tuned(tiles={"forward_elements": 1000, "fused_bytes": 4096})
    sizes = tile_sizes("cpu")
    assert (sizes.forward, sizes.fused_bytes) == (1000, 4096)
    assert sizes.backward == _tiled_head.BACKWARD_ELEMENTS["cpu"]
    assert tile_sizes("cuda").forward == _tiled_head.FORWARD_ELEMENTS["cuda"]
    hidden, weight, ids = torch.randn(40, 8), torch.randn(300, 8), torch.randint(300, (40,))
    seen = []
    real = _tiled_head.Tiles.logits

    class Watch(_tiled_head.Tiles):
        def logits(self, *arguments):
            seen.append(real(self, *arguments))
            return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_tiled_head, "Tiles", Watch)
        got = pk.linear_log_probs(hidden, weight, ids)
        assert max(each.numel() for each in seen) <= 1000 and len(seen) > 11
        seen.clear()
        loss = pk.linear_nll(hidden, weight, ids)
        assert [len(each) for each in seen] == [3] * 13 + [1]
    want = (hidden @ weight.T).log_softmax(-1).gather(-1, ids[:, None]).squeeze(-1)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(loss, -want.mean())


def test_a_trial_is_undone():
    tuning = _tuning.Tuning("cpu", "", {}, {"segment_sum": "eager"}, {"fused_bytes": 77})
    before = tile_sizes("cpu").fused_bytes
    with _tuning.trial(tuning):
        assert tile_sizes("cpu").fused_bytes == 77 and _dispatch.resolve("segment_sum", X, None) == "eager"
        assert tile_sizes("cuda").fused_bytes != 77
    assert tile_sizes("cpu").fused_bytes == before


def test_a_file_for_another_kind_of_device_changes_nothing(tuned):
    before = _dispatch.resolve("segment_sum", X, None)
    tuned(device_type="cuda", device="some GPU", backends={"segment_sum": "triton"})
    assert _dispatch.resolve("segment_sum", X, None) == before


FOREIGN = [
    ({"device": "Another 9000, 64 threads"}, r"expected the tuning of this device, '.*', got that of 'Another 9000"),
    ({"versions": {"torch": "1.0"}}, r"expected a tuning with these versions, .*torch .*, got torch 1\.0"),
]


@pytest.mark.parametrize("changes, message", FOREIGN, ids=["device", "versions"])
def test_a_foreign_file_is_refused(tuned, changes, message):
    path = tuned(**changes)
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"^PRIME_KERNELS_TUNING={re.escape(str(path))}: {message}"):
            pk.segment_sum(X, torch.tensor([0, 3]))


def change(**entries):
    return lambda content: {**content, **entries}


DAMAGED = {
    "another format": (change(format="2"), "expected format 'prime_kernels tuning, version 1', got '2'"),
    "a list": (lambda content: [content], "expected format .*, got 'list'"),
    "a key too many": (change(more=1), "expected the keys backends, device, .*, got .*more"),
    "a key too few": (lambda content: {k: v for k, v in content.items() if k != "tiles"}, "expected the keys"),
    "a number": (change(device=3), "expected text as device, got 3"),
    "an unknown kind": (change(device_type="tpu"), "expected device_type 'cpu' or 'cuda', got 'tpu'"),
    "no table": (change(tiles=[1]), r"expected a table as tiles, got \[1\]"),
    "an unknown operation": (change(backends={"softmax": "cpu"}), "expected backends of .*, got 'softmax': 'cpu'"),
    "an unknown backend": (change(backends={"log_probs": "jax"}), "expected backends of .*, got 'log_probs': 'jax'"),
    "a list as backend": (change(backends={"log_probs": ["cpu"]}), "expected backends of .*"),
    "an unknown tile": (change(tiles={"rows": 3}), "expected tiles of .*, got 'rows': 3"),
    "no tile": (change(tiles={"fused_bytes": 0}), "expected tiles of .*, got 'fused_bytes': 0"),
    "a tile of half": (change(tiles={"fused_bytes": 0.5}), "expected tiles of .*, got 'fused_bytes': 0.5"),
    "a tile that no kernel has": (change(tiles={"fused_columns": 3}), "expected fused_columns of 128 or 256, got 3"),
    "a true tile": (change(tiles={"fused_bytes": True}), "expected tiles of .*, got 'fused_bytes': True"),
}


@pytest.mark.parametrize("damage, message", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_refused(tuned, damage, message):
    path = tuned()
    path.write_text(json.dumps(damage(json.loads(path.read_text()))))
    with pytest.raises(ValueError, match=f"^PRIME_KERNELS_TUNING=.*: {message}"):
        pk.segment_sum(X, torch.tensor([0, 3]))


def test_a_torn_or_missing_file_is_refused(tuned):
    path = tuned()
    path.write_text(path.read_text()[:40])
    with pytest.raises(ValueError, match="expected JSON, as written by `python -m prime_kernels bench`, got "):
        pk.segment_sum(X, torch.tensor([0, 3]))
    path.unlink()
    with pytest.raises(ValueError, match=r"expected a file that can be read, got .*No such file"):
        pk.segment_sum(X, torch.tensor([0, 3]))


def test_the_report_names_the_file(tuned, monkeypatch):
    monkeypatch.delenv(_tuning.ENVIRONMENT_VARIABLE, raising=False)
    assert _tuning.said() == (True, "none (PRIME_KERNELS_TUNING is not set)")
    path = tuned()
    assert _tuning.said() == (True, f"{path}, for CPU tensors")
    tuned(device="Another 9000, 64 threads")
    usable, line = _tuning.said()
    assert not usable and "expected the tuning of this device" in line
    path.write_text("{")
    assert not _tuning.said()[0]
    if not torch.cuda.is_available():
        tuned(device_type="cuda", device="some GPU", backends={"segment_sum": "triton"})
        assert _tuning.said() == (True, f"{path}, for CUDA tensors, not used here")


def test_the_report_tests_the_kernels_without_a_refused_file(tuned, monkeypatch, capsys):
    """Their self-test passes; the file has its own line, and the status says that it is no good."""
    monkeypatch.setattr(package, "self_test", lambda: print(tile_sizes("cpu").fused_bytes) or 0)
    tuned().write_text("{")
    assert package.main([]) == 1
    said = capsys.readouterr().out
    assert "tuning: PRIME_KERNELS_TUNING=" in said and "expected JSON" in said
    assert said.endswith(f"{_tiled_head.FUSED_BYTES}\n")
