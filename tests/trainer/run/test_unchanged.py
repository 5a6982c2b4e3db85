import pytest

from prime_trainer.run import unchanged


def test_differences_are_named_with_both_values():
    before, now = {"seed": 0, "lr": 1e-3, "gone": 1}, {"seed": 1, "lr": 1e-3, "new": 2}
    assert unchanged.differing(before, now) == ["seed", "new"]
    assert unchanged.differing(before, now, ["lr", "new"]) == ["new"]
    unchanged.check(before, now, ["lr"], "nothing has changed")
    with pytest.raises(ValueError, match=r"^--resume: changed \(seed: 0 -> 1; new: None -> 2\)$"):
        unchanged.check(before, now, now, "--resume: changed")
