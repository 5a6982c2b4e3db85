from pathlib import Path

import pytest

from prime_trainer.data.readers import kind_of, read_rows


@pytest.mark.parametrize(
    ("name", "kind"),
    [("a.parquet", "parquet"), ("a.jsonl", "jsonl"), ("a.jsonl.gz", "jsonl"), ("a.json", "json"), ("a.txt", None)],
)
def test_the_end_of_a_name_says_what_a_file_holds(name, kind):
    assert kind_of(Path(name)) == kind


def test_without_a_known_end_a_file_is_jsonl(tmp_path):
    path = tmp_path / "rows"
    path.write_text('{"a": 1}\n\n{"a": 2}\n')
    assert list(read_rows(path, "key")) == [("line 1", {"a": 1}), ("line 3", {"a": 2})]
    path = tmp_path / "rows.json"
    path.write_text('[{"a": 1}, {"a": 2}]')
    assert list(read_rows(path, "key")) == [("row 1", {"a": 1}), ("row 2", {"a": 2})]
