"""Several ranks and one served engine, which only the first of them knows: the same run as in one process."""

import pytest
from helpers import faults, ranks


@pytest.mark.parametrize(("lag", "deaths"), [(0, [3]), (1, [6])])
def test_all_ranks_train_on_what_one_engine_samples(make_config, tmp_path, lag, deaths):
    """And when it dies, in an update or while it samples, they go on with the new one as a single process does."""

    def config(name):
        return make_config(
            output=tmp_path / name / "run",
            steps=4,
            rollout={"engine": "vllm-server", "lag": lag, "prompts_per_step": 5, "n": 4, "max_new_tokens": 8},
            filter={"low": 0.1, "high": 0.9, "max_rounds": 2},
            policy={"lr": 2e-5, "minibatches": 2},
            prm={"lr": 3e-4, "ref_type": "policy"},
        )

    alone, together = config("alone"), config("together")
    ranks.train(alone, 0, faults.one_engine, deaths)
    ranks.train(together, 2, faults.one_engine, deaths)
    ranks.assert_close_runs(alone.output, together.output)
    said = [ranks.log(together, rank).read_text() for rank in range(2)]
    assert [text.count("the rollout engine is replaced: died in call") for text in said] == [1, 0]


def test_an_engine_that_dies_too_often_ends_all_ranks(make_config, tmp_path):
    cfg = make_config(output=tmp_path / "run", rollout={"engine": "vllm-server"})
    assert ranks.wait(ranks.start(cfg, 2, faults.one_engine, [2, 4])) == [1, 1]
    for rank in range(2):
        said = ranks.log(cfg, rank).read_text()
        assert "all of rollout.vllm.restarts = 1 are used up" in said and "Traceback" not in said


def test_an_engine_in_process_is_not_for_torchrun(make_config, tmp_path):
    cfg = make_config(output=tmp_path / "run", rollout={"engine": "vllm"})
    assert ranks.wait(ranks.start(cfg, 1, faults.one_engine, [])) == [2]
    assert "rollout.engine = 'vllm' is for a run without torchrun" in ranks.log(cfg).read_text()
