"""The page of a run: one file with the heads, the curves, the settings and what comes next."""

import html.parser
import json

import pytest
from PIL import Image
from tiny_run import hurry, run

from harness.page import MOST_POINTS, curve, next_commands, write_page


class Reader(html.parser.HTMLParser):
    """Collects what a page holds, and that every tag is closed."""

    def __init__(self):
        super().__init__()
        self.open, self.links, self.images, self.text, self.lines = [], [], [], [], 0

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.links += [values[name] for name in ("href", "src") if name in values]
        self.images += [values["src"]] if tag == "img" else []
        self.lines += tag == "polyline"
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.lines += tag == "polyline"

    def handle_data(self, data):
        self.text.append(data)


def read(path):
    reader = Reader()
    reader.feed(path.read_text())
    assert not reader.open
    return reader


def test_a_run_explains_itself_without_any_other_file(tmp_path):
    with pytest.MonkeyPatch.context() as monkeypatch:
        hurry(monkeypatch)
        rows = run(tmp_path / "a run", prompt="a <b> & c", steps=3)["log.jsonl"]
    page = read(tmp_path / "a run/index.html")
    text = " ".join(page.text)
    assert "a <b> & c" in text and "3 of 3 steps" in text
    assert f"python render.py --ckpt '{tmp_path / 'a run'}' --seeds 0-7" in text
    assert all(link.startswith("data:") for link in page.links) and len(page.images) == 1
    numbers = {name for row in rows for name in row} - {"step"} | {"seconds", "peak_gb"}
    assert page.lines == len(numbers) and all(f"{name}: " in text for name in numbers)


def test_the_picture_that_stands_for_the_domain_is_shown(tmp_path):
    settings = {"prompt": "", "method": "gca3d", "steps": 5, "image": "x.png", "seed": 0}
    settings |= {"generator": "g", "diffusion": "d", "clip": "c", "trunc": 1.0}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    for name, colour in (("grid-000000.png", "red"), ("reference.png", "blue")):
        Image.new("RGB", (8, 8), colour).save(tmp_path / name)
    write_page(tmp_path, tmp_path / "grid-000000.png")
    page = read(tmp_path / "index.html")
    assert len(page.images) == 2 and "0 of 5 steps" in " ".join(page.text)


def test_what_has_no_cameras_is_not_to_be_turned(tmp_path):
    solid, flat = (" ".join(next_commands(tmp_path, turns)) for turns in (True, False))
    assert "--orbit" in solid and "--mesh" in solid
    assert "--orbit" not in flat and "--mesh" not in flat and "--interpolate" in flat


def test_a_long_curve_has_few_points_and_keeps_its_ends():
    log = [{"step": step, "loss": float(step)} for step in range(1, 10_001)]
    drawn = curve("loss", log)
    points = drawn.partition('points="')[2].partition('"')[0].split()
    assert MOST_POINTS / 2 < len(points) <= MOST_POINTS
    first, last = (tuple(map(float, point.split(","))) for point in (points[0], points[-1]))
    assert first[0] == 0 and last[0] == 300 and first[1] > last[1]  # It rises.
    assert "last 9.99e+03" in drawn  # The mean of the last 25.


def test_a_curve_that_never_changes_can_be_drawn():
    assert "polyline" in curve("peak_gb", [{"step": 1, "peak_gb": 0.0}])
