"""The page of a run: all it needs is in it, what it shows is what the run wrote, and nothing in the run can break out of it."""

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fastdit import config as C
from fastdit.config import UserError
from fastdit.quality import charts, evaluation
from fastdit.recipes import RECIPES
from fastdit.report import Options, grids, report
from fastdit.runtime.run import save_config

pytest.importorskip("matplotlib")

PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==")


class Page(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def finished(folder: Path, *, gpu: bool, num: int = 20, **groups) -> Path:
    """What a run of `num` lines leaves."""
    run = folder / "runs" / "a run"
    (run / "samples").mkdir(parents=True)
    save_config(C.replace(RECIPES["cats"], **groups), run / "config.json")
    with (run / "metrics.jsonl").open("w") as file:
        for i in range(1, num + 1):
            line = {"images": 100 * i, "step": i, "loss": 2 / i, "grad_norm": 1.0, "lr": 1e-3, "img_per_s": 50.0, "mfu": None}
            line |= {"memory_gib": 1.5, "skipped": 3, "seconds": 2.0 * i}
            line |= {"watts": 400.0, "j_per_img": 0.5 if i > 1 else 2.0} if gpu else {"watts": None, "j_per_img": None}
            file.write(json.dumps(line) + "\n")
        file.write('{"images": 2100, "lo')  # a kill tore the last line
    for i in range(1, 31):
        (run / "samples" / f"{i * 60:09d}.png").write_bytes(PNG + bytes([i]))
    return run


def evaluated(run: Path) -> None:
    settings = {"metric": "offline", "num": 500, "seed": 0, "sampler": "auto", "steps": 20, "guidance": 1.0}
    for images, kid in ((1000, 0.5), (2000, 0.25)):
        found = {"images": images, **settings, "against": "500 images of 1,000 held-out embedded cats", "kid": kid}
        evaluation.record(run, {**found, "kid_floor": -0.0012, "coverage": 0.5, "nearest_floor": None})


def test_the_page_holds_the_run_and_needs_nothing_else(tmp_path):
    run = finished(tmp_path, gpu=True)
    evaluated(run)
    (run / "classes.json").write_text('["<b>tabby</b>", "black"]')
    path = report(Options(str(run), grids=4))
    assert path == run / "report.html"
    text = path.read_text()
    page = Page(text)
    links = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href", "srcset")]
    assert all(link.startswith("data:image/png;base64,") for link in links)
    inside = [value for _, attributes in page.tags for name, value in attributes.items() if name == "xlink:href"]
    assert all(link.startswith("#") for link in inside)
    assert not re.search(r"url\((?!#)", text)
    assert not re.search(r"https?://(?!www\.w3\.org/(2000/svg|1999/xlink)\")", text)
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}

    images = [base64.b64decode(a["src"].partition("base64,")[2]) for tag, a in page.tags if tag == "img"]
    assert [image[-1] for image in images] == [8, 15, 23, 30]  # evenly spread, the last among them
    assert all(image[:-1] == PNG for image in images)
    assert "1,800 images" in page.text

    assert "<b>tabby</b>, black" in page.text
    for said in ("a run", "2,000 of 60,000", "0.7 min, 50.0 images per second", "loss", "power of one node", "steps skipped"):
        assert said in page.text, said
    # 100 images at 2 J and 1,900 at 0.5 J
    assert f"{(100 * 2 + 1900 * 0.5) / 3.6e6:,.3f} kWh, {(100 * 2 + 1900 * 0.5) / 2000:,.3g} J per image" in page.text
    assert "0.25 (-0.0012)" in page.text
    assert "not comparable with published FID" in page.text
    assert '"width": 192' in page.text


def test_without_a_gpu_there_is_no_power_and_without_evaluations_no_quality(tmp_path):
    page = Page(report(Options(str(finished(tmp_path, gpu=False)))).read_text())
    for absent in ("power", "energy", "MFU", "Quality"):
        assert absent not in page.text, absent
    assert sum(tag == "img" for tag, _ in page.tags) == 12


