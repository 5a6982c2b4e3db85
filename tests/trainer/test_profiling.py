"""A profile of one step: our names in the trace, ten rows, and nothing left behind."""

import json
import re

import prime_kernels as pk
from prime_trainer.cli import main
from prime_trainer.profiling import named_operations, run


def test_one_step_is_profiled(run_config):
    functions = {name: getattr(pk, name) for name in pk.__all__}
    cfg = run_config()
    page = run(cfg)
    assert all(getattr(pk, name) is function for name, function in functions.items())
    assert {path.name for path in cfg.output.iterdir()} <= {"profile", "engine"}
    trace = json.loads((cfg.output / "profile" / "trace.json").read_text())["traceEvents"]
    names = {event["name"] for event in trace if "name" in event}
    assert {"prime/rollout", "prime/verify", "prime/prm", "prime/policy"} <= names
    assert {"prime_kernels.rloo_advantages", "prime_kernels.prm_loss", "prime_kernels.linear_ppo_loss"} <= names
    # Its stage is where an operation ran.
    policy, loss = (
        next(e for e in trace if e.get("name") == name and e.get("ph") == "X")
        for name in ("prime/policy", "prime_kernels.linear_ppo_loss")
    )
    assert policy["ts"] <= loss["ts"] and loss["ts"] + loss["dur"] <= policy["ts"] + policy["dur"]
    said = page.read_text()
    stages, largest, ours = re.split(r"\nThe 10 rows|\nOperations", said)
    for stage in ("rollout", "verify", "prm", "policy", "total"):
        assert re.search(rf"^\| {stage} \|", stages, re.MULTILINE)
    rows = [line.split("|")[1:-1] for line in largest.splitlines() if re.match(r"\| (?!row|---)", line)]
    own = [float(cells[2]) for cells in rows]
    assert len(rows) == 10 and own == sorted(own, reverse=True) and own[0] > 0
    assert "| prime_kernels.linear_ppo_loss |" in ours and "trace.json" in ours


def test_names_go_when_a_step_fails():
    function = pk.segment_sum
    try:
        with named_operations():
            assert pk.segment_sum is not function and pk.segment_sum.__doc__ == function.__doc__
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert pk.segment_sum is function


def test_bad_settings_are_one_message(capsys):
    assert main(["profile", "--model.path", "/none"]) == 2
    assert "prime-trainer: error: model.path must be" in capsys.readouterr().err
