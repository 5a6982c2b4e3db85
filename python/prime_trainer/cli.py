"""`prime-trainer COMMAND [run.toml] [--section.key value ..]`."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import RunError
from .run.progress import lasting_output

if TYPE_CHECKING:
    from .config.run_config import RunConfig


_BAD_PATHS = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0 done, 1 a run failed, 2 bad input. Errors are one message, not a traceback."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0 if argv else 2
    name, words = argv[0], argv[1:]
    if name not in COMMANDS:
        return _fail(f"unknown command {name!r}; the commands are {', '.join(COMMANDS)}")
    ranks = os.environ.get("WORLD_SIZE", "1")
    if ranks != "1" and name != "rl":
        return _fail(f"{name} runs in one process, not in the {ranks} that torchrun started: only rl is for several")
    with lasting_output():
        return _run(name, words)


def _run(name: str, words: list[str]) -> int:
    try:
        return COMMANDS[name].main(words)
    except (ValueError, TypeError) as error:
        return _fail(_describe(error))
    except OSError as error:
        # What is not there, or of another kind than it should be, is bad input; a full disk is not.
        return _fail(_place(error), 2 if isinstance(error, _BAD_PATHS) else 1)
    except RunError as error:
        return _fail(str(error), 1)
    except (ImportError, AttributeError) as error:
        conflict = _conflict()
        if conflict is not None:
            return _fail(f"{error}: {conflict}", 1)
        if isinstance(error, ModuleNotFoundError):
            return _fail(f"the package {error.name!r} is missing: pip install 'prime-process-rewards[train]'", 1)
        raise
    except KeyboardInterrupt:
        return _fail("stopped", 130)


def _conflict() -> str | None:
    """What another distribution with a package prime_kernels may have replaced."""
    try:
        from prime_kernels._distribution import conflict
    except ImportError:  # torch is not installed
        return None
    return conflict()


def _config(words: list[str]) -> RunConfig:
    from .config.load import load

    toml = Path(words.pop(0)) if words and not words[0].startswith("-") else None
    return load(toml, words)


def _eval(words: list[str]) -> int:
    cfg = _config(words)
    if cfg.bench.data is not None or cfg.bench.paths:
        from .evaluation.benchmark_table import run

        path = run(cfg)
        print(f"{path.read_text(encoding='utf-8')}\ntable: {path}")
        return 0
    import json

    from .evaluation import held_out

    print(json.dumps(held_out.run(cfg)))
    return 0


def _serve(words: list[str]) -> int:
    cfg = _config(words)
    from .rollout.vllm.server import serve

    serve(cfg.rollout, cfg.model)
    return 0


def _report(words: list[str]) -> int:
    from .report.page import summary_row, write_report
    from .report.run_record import read_record

    if not words:
        return _fail("report needs a run directory: prime-trainer report RUN_DIR [OTHER_RUN_DIR ...]")
    runs = [Path(w) for w in words]
    page = write_report(runs[0], runs[1:])
    for run in runs:
        row = summary_row(read_record(run))
        print(f"{run}: accuracy {row['accuracy before']} -> {row['accuracy after']} ({row['change']})")
    print(f"report: {page}")
    return 0


def _plan(words: list[str]) -> int:
    calibrate = "--calibrate" in words
    words = [word for word in words if word != "--calibrate"]
    sizes = {"--gpus": 1.0 if calibrate else 8.0, "--memory": 80.0, "--prompt-tokens": 512.0, "--response-tokens": 0.0}
    for name in sizes:
        if name in words:
            at = words.index(name)
            text = words[at + 1] if at + 1 < len(words) else ""
            if not text.replace(".", "", 1).isdigit() or float(text) < 1:
                return _fail(f"{name} takes a number of at least 1, got {text!r}")
            sizes[name] = float(text)
            del words[at : at + 2]
    if sizes["--response-tokens"] and not calibrate:
        return _fail("--response-tokens is for plan --calibrate; memory is planned for rollout.max_new_tokens")
    if calibrate and sizes["--gpus"] > 1:
        return _fail(f"plan --calibrate probes one device: expected --gpus 1, got {sizes['--gpus']:g}")
    cfg = _config(words)
    if calibrate:
        from .calibrate import run

        print(run(cfg, int(sizes["--prompt-tokens"]), int(sizes["--response-tokens"]) or None))
        return 0
    from .plan import plan

    gpus = int(sizes["--gpus"])
    print(plan.render(plan.make(cfg, gpus, int(sizes["--prompt-tokens"])), cfg, gpus, sizes["--memory"]))
    return 0


def _init(words: list[str]) -> int:
    from .config import recipes

    if words == ["--schema"]:
        import json

        from .config.run_config import RunConfig

        print(json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema"} | RunConfig.model_json_schema()))
        return 0
    if not words or len(words) > 2 or words[0].startswith("-"):
        listed = "\n".join(f"  {name:12}{about}" for name, about in recipes.RECIPES.items())
        print(f"usage: prime-trainer init RECIPE [FILE]\n       prime-trainer init --schema\n\nrecipes:\n{listed}")
        return 0 if words == ["--help"] else 2
    path = Path(words[1] if len(words) == 2 else f"{words[0]}.toml")
    recipes.write(words[0], path)
    print(path)
    return 0


def _completion(words: list[str]) -> int:
    from .config import completion

    if len(words) != 1:
        return _fail(f"completion needs a shell: prime-trainer completion {'|'.join(completion.SHELLS)}")
    print(completion.script(words[0], {name: command.help for name, command in COMMANDS.items()}), end="")
    return 0


def _describe(error: Exception) -> str:
    """pydantic's errors name the key, what came and what was expected; its link to its own pages helps nobody here."""
    details = getattr(error, "errors", None)
    if details is None:
        return str(error)
    from .config.load import close_keys

    lines = []
    for d in details():
        key = ".".join(map(str, d["loc"]))
        if d["type"] == "extra_forbidden":
            lines.append(f"unknown key {key}{close_keys(key)}")
        elif d["type"] == "value_error":  # our own rules name their keys themselves
            lines.append(d["msg"].removeprefix("Value error, "))
        else:
            lines.append(f"{key}: {d['msg']} (got {d.get('input')!r:.100})")
    return "\n".join(lines)


