"""The command of the explorer, its page without a browser, and the animation."""

from __future__ import annotations

import base64
import json
import re
import zlib
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import browser
import numpy as np
import pytest
import torch
from PIL import Image

from nanodisp.errors import UserError
from nanodisp.explore import __main__ as explore
from nanodisp.explore import animation, page
from nanodisp.explore.scene import Scene, build, unit
from nanodisp.runs import snapshots

RNG = np.random.default_rng(0)
TEXT = list(b"a <b>x</b>\n\xc3\xa9 1")


def write_run(folder: Path, disp: float, steps: tuple[int, ...] = (0, 1, 10), layers: int = 3) -> Path:
    """A run's folder with snapshots of `TEXT`, and as much of its configuration as is read."""
    for step in steps:
        hidden = torch.from_numpy(RNG.standard_normal((layers, len(TEXT), 8)))
        snapshots.write(folder / "snapshots", step, torch.tensor(TEXT), hidden)
    config = f"data: {{tokenizer: byte}}\ndispersion: {{lambda_disp: {disp}}}\n"
    (folder / "config.yaml").write_text(config)
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> tuple[str, str]:
    return str(write_run(tmp_path / "off", 0.0)), str(write_run(tmp_path / "on", 0.1, steps=(0, 10, 20)))


class Reader(HTMLParser):
    """The elements of a page, and the text of its script elements by id."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: dict[str, str] = {}
        self.open = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open = dict(attrs).get("id") or "" if tag == "script" else ""

    def handle_data(self, data: str) -> None:
        if self.open:
            self.scripts[self.open] = self.scripts.get(self.open, "") + data


def test_the_page_holds_both_runs_at_their_common_steps(
    runs: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    explore.main(runs)
    file = Path(runs[0]) / "explore.html"
    assert f"wrote {file}, " in capsys.readouterr().out
    scripts = Reader(file.read_text(encoding="utf-8")).scripts
    data = json.loads(scripts["data"])
    assert data["steps"] == [0, 10]
    assert [run["name"] for run in data["runs"]] == ["lambda 0", "lambda 0.1"]
    assert "".join(data["tokens"]) == "a <b>x</b>\n\ufffd\ufffd 1", "half a character is no text"

    hidden = snapshots.read(Path(runs[1])).hidden(10)[2]
    u = hidden / np.linalg.norm(hidden, axis=1, keepdims=True)
    exact = (u @ u.T)[np.triu_indices(len(TEXT), 1)]
    changes = np.frombuffer(zlib.decompress(base64.b64decode(scripts["cosines-1-2"])), np.uint8).reshape(2, -1)
    assert np.cumsum(changes, axis=0, dtype=np.uint8).view(np.int8)[1] / 127 == pytest.approx(exact, abs=0.005)
    assert data["runs"][1]["means"][1][2] == pytest.approx(exact.mean(), abs=1e-4)
    places = np.frombuffer(base64.b64decode(data["runs"][0]["places"]), "<i2").reshape(2, 3, len(TEXT), 2)
    assert places[..., 0].min() >= 0 and places[..., 0].max() <= 32767
    assert {f"cosines-{run}-{layer}" for run in range(2) for layer in range(3)} | {"data"} == set(scripts)


def test_one_run_and_fewer_tokens(runs: tuple[str, str], tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    explore.main([runs[1], "tokens=5", f"out={out}", "labels=mine"])
    data = json.loads(Reader(out.read_text(encoding="utf-8")).scripts["data"])
    assert data["steps"] == [0, 10, 20] and len(data["tokens"]) == 5 and data["runs"][0]["name"] == "mine"


@pytest.mark.parametrize("evil", ["</script><script>alert(1)</script>", "<!--<script>", "\u2028", '"\\', "<img src=x>"])
def test_no_token_and_no_name_can_leave_its_place(evil: str) -> None:
    z = RNG.standard_normal((1, 2, 3, 4))
    text = page.render(Scene([0], [evil, "b", "c"], "cone", build([evil], [unit(z)], "cone")))
    plain = page.render(Scene([0], ["a", "b", "c"], "cone", build(["a"], [unit(z)], "cone")))
    read = Reader(text)
    assert json.loads(read.scripts["data"])["tokens"][0] == evil
    assert [tag for tag, _ in read.tags] == [tag for tag, _ in Reader(plain).tags]


def test_the_page_asks_for_nothing() -> None:
    text = page.render(
        Scene([0], ["a", "b", "c"], "cone", build(["a"], [unit(RNG.standard_normal((1, 2, 3, 4)))], "cone"))
    )
    assert not re.search(r"https?://|//[a-z]|\bimport\b|@import|url\(", text.replace("://developer", ""))
    for _, attributes in Reader(text).tags:
        assert not {"src", "href", "action"} & attributes.keys()
        assert not [name for name in attributes if name.startswith("on")], "no handlers in attributes"
    assert "default-src 'none'" in text


@pytest.mark.parametrize("config", ["dispersion: 3\ndata: [1]\n", "dispersion: {lambda_disp: high}\n", "- 1\n", ": :"])
def test_a_run_whose_configuration_is_damaged_is_named_by_its_folder(tmp_path: Path, config: str) -> None:
    run = write_run(tmp_path / "mine", 0.1)
    (run / "config.yaml").write_text(config)
    assert explore.label([run], None) == ["mine"]
    assert explore.spell(run, np.array([7])) == ["#7"]


def test_runs_of_the_same_lambda_are_named_by_their_folders(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, 0.1) for name in ("a", "b")]
    assert explore.label(folders, None) == ["a", "b"]
    (folders[0] / "config.yaml").unlink()
    assert explore.label(folders, None) == ["a", "b"]
    assert explore.spell(folders[0], np.array([97, 98])) == ["#97", "#98"], "the tokenizer is not known"
    assert explore.spell(folders[1], np.array([97, 256])) == ["a", "⟨end⟩"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give the folder of one run, or of two"),
        (["{a}", "{a}", "{a}"], "give the folder of one run, or of two"),
        (["{a}", "projection=mds"], "projection=mds is unknown; choose one of cone, pca, tsne, umap"),
        (["{a}", "tokens=2"], "tokens=2 must be at least 3"),
        (["{a}", "labels=x|y"], r"labels=x\|y names 2 runs, there are 1"),
        (["{a}", "animation=x.gif", "layer=7"], "layer=7 does not exist: the runs have layers 0 to 2"),
        (["{a}", "layer=1"], "give animation="),
        (["{a}", "animation=x.gif", "projection=pca"], "the animation shows projection=cone"),
        (["{a}/config.yaml"], "is not a folder"),
    ],
    ids=str,
)
def test_mistakes_are_one_line(runs: tuple[str, str], tmp_path: Path, arguments: list[str], message: str) -> None:
    given = [each.format(a=runs[0]).replace("=x.gif", f"={tmp_path}/x.gif") for each in arguments]
    with pytest.raises(UserError, match=message):
        explore.main([*given, f"out={tmp_path / 'page.html'}"])
    assert not (tmp_path / "page.html").exists()


def test_the_animation_shows_every_step_and_the_way_between(runs: tuple[str, str], tmp_path: Path) -> None:
    file = tmp_path / "new" / "a.gif"
    explore.main([*runs, f"animation={file}", "layer=1", f"out={tmp_path / 'page.html'}"])
    with Image.open(file) as picture:
        assert picture.n_frames == animation.BETWEEN * (2 - 1) + 1
        pictures = [np.asarray(frame.convert("RGB")).astype(int) for frame in each_frame(picture)]
    assert np.abs(pictures[0] - pictures[-1]).max() > 50
    left, right = np.hsplit(pictures[0][:300], 2)
    assert np.abs(left - right).max() > 50, "two runs"


def each_frame(picture: Image.Image) -> list[Image.Image]:
    frames = []
    for number in range(getattr(picture, "n_frames", 1)):
        picture.seek(number)
        frames.append(picture.copy())
    return frames


def test_the_camera_of_the_animation_keeps_lengths_and_moves_along_the_sphere() -> None:
    places = np.stack([RNG.uniform(0, np.pi, (2, 9)), RNG.uniform(-np.pi, np.pi, (2, 9))], axis=2)
    for time in (0.0, 0.5, 1.0):
        points = animation.moved(places, time)
        assert np.linalg.norm(points, axis=1) == pytest.approx(np.ones(9))
        assert np.linalg.norm(animation.seen(points), axis=1) == pytest.approx(np.ones(9))
    halfway = animation.on_sphere(places[0]) + animation.on_sphere(places[1])
    halfway /= np.linalg.norm(halfway, axis=1, keepdims=True)
    assert animation.moved(places, 0.5) == pytest.approx(halfway)
    assert animation.moved(places, 1.0)[:, 1] == pytest.approx(np.cos(places[1, :, 0]))


def test_the_browser_of_the_tests_is_looked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert browser.find() is None, "then the tests in a browser are skipped"


def test_an_animation_is_of_runs_of_equal_depth() -> None:
    def scene(*depths: int) -> Scene:
        views = [SimpleNamespace(means=np.zeros((2, depth + 1))) for depth in depths]
        return Scene([0, 1], [], "cone", views)  # type: ignore[arg-type]

    assert animation.choose_layer(scene(4, 4), None) == 3
    with pytest.raises(UserError, match="these have 4 and 12: give runs of equal depth"):
        animation.choose_layer(scene(12, 4), 2)
