"""The page of coloured steps: escaped, self-contained, and its colours follow the numbers in a real browser."""

import re
import shutil
import subprocess

import pytest
from matplotlib.image import imread

from prime_trainer.prm.page import colour, render

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs the Debian package chromium")


def row(label, single, texts=None, **extra):
    texts = texts or [f"step {k}\n" for k in range(len(single))]
    cumulative = [sum(single[: k + 1]) for k in range(len(single))]
    rewards = {
        "steps": texts, "cu_steps": list(range(len(single) + 1)), "single": single, "cumulative": cumulative,
        "tokens": texts, "token_rewards": single,
    }  # fmt: skip
    return {"prompt": "2 + 3?", "response": "".join(texts), "label": label, "rewards": rewards, **extra}


def test_colour_scale():
    assert colour(0.0, 2.0) == colour(0.0, 0.0) == "rgb(255, 255, 255)"
    assert colour(2.0, 2.0) == "rgb(70, 130, 235)" and colour(-2.0, 2.0) == "rgb(235, 85, 75)"
    assert colour(0.5, 2.0) == "rgb(162, 192, 245)"  # the square root of a quarter is half the way
    assert colour(9.0, 2.0) == colour(2.0, 2.0)


def test_numbers_and_curve():
    page = render([row(1, [1.0, -0.5]), row(0, [-1.0]), row(None, [0.0])], "run")
    assert page.count('<article class="correct"') == page.count('<article class="incorrect"') == 1
    assert re.search(
        r"all 3</button>.*correct 1</button>.*incorrect 1</button>.*unlabelled 1</button>", page, re.DOTALL
    )
    assert "step 2: single -0.5, cumulative +0.5" in page and "sum +0.5" in page and "lowest step -0.5" in page
    # From 0 up to 1 and down to 0.5 in a drawing of 320 x 150 with a margin of 8.
    assert 'points="8.0,142.0 160.0,8.0 312.0,75.0"' in page and 'y1="142.0"' in page


def test_untrusted_text_is_escaped_and_nothing_is_loaded():
    evil = '</span><script>alert(1)</script><img src="http://x/y" onerror="x">'
    page = render([row(1, [1.0], [evil], prompt=evil, reward_model=evil)], evil)
    assert "<script>alert" not in page and "<img" not in page and page.count("<script>") == 1
    assert "&lt;script&gt;alert(1)" in page
    assert "default-src 'none'" in page and not re.search(r'(src|href)="http', page)


def screenshot(page, tmp_path, fragment=""):
    path = tmp_path / "page.html"
    path.write_text(page, encoding="utf-8")
    picture = tmp_path / f"page{fragment.strip('#')}.png"
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--force-device-scale-factor=1",
        "--window-size=1000,900", f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={picture}",
        f"{path.as_uri()}{fragment}",
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return (imread(picture)[:, :, :3] * 255).round().astype(int)


def parse(text):
    return tuple(map(int, re.findall(r"\d+", text)))


def area(picture, wanted):
    return int((picture == wanted).all(-1).sum())


@needs_chromium
def test_colours_follow_the_numbers_and_the_filter_filters(tmp_path):
    right, wrong = row(1, [1.0, 0.25]), row(0, [-1.0, -0.25, 0.0])
    page = render([right, wrong], "colours")
    full = {value: parse(colour(value, 1.0)) for value in (1.0, 0.25, -1.0, -0.25)}
    picture = screenshot(page, tmp_path)
    # A mark is about 83 x 26 pixels, its text takes some; the tokens beside it have the colour, too.
    for value, expected in full.items():
        assert area(picture, expected) > 1000, value
    only_right = screenshot(page, tmp_path, "#correct")
    assert all(area(only_right, full[value]) > 1000 for value in (1.0, 0.25))
    assert area(only_right, full[-1.0]) == area(only_right, full[-0.25]) == 0
    only_wrong = screenshot(page, tmp_path, "#incorrect")
    assert area(only_wrong, full[1.0]) == 0 and area(only_wrong, full[-1.0]) > 1000
    # Turned round, the colours turn, too.
    turned = screenshot(render([row(1, [-1.0, -0.25])], "colours"), tmp_path)
    assert area(turned, full[1.0]) == 0 and area(turned, full[-1.0]) > 1000
