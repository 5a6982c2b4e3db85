import json
import re
from html.parser import HTMLParser

import pytest

from prime_trainer.config.run_config import RunConfig
from prime_trainer.report.page import Table, duration, markdown_page, summary_row, write_report
from prime_trainer.report.plots import FIGURES, mean_of, running_mean
from prime_trainer.report.run_record import read_record
from prime_trainer.run.metrics import MetricsWriter

HOSTILE = "<script>alert(1)</script>"
OF_THE_PRM = {"prm_loss", "prm_pair_accuracy"}


def write_run(path, *, seed=0, steps=3, dense=True, after=0.7, rewards=(0.5, -0.25, 0.0), evals=True):
    writer = MetricsWriter(path, None)
    cfg = RunConfig(seed=seed, task={"params": {"max_terms": 2}}, algorithm={"process_coef": 5.0 if dense else 0.0})
    (path / "config.json").write_text(cfg.model_dump_json())
    for step in range(1, steps + 1):
        values = {"reward": 0.4, "kept_reward": 0.5, "groups_sampled": 8, "groups_kept": 4, "response_length": 60}
        values |= {"truncated": 0.1, "clip_fraction": 0.0, "approx_kl": 1e-4, "entropy": 0.4, "policy_loss": 0.0}
        values |= {"mismatch": 0.04, "mismatch_kl": 1e-3}
        values |= {"time/rollout": 10.0, "time/verify": 1.0, "time/policy": 5.0, "time/total": 60.0}
        if dense:
            values |= {"prm_loss": 0.7, "prm_pair_accuracy": 0.6, "time/prm": 4.0}
        writer.log("rl", step, values)
    for step, greedy in ((0, 0.5), (steps, after)) if evals else ():
        writer.log("eval", step, {"greedy": greedy, "sampled": greedy - 0.1, "n": 100})
    sample = {"prompt": f"2 + 2 {HOSTILE}", "tokens": ["4", HOSTILE, "\n"], "advantages": [1.0, -1.0, 0.0]}
    sample |= {"process_rewards": list(rewards) if dense else None, "outcome": 1.0, "reference": f"4{HOSTILE}"}
    writer.samples(steps, [sample])
    writer.close()
    return path


class Page(HTMLParser):
    """Collects the tags, and checks that they nest."""

    VOID = ("meta", "img", "source", "br")

    def __init__(self, text):
        super().__init__()
        self.tags, self.open = [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def test_the_page_stands_alone_and_shows_every_figure(tmp_path):
    path = write_report(write_run(tmp_path / "run"))
    assert path == tmp_path / "run" / "report" / "index.html"
    text = path.read_text()
    page = Page(text)
    pngs = sorted(file.stem for file in path.parent.glob("*.png"))
    assert pngs == sorted({figure.name for figure in FIGURES} - {"sft_loss"})
    assert all((path.parent / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in pngs)
    assert len(page.all("img")) == len(page.all("source")) == len(pngs)
    assert all(image["src"].startswith("data:image/png;base64,iVBOR") for image in page.all("img"))
    assert not page.all("script") and not page.all("link") and not page.all("a")
    assert not re.search(r"https?://|url\(|@import", text)
    assert "50.0 %" in text and "70.0 %" in text and "+20.0 points" in text and "3 min" in text


def test_model_text_is_escaped_and_tokens_carry_their_rewards(tmp_path):
    text = write_report(write_run(tmp_path / "run")).read_text()
    assert HOSTILE not in text
    assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 3  # prompt, token and reference
    tokens = [(a["class"].split()[1:], a["style"], a["title"]) for a in Page(text).all("span") if "title" in a]
    assert tokens == [(["pos"], "--s:1.0", "+0.5"), (["neg"], "--s:0.71", "-0.25"), ([], "--s:0", "+0")]
    assert "colour: process reward, largest 0.5" in text


def test_missing_rewards_are_shown_as_such(tmp_path):
    text = write_report(write_run(tmp_path / "run", rewards=(float("nan"), 0.1))).read_text()
    titles = [a["title"] for a in Page(text).all("span") if "title" in a]
    assert titles == ["no value", "+0.1", "no value"]


def test_a_run_without_a_prm_colours_by_advantage_and_leaves_out_its_figures(tmp_path):
    path = write_report(write_run(tmp_path / "run", dense=False))
    assert not OF_THE_PRM & {file.stem for file in path.parent.glob("*.png")}
    text = path.read_text()
    assert "colour: advantage, largest 1" in text
    assert "outcome-only RLOO" in text


def test_further_runs_have_a_row_each_and_the_mean(tmp_path):
    runs = [write_run(tmp_path / str(i), seed=i, after=after) for i, after in enumerate((0.6, 0.7, 0.8))]
    path = write_report(runs[0], runs[1:])
    table = (path.parent / "summary.md").read_text().splitlines()
    assert table[0] == "model: smollm2-135m-instruct, task: chain_sum (max_terms=2), method: PRIME, steps: 3."
    assert len(table) == 2 + 2 + 4 + 2
    assert table[4].startswith("| seed 0 | 50.0 % [40.4, 59.6]")
    assert table[7].startswith("| mean of 3 runs |")
    assert "| 50.0 % | 70.0 % | +20.0 points (standard deviation 10.0) |" in table[7]
    text = path.read_text()
    assert all(f"<td>seed {seed}</td>" in text for seed in range(3))
    assert not (runs[1] / "report").exists()


def test_rows_say_what_is_not_known(tmp_path):
    run = write_run(tmp_path / "run", evals=False)
    (run / "config.json").unlink()
    row = summary_row(read_record(run))
    assert row["run"] == "run"
    assert {row[key] for key in ("model", "task", "method", "accuracy before", "accuracy after", "change")} == {"–"}
    assert (row["steps"], row["training time"]) == ("3", "3 min")
    write_report(run)


def test_a_step_logged_twice_counts_once_and_null_is_no_point(tmp_path):
    writer = MetricsWriter(tmp_path, None)
    for step, loss in ((1, 1.0), (2, float("nan")), (3, 3.0), (3, 4.0)):
        writer.log("rl", step, {"prm_loss": loss})
    writer.close()
    assert read_record(tmp_path).series("rl", "prm_loss") == ([1, 3], [1.0, 4.0])


def test_nothing_to_report_is_an_error_with_the_path(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no metrics\.jsonl: not the directory of a run"):
        write_report(tmp_path)
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(ValueError, match=r"metrics\.jsonl is empty: the run logged nothing yet"):
        write_report(tmp_path)
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1}) + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 1: expected an object with stage and step"):
        write_report(tmp_path)


def test_means_over_runs_and_steps():
    assert mean_of([([1, 2, 3], [1.0, 2.0, 3.0]), ([1, 3], [3.0, 5.0])]) == ([1, 3], [2.0, 4.0])
    assert running_mean([1.0, 2.0, 6.0, 4.0], 3) == [1.5, 3.0, 4.0, 5.0]


@pytest.mark.parametrize(
    ("seconds", "text"), [(42.4, "42 s"), (150.0, "2 min"), (3599.0, "1 h 0 min"), (3725, "1 h 2 min")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_markdown_cells_cannot_break_the_table(tmp_path):
    row = summary_row(read_record(write_run(tmp_path / "run"))) | {"task": "a|b\nc"}
    assert "| a\\|b c |" in markdown_page({}, [Table("Summary", [row], "a note")])
