import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prime_trainer.config.sections import TaskConfig
from prime_trainer.data.file_task import problem_answer
from prime_trainer.data.tasks import load_task
from prime_trainer.verify.answers import CallTests, GymAnswer, MathAnswer, StdioTests, from_json
from prime_trainer.verify.sandboxed.codec import decode, encode

SMALL = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}  # 200 distinct questions


def gym(**options):
    return TaskConfig(**{"eval_size": 20, **options})


def row(question="1+1?", truth="2", **fields):
    return {
        "data_source": "x",
        "prompt": [{"role": "user", "content": question}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": truth},
        "extra_info": {"split": "train", "index": 0},
        **fields,
    }


def write(path, rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def files(path, **options):
    return TaskConfig(kind="jsonl", path=path, **{"eval_size": 1, **options})


def questions(problems):
    return [problem.messages[-1]["content"] for problem in problems]


def test_the_stream_is_addressed_by_position():
    task = load_task(gym(), seed=3)
    stream = task.train(0, 600)
    assert load_task(gym(), seed=3).train(250, 20) == stream[250:270]
    assert task.train(599, 1) == stream[599:]
    assert len({problem.id for problem in stream}) == 600


def test_neighbouring_seeds_share_no_stretch_of_the_stream():
    streams = [set(questions(load_task(gym(), seed=seed).train(0, 200))) for seed in (0, 1)]
    assert len(streams[0] & streams[1]) < 10


def test_held_out_is_the_same_for_all_seeds_and_never_trained_on():
    tasks = [load_task(gym(params=SMALL, eval_size=150), seed=seed) for seed in (0, 1)]
    held_out = questions(tasks[0].held_out())
    assert held_out == questions(tasks[1].held_out())
    assert len(set(held_out)) == 150
    for task in tasks:
        assert not set(held_out) & set(questions(task.train(0, 300)))


def test_a_problem_has_the_prompt_and_all_the_verifier_needs():
    cfg = gym(params=SMALL, system_prompt="Be brief.", template="{question} Use \\boxed{}.")
    (problem,) = load_task(cfg, 0).train(0, 1)
    entry = problem.answer.entry
    assert problem.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": f"{entry['question']} Use \\boxed{{}}."},
    ]
    assert problem.reference == entry["answer"]
    assert isinstance(problem.answer, GymAnswer) and problem.answer.dataset == "chain_sum"
    assert from_json(json.loads(json.dumps(problem.answer.to_json()))) == problem.answer


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "chain_sums"}, "task.name must be .* got 'chain_sums'; did you mean 'chain_sum'"),
        ({"name": "zz"}, r"got 'zz'; there are \d+"),
        ({"params": {"min_term": 2}}, "task.params for 'chain_sum' has no 'min_term'; did you mean 'min_terms'"),
        ({"params": {"seed": 2}}, "task.params must not set 'seed'"),
        ({"params": {"min_terms": -2}}, "'chain_sum': min_terms must be positive, got {'min_terms': -2}"),
        ({"params": SMALL, "eval_size": 201}, "task.eval_size must not exceed the distinct questions .* found 200"),
        ({"params": SMALL, "eval_size": 200}, "task.eval_size = 200 leaves no question of 'chain_sum' for training"),
    ],
)
def test_bad_reasoning_gym_options(options, message):
    with pytest.raises(ValueError, match=message):
        load_task(gym(**options), 0)


def test_codec_keeps_what_json_loses():
    value = {"a": (1, [2.5, None]), 3: {"b": {"x", "y"}}, "c": {(0, 1): True}}
    assert decode(json.loads(json.dumps(encode(value)))) == value
    with pytest.raises(TypeError, match="cannot keep a object"):
        encode(object())


def test_file_rows_become_problems(tmp_path):
    task = load_task(files(write(tmp_path / "d.jsonl", [row("a {x}?", "\\frac{1}{2}"), row("b?", "3")])), 0)
    (held,), (trained,) = task.held_out(), task.train(0, 1)
    assert task.name == "d"
    assert held.messages == [{"role": "user", "content": "a {x}?"}]
    assert held.answer == MathAnswer("\\frac{1}{2}")
    assert (trained.messages[0]["content"], trained.reference) == ("b?", "3")


