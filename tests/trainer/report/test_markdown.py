from prime_trainer.report.markdown import grid, table


def test_cells_cannot_break_the_table():
    assert table([{"a": "x|y", "b": 1}, {"a": "two\nlines", "b": None}]) == (
        "| a | b |\n| --- | --- |\n| x\\|y | 1 |\n| two lines | None |\n"
    )


def test_columns_may_share_a_name_and_numbers_are_aligned_to_the_right():
    assert grid(["n", "n", "mean"], [["one", 1.5, "2"]], numbers=True) == (
        "| n | n | mean |\n| --- | --: | --: |\n| one | 1.5 | 2 |\n"
    )