def test_nothing_of_a_run_breaks_out_of_its_page(tmp_path):
    evil = "</pre></td><script>alert(1)</script><img src=x onerror=alert(1)>"
    run = finished(tmp_path, gpu=False, data={"path": evil})
    evaluation.record(run, {"images": 100, "metric": evil, "num": evil, "against": evil, "kid": 1.0})
    page = Page(report(Options(str(run))).read_text())
    assert "script" not in {tag for tag, _ in page.tags}
    assert not any("onerror" in attributes for _, attributes in page.tags)
    assert evil in page.text


def test_grids_are_named_by_images_seen_alone(tmp_path):
    for name in ("000000100.png", "20.png", "other.png", "1e3.png"):
        (tmp_path / name).write_bytes(b"x")
    assert [images for images, _ in grids(tmp_path, 5)] == [20, 100]
    assert grids(tmp_path / "none", 5) == []


def test_the_grids_come_first(tmp_path):
    run = finished(tmp_path, gpu=False)
    evaluated(run)
    text = report(Options(str(run))).read_text()
    assert text.index("Samples over time") < text.index("<h2>Training") < text.index("<h2>Quality") < text.index("<h2>Config")


@pytest.mark.parametrize("linked", ["grid", "samples", "evaluations", "metrics", "config"])
def test_no_link_in_a_run_is_followed(tmp_path, linked):
    run = finished(tmp_path, gpu=False)
    evaluated(run)
    place = {
        "grid": run / "samples" / "000001860.png",
        "samples": run / "samples",
        "evaluations": run / evaluation.LINES,
        "metrics": run / "metrics.jsonl",
        "config": run / "config.json",
    }[linked]
    target = tmp_path / place.name
    if linked == "grid":
        target.write_bytes(PNG + b"secret")
    else:
        place.rename(target)
    place.symlink_to(target)
    if linked in ("metrics", "config"):
        with pytest.raises(UserError, match=r"metrics.jsonl: Too many levels|not a readable config"):
            report(Options(str(run)))
        return
    text = report(Options(str(run))).read_text()
    assert base64.b64encode(PNG + b"secret").decode() not in text
    assert ("<img" in text) == (linked != "samples")
    assert ("<h2>Quality" in text) == (linked != "evaluations")


def test_lines_of_wrong_types_and_depth_do_not_stop_the_page(tmp_path):
    run = finished(tmp_path, gpu=True)
    odd = [None, True, "x", [1], {"a": 1}, 10**400, 1e308, -1e308]
    keys = ("loss", "grad_norm", "lr", "seconds", "skipped", "j_per_img")
    rows = [{"images": 2100, key: value} for key in keys for value in odd]
    rows += [{"images": value, "loss": 1.0} for value in (True, "9", None, 10**400, [], -5)]
    rows.append({"images": 2200, "skipped": "many", "seconds": [], "loss": {}})
    with (run / "metrics.jsonl").open("a") as file:
        file.write("\n" + "[" * 100_000 + '\n{"images": NaN, "loss": Infinity}\n')
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    with (run / evaluation.LINES).open("w") as file:
        for value in odd:
            line = {"metric": "offline", "images": 100, "kid": value, "kid_floor": value, "num": value, "against": value}
            file.write(json.dumps(line) + "\n")
    page = Page(report(Options(str(run))).read_text())
    assert "2,200 of 60,000" in page.text
    assert "steps skipped" not in page.text


def test_without_matplotlib_one_line_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setattr(charts, "installed", lambda: False)
    run = finished(tmp_path, gpu=False)
    with pytest.raises(UserError, match=r"charts are made by matplotlib: pip install 'fastdit\[eval\]'"):
        report(Options(str(run)))
    evaluated(run)  # an evaluation in training is kept all the same
    assert len(evaluation.evaluations(run)) == 2
    assert not (run / evaluation.CURVE).exists()


def test_what_is_no_run_is_one_line(tmp_path):
    with pytest.raises(UserError, match="is no run folder"):
        report(Options(str(tmp_path)))
    run = finished(tmp_path, gpu=False)
    with pytest.raises(UserError, match="--grids is 0"):
        report(Options(str(run), grids=0))
    with pytest.raises(UserError, match=r"was not written: (Not a directory|File exists)"):
        report(Options(str(run), out=str(run / "config.json" / "report.html")))
    (run / "metrics.jsonl").write_text("not json\n")
    with pytest.raises(UserError, match="no line of metrics yet"):
        report(Options(str(run)))
    (run / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match="No such file"):
        report(Options(str(run)))