def test_epochs_visit_every_row_in_new_orders(tmp_path):
    path = write(tmp_path / "d.jsonl", [row(f"{i}?", str(i)) for i in range(21)])
    task = load_task(files(path), 5)
    first, second = questions(task.train(0, 20)), questions(task.train(20, 20))
    assert sorted(first) == sorted(second) == sorted(f"{i}?" for i in range(1, 21))
    assert first != second
    assert questions(load_task(files(path), 5).train(15, 10)) == [*first[15:], *second[:5]]
    assert questions(load_task(files(path), 6).train(0, 20)) != first


def test_chat_prompts_are_kept_unless_the_configuration_says_otherwise(tmp_path):
    chat = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]
    path = write(tmp_path / "d.jsonl", [row(prompt=chat), row("other")])
    assert load_task(files(path), 0).held_out()[0].messages == chat
    changed = files(path, template="Solve: {question}", system_prompt="T")
    assert load_task(changed, 0).held_out()[0].messages == [
        {"role": "system", "content": "T"},
        {"role": "user", "content": "Solve: Q"},
    ]


def test_parquet_and_benchmark_rows(tmp_path):
    pq.write_table(pa.Table.from_pylist([row("a?", "1"), row("b?", "2")]), tmp_path / "d.parquet")
    bench = write(tmp_path / "amc.jsonl", [{"id": 0, "question": "c?", "answer": 142.0, "url": "u"}])
    task = load_task(TaskConfig(kind="parquet", path=tmp_path / "d.parquet", eval_path=bench), 0)
    assert sorted(questions(task.train(0, 2))) == ["a?", "b?"]
    assert [(p.messages[0]["content"], p.reference) for p in task.held_out()] == [("c?", "142")]


def test_training_skips_held_out_questions_of_another_file(tmp_path):
    path = write(tmp_path / "d.jsonl", [row("a?"), row("b?")])
    task = load_task(files(path, eval_path=write(tmp_path / "e.jsonl", [row("a?")])), 0)
    assert questions(task.train(0, 3)) == ["b?"] * 3


def code(tests, question="write it"):
    return row(question, json.dumps(tests) if isinstance(tests, dict) else tests, ability="code")


def test_code_rows_are_problems_in_both_forms_beside_mathematics(tmp_path):
    programs = code({"inputs": ["1\n", ["2", "3"]], "outputs": ["1\n", "5"]}, "a?")
    calls = code({"inputs": [[1, [2]], "3\n[4]"], "outputs": [[3], 7], "fn_name": "f"}, "b?")
    path = write(tmp_path / "d.jsonl", [row("c?"), programs, calls])
    task = load_task(files(path, allow_unsafe=True), 0)
    answers = {p.messages[0]["content"]: p.answer for p in task.held_out() + task.train(0, 2)}
    assert answers["c?"] == MathAnswer("2")
    assert answers["a?"] == StdioTests(["1\n", "2\n3"], ["1\n", "5"])
    assert answers["b?"] == CallTests("f", [[1, [2]], [3, [4]]], [[3], 7])
    assert {p.reference for p in task.train(0, 2)} == {""}


