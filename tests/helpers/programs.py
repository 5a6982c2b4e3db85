"""Programs and their tests, and what runs them in a sandbox."""

from prime_trainer.verify.answers import AssertTests, CallTests, StdioTests
from prime_trainer.verify.programs import CodeRunner
from prime_trainer.verify.sandbox import Limits

LIMITS = Limits(seconds=2.0, memory_mb=512)
PACKAGES = ("numpy",)


def run(confine, jobs, workers=4, limits=LIMITS, **options):
    """The verdicts of `(answer, program)` pairs."""
    runner = CodeRunner(confine, limits, workers, **options)
    try:
        return [future.result() for future in [runner.submit(*job) for job in jobs]]
    finally:
        runner.close()


def stdio(inputs, outputs):
    return StdioTests(inputs, outputs)


def calls(name, inputs, outputs):
    return CallTests(name, inputs, outputs)


def asserts(tests, names, setup="", prelude=""):
    return AssertTests(tests, setup, names, prelude)
