"""Which part of a response is its answer or its program."""

import time

import pytest

from prime_trainer.verify.answers import AssertTests, CallTests, StdioTests
from prime_trainer.verify.extract import last_answer, last_boxed, last_code_block, programs
from prime_trainer.verify.verifier import candidates


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed {5}", "5"),
        (r"\boxed 5.", "5"),
        (r"$\boxed 5$", "5"),
        (r"\fbox{5}", "5"),
        (r"\\boxed{4} \\boxed{5}", "5"),
        (r"<think>\boxed{4}</think> \boxed{5}", "5"),
        (r"<think>\boxed{4}</think> so 5", None),
        (r"\boxed{5} <think>\boxed{4}", "5"),
        (r"\boxed{5} so \boxed{5", "5"),
    ],
)
def test_boxes_as_models_write_them(text, answer):
    assert last_boxed(text) == answer


@pytest.mark.parametrize(("text", "answer"), [("x = −3", "−3"), ("about -.5", "-.5"), ("it is 1.5e4.", "1.5e4")])
def test_answers_without_a_box(text, answer):
    assert last_answer(text) == answer


RIGHT = "def f(x):\n    return x\n"


@pytest.mark.parametrize(
    "text",
    [
        f"```python\n{RIGHT}```",
        f"```Python 3\n{RIGHT}```",
        f'``` python title="a.py"\n{RIGHT}```',
        f"```{{.python .numberLines}}\n{RIGHT}```",
        f"````python\n{RIGHT}````",
        f"~~~py\n{RIGHT}~~~",
        f"```python\n{RIGHT.rstrip()}```",
        "1. so:\n\n   ```python\n   def f(x):\n       return x\n   ```\n",
        "- ```python\n  def f(x):\n      return x\n  ```\n",
        "```python\r\ndef f(x):\r\n    return x\r\n```\r\n",
        f"```python\nnever closed\n\nso\n```python\n{RIGHT}```",
        f"```python\n{RIGHT}```\nOutput:\n```\n6\n```",
        f"```python\n{RIGHT}```\nOutput:\n```text\n6\n```",
        f"<think>\n```python\nprint(0)\n```\nhm\n```python\n</think>\n```python\n{RIGHT}```",
        f"```python\n{RIGHT}```\n```cpp\nint main() {{}}\n```",
    ],
)
def test_fences_as_models_write_them(text):
    assert programs(text)[0] == RIGHT


def test_the_block_that_defines_what_is_tested_comes_first():
    demonstration = "```python\nprint(f(3))\n```"
    calls, asserts = CallTests("f", [[1]], [1]), AssertTests(["assert f(1) == 1"], "", ["f"])
    for answer in (calls, asserts):
        assert candidates(answer, f"```\n{RIGHT}```\n{demonstration}")[0] == RIGHT
        assert candidates(answer, f"```python\nf = lambda x: 0\n```\n```\n{RIGHT}```")[0] == RIGHT
    method = "class Solution:\n    def f(self, x):\n        return x\n"
    assert candidates(calls, f"```python\n{method}```\n{demonstration}")[0] == method
    reads = "print(int(input()) * 2)\n"
    text = f"```python\n{reads}```\nFor example:\n```python\nprint(3 * 2)\n```\n```\n6\n```"
    assert candidates(StdioTests(["3\n"], ["6\n"]), text) == [reads, "print(3 * 2)\n", "6\n"]
    assert candidates(StdioTests([""], ["6\n"]), text)[0] == "print(3 * 2)\n"
    assert candidates(calls, "no code") == []


@pytest.mark.parametrize("text", ["```\n" * 10**5, "~" * 10**6, "```python\n" * 10**5, (" " * 99 + "`\n") * 10**4])
def test_fences_are_found_in_bounded_time(text):
    begin = time.process_time()
    programs(text, ["f"])
    assert time.process_time() - begin < 3.0


@pytest.mark.parametrize(
    ("text", "block"),
    [
        ("no code", None),
        ("```python\na = 1\n```", "a = 1\n"),
        ("```\na\n```\n text\n  ```py\n  b\n  ```\n", "b\n"),
        ("```python\na\n```\n```text\nb\n```", "a\n"),
        ("```python\na\n```\n```python\nnever closed", "a\n"),
        ("```" + "a" * 10**6, None),
        ("```\n" * 10**5 + "x", ""),
        ((" " * 50 + "\n") * 10**4, None),
    ],
)
def test_last_code_block(text, block):
    begin = time.process_time()
    assert last_code_block(text) == block
    assert time.process_time() - begin < 2.0