def test_function_tests_as_text_are_json():
    rows = {
        "inputs": ["1\n[2]\n", '"ab"', [1]], "outputs": ["3", '"ba"', "3"], "fn_name": "f",
    }  # fmt: skip
    answer = problem_answer(code(rows, "q?"))
    assert answer == CallTests("f", [[1, [2]], ["ab"], [1]], [3, "ba", "3"])
    long = "9" * 5000
    (value,) = problem_answer(code({"inputs": [long], "outputs": [long], "fn_name": "f"}, "q?")).outputs
    assert value == 10**5000 - 1


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], r"task\.path: .*d\.jsonl has no rows"),
        ([row(), code("{1")], r"line 2: reward_model\.ground_truth of a code problem must be JSON"),
        ([row(), code({"inputs": [""]})], r"line 2: reward_model\.ground_truth must have as many inputs as outputs"),
        ([row(), code({"inputs": [], "outputs": []})], r"line 2: .* at least one, got \{'inputs': \[\]"),
        ([row(), code({"inputs": [1], "outputs": [""]})], r"ground_truth\.inputs\[0\] must be text .* got 1"),
        ([code({"inputs": [1], "outputs": [1], "fn_name": "f"})], r"inputs\[0\] must be the list of arguments, got 1"),
        ([code({"inputs": ["x"], "outputs": [1], "fn_name": "f"})], r"inputs\[0\] must have one JSON value a line"),
        ([row()], r"no problem of .*d\.jsonl is left .* task\.eval_size \(it is 1\)"),
        ([row(), "{nonsense"], r"d\.jsonl, line 2: not JSON"),
        ([row(), "[]"], r"d\.jsonl, line 2: expected an object, got list"),
        ([row(), row(ability="art")], r"line 2: ability must be 'math' or 'code', got 'art'"),
        ([row(), row(prompt=[])], r"line 2: prompt must be a non-empty list of messages or a string, got \[\]"),
        ([row(), row(prompt=[{"role": "bot", "content": "x"}])], r"line 2: prompt\[0\]\.role must be one of .* 'bot'"),
        ([row(), row(prompt=[{"role": "user"}])], r"line 2: prompt\[0\]\.content must be a non-empty string, got None"),
        ([row(), row(reward_model={})], r"line 2: reward_model\.ground_truth must hold .* got None"),
        ([row(), {"question": "q?"}], r"line 2: answer must hold .* got None"),
    ],
)
def test_bad_files(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        load_task(files(write(tmp_path / "d.jsonl", rows)), 0)


def test_a_missing_file_and_a_wrong_format_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"task\.path: no such file: .*nowhere\.jsonl"):
        load_task(files(tmp_path / "nowhere.jsonl"), 0)
    path = write(tmp_path / "d.parquet", [row()])
    with pytest.raises(ValueError, match=r"task\.path: .*d\.parquet is not a parquet file"):
        load_task(TaskConfig(kind="parquet", path=path), 0)


@pytest.mark.parametrize("truth", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_reference_that_no_response_can_give_is_refused(tmp_path, truth):
    path = write(tmp_path / "x.jsonl", [row(), row("2+2?"), json.dumps(row("3+3?", "#")).replace('"#"', truth)])
    told = r"x\.jsonl, line 3: reward_model\.ground_truth must be a finite number or text, got -?(nan|inf)"
    with pytest.raises(ValueError, match=told):
        load_task(files(path), 0)


def test_a_reference_that_is_nan_in_parquet_is_refused(tmp_path):
    pq.write_table(pa.table({"question": ["1+1?", "2+2?"], "answer": [2.0, float("nan")]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"x\.parquet, row 2: answer must be a finite number or text, got nan"):
        load_task(TaskConfig(kind="parquet", path=tmp_path / "x.parquet", eval_size=1), 0)


BAD = [
    ("not json", "line 2: not JSON"),
    ('{"prompt": "\\ud800", "answer": "1"}', "line 2: prompt has half of a surrogate pair"),
    (json.dumps(row("5+5?", None)), "line 2: reward_model.ground_truth must hold the reference answer"),
    (
        json.dumps(row(truth='{"inputs": ["\\ud800"], "outputs": ["1"]}', ability="code")),
        "has half of a surrogate pair",
    ),
    (json.dumps(row(truth='{"fn_name": "f", "inputs": ["1"], "outputs": [NaN]}', ability="code")), "NaN or infinity"),
]


@pytest.mark.parametrize(("bad", "told"), BAD)
def test_bad_rows_are_named_or_left_out(tmp_path, capsys, bad, told):
    path = write(tmp_path / "x.jsonl", [row(), bad, row("2+2?", "4"), row("3+3?", "6")])
    with pytest.raises(ValueError, match=r"x\.jsonl, line 2: ") as error:
        load_task(files(path), 0)
    assert told in str(error.value)
    task = load_task(files(path, bad_rows="skip"), 0)
    assert sorted(questions(task.train(0, 2))) == ["2+2?", "3+3?"] and questions(task.held_out()) == ["1+1?"]
    assert f"task.path: 1 of 4 rows of {path} are left out" in capsys.readouterr().err
    assert task.held_out()[0].place == f"{path}, line 1"