def _place(error: OSError) -> str:
    """The file and what is wrong with it, as the system says it; our own messages as they are."""
    if error.filename is None or error.strerror is None:
        return str(error)
    names = [str(name) for name in (error.filename, error.filename2) if name is not None]
    return f"{' -> '.join(names)}: {error.strerror}"


def _fail(message: str, status: int = 2) -> int:
    print(f"prime-trainer: error: {message}", file=sys.stderr)
    return status


def _usage() -> str:
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:{width}}{command.help}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: prime-trainer COMMAND [run.toml] [--section.key value ...]",
            "",
            "commands:",
            *lines,
            "",
            "Every setting has a key: prime-trainer rl --help lists them. The command line wins over the file.",
        ]
    )


@dataclass(frozen=True)
class Command:
    """A command by what it runs, which is imported only when it is called.

    `run` is either a function of the words after the command's name, which returns the exit status, or the module whose
    `run(cfg)` returns a path: printed in `message`, or, where that is empty, by the text of the file.
    """

    run: str | Callable[[list[str]], int]
    help: str
    message: str = ""

    def main(self, words: list[str]) -> int:
        """Returns the exit status."""
        if callable(self.run):
            return self.run(words)
        cfg = _config(words)
        path = importlib.import_module(self.run, __package__).run(cfg)
        if os.environ.get("RANK", "0") == "0":
            print(self.message.format(path) if self.message else path.read_text(encoding="utf-8").rstrip("\n"))
        return 0


COMMANDS = {
    "init": Command(
        _init, "settings to start from, with comments:  prime-trainer init demo|math|code|prm|eight_gpus [FILE]"
    ),
    "sft": Command(
        ".sft", "supervised warm-up on chat data or on demonstrations made for the task", "model saved to {}"
    ),
    "rl": Command(".loop", "online PRIME", "model saved to {}"),
    "eval": Command(_eval, "accuracy on the task's held-out problems, or with bench.data the benchmarks' table"),
    "generate": Command(
        ".evaluation.responses",
        "a model's responses to the benchmarks, as JSONL; goes on where it stopped",
        "responses: {}",
    ),
    "prm": Command(".prm.train", "offline training of an implicit PRM from labelled responses", "PRM saved to {}"),
    "score": Command(
        ".prm.score", "rewards of tokens, steps and responses under a PRM, and a page to look at them", "scores: {}"
    ),
    "select": Command(".prm.select", "best-of-N, weighted best-of-N and majority voting from scored responses"),
    "processbench": Command(
        ".prm.processbench", "ProcessBench from its own files or scored ones: first wrong steps, F1, speed"
    ),
    "serve": Command(_serve, "a vLLM server for rollouts:  prime-trainer serve run.toml --rollout.server.port 8001"),
    "plan": Command(
        _plan,
        "memory and traffic of a run:  plan run.toml [--gpus 8] [--memory 80] [--prompt-tokens 512]; "
        "with --calibrate seconds of a step by probes of this device [--response-tokens N]",
    ),
    "profile": Command(".profiling", "one step of rl under torch.profiler: stages, the ten largest rows, a trace file"),
    "report": Command(_report, "an HTML page and PNGs of a run:  prime-trainer report RUN_DIR [OTHER_RUN_DIR ...]"),
    "completion": Command(_completion, "completion in a shell:  source <(prime-trainer completion bash)"),
}

if __name__ == "__main__":
    sys.exit(main())
