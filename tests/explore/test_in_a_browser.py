"""The explorer's page in Chromium: sliders, keys and fingers move the points, and nothing fails."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import browser
import numpy as np
import pytest

from nanodisp.explore import page
from nanodisp.explore.scene import Scene, build, unit

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(browser.find() is None, reason="no Chromium: apt-get install chromium"),
]

STEPS, LAYERS, N_TOKENS = (0, 1, 2, 50), 4, 12
EVIL = "</script><img src=x onerror='window.hurt = 1'>"
TOKENS = [EVIL, "<!--", "<b>bold</b>", "\n", "  ", "é", "&amp;", "\u2028", *"abcd"]
RNG = np.random.default_rng(0)
STATES = [RNG.standard_normal((len(STEPS), LAYERS, N_TOKENS, 8)) + shift for shift in (0.0, 0.7)]
SCENE = Scene(STEPS, TOKENS, "cone", build(["lambda 0", "lambda 0.1 <i>"], [unit(z) for z in STATES], "cone"))
SHOWN = "panels.every((panel) => panel.pairs && panel.places) && !frame"
POINTS = "panels.map((panel) => panel.points.map((at) => at.slice(0, 2)))"
PLACE = "(({x, y, width, height}) => [x + width / 2, y + height / 2])"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Page]:
    folder = tmp_path_factory.mktemp("browser")
    (folder / "page.html").write_text(page.render(SCENE), encoding="utf-8")
    with browser.Page(folder / "page.html", folder / "profile") as opened:
        opened.wait_for(SHOWN)
        yield opened


@pytest.fixture
def at(shared: browser.Page) -> Iterator[browser.Page]:
    """The page at step 0 and layer 2, no token chosen; afterwards nothing may have failed."""
    shared.value("play(false), state.kept = state.token = -1, show(0, 2)")
    shared.wait_for(SHOWN)
    yield shared
    assert shared.errors == []
    assert shared.requests == [shared.url], "no network"
    assert shared.value("document.getElementById('error').hidden")


def test_the_sliders_move_the_points(at: browser.Page) -> None:
    for slider, value in (("step", 3), ("layer", 0)):
        before = np.array(at.value(POINTS))
        at.value(f"(element('{slider}').value = {value}, element('{slider}').dispatchEvent(new Event('input')))")
        at.wait_for(f"state.{slider} === {value} && {SHOWN}")
        moved = np.abs(np.array(at.value(POINTS)) - before).max(axis=(1, 2))
        assert (moved > 5).all(), "of both runs, by more than 5 pixels"
    assert at.value("element('step-value').textContent") == "50 of 50"
    assert at.value("element('step').getAttribute('aria-valuetext')") == "step 50"


@pytest.mark.parametrize(
    ("keys", "step", "layer"),
    [
        (["ArrowRight", "ArrowRight"], 2, 2),
        (["ArrowRight", "ArrowLeft", "ArrowLeft"], 0, 2),
        (["ArrowUp", "ArrowUp"], 0, 3),
        (["ArrowDown", "End"], 3, 1),
        (["End", "Home"], 0, 2),
    ],
    ids=str,
)
def test_the_keys(at: browser.Page, keys: list[str], step: int, layer: int) -> None:
    for key in keys:
        at.press(key)
    assert at.value("[state.step, state.layer]") == [step, layer]
    assert at.value("[element('step').value, element('layer').value]") == [str(step), str(layer)]


def test_it_plays_to_the_end_and_again_from_the_start(at: browser.Page) -> None:
    at.press(" ")
    assert at.value("[state.playing, element('play').textContent]") == [True, "Pause"]
    at.wait_for("state.step === 3 && !state.playing")
    assert at.value("(element('play').click(), state.step)") == 0
    at.press(" ")
    assert at.value("[state.playing, element('play').textContent]") == [False, "Play"]


def test_the_page_has_the_cosines_and_the_places_of_the_scene(at: browser.Page) -> None:
    for run, view in enumerate(SCENE.views):
        for layer in range(LAYERS):
            decoded = at.value(f"cosinesOf(data.runs[{run}], {layer}).then((all) => [...all])")
            assert decoded == view.cosines[:, layer].ravel().tolist()
    polar, around = SCENE.views[1].places[3, 1].T
    expected = np.stack([np.sin(polar) * np.cos(around), np.cos(polar), np.sin(polar) * np.sin(around)], axis=1)
    places = np.array(at.value("[...placesOf(data.runs[1], 3, 1)]")).reshape(-1, 3)
    assert places == pytest.approx(expected, abs=3e-4)
    u = STATES[0][2, 1] / np.linalg.norm(STATES[0][2, 1], axis=1, keepdims=True)
    pairs = at.value("cosinesOf(data.runs[0], 1).then((all) => [...all.subarray(2 * nPairs, 3 * nPairs)])")
    assert at.value(f"cosine({pairs}, 7, 4)") == pytest.approx(u[4] @ u[7], abs=0.005)


def test_a_token_under_the_mouse_lights_up_and_a_click_keeps_it(at: browser.Page) -> None:
    at.value("scrollTo(0, 0)")
    token = at.value("panels[0].points.findIndex((p, i) => nearest(panels[0], p[0], p[1], 16) === i)")
    x, y = at.value(
        f"(([left, top], [x, y]) => [left + x, top + y])((({{x, y}}) => [x, y])(panels[0].space."
        f"getBoundingClientRect()), panels[0].points[{token}])"
    )
    dark = at.value("spans.map((span) => span.style.backgroundImage)")
    at.mouse("mouseMoved", x, y)
    assert at.value("chosen()") == token
    assert at.value(f"spans[{token}].classList.contains('chosen')")
    assert at.value("spans.map((span) => span.style.backgroundImage)") != dark
    assert "is most like" in at.value("element('readout').textContent")
    at.mouse("mouseMoved", 2, 2)
    assert at.value("chosen()") == -1
    at.click(x, y)
    at.mouse("mouseMoved", 2, 2)
    assert at.value("chosen()") == token
    at.press(".")
    assert at.value("chosen()") == (token + 1) % N_TOKENS
    at.press("Escape")
    assert at.value("chosen()") == -1


def test_dragging_turns_both_spheres(at: browser.Page) -> None:
    at.value("scrollTo(0, 0)")
    before = np.array(at.value(POINTS))
    x, y = at.value(f"{PLACE}(panels[0].space.getBoundingClientRect())")
    at.mouse("mouseMoved", x, y)
    at.mouse("mousePressed", x, y, pressed=True)
    at.mouse("mouseMoved", x + 80, y + 20, pressed=True)
    at.mouse("mouseReleased", x + 80, y + 20)
    at.wait_for("!frame")
    assert (np.abs(np.array(at.value(POINTS)) - before).max(axis=(1, 2)) > 5).all()
    assert at.value("state.kept") == -1, "a drag chooses nothing"


def test_the_map_leads_to_its_step_and_layer(at: browser.Page) -> None:
    at.value("panels[1].map.scrollIntoView({block: 'center'})")
    x, y, width = at.value("(({x, y, width}) => [x, y, width])(panels[1].map.getBoundingClientRect())")
    at.click(x + width - 3, y + 3)
    assert at.value("[state.step, state.layer]") == [3, 3]


def test_tokens_are_text_and_never_html(at: browser.Page) -> None:
    assert at.value("data.tokens") == TOKENS
    assert at.value("spans[0].textContent") == EVIL
    assert at.value("[window.hurt, document.images.length, document.querySelectorAll('#text b').length]") == [
        None,
        0,
        0,
    ]
    assert at.value("document.querySelectorAll('h2')[1].textContent") == "lambda 0.1 <i>"


def test_on_a_phone_it_fits_and_follows_a_finger(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(page.render(SCENE), encoding="utf-8")
    with browser.Page(tmp_path / "page.html", tmp_path / "profile", fragment="#step=2&layer=1") as phone:
        phone.be_a_phone()
        phone.wait_for(SHOWN)
        assert phone.value("[state.step, state.layer, innerWidth]") == [2, 1, 390], "as the address asks"
        assert phone.value("document.documentElement.scrollWidth") == 390, "nothing to scroll to at the side"
        assert phone.value("panels.every((panel) => panel.space.clientWidth > 140)")
        phone.value("spans[9].scrollIntoView({block: 'center'})")
        x, y = phone.value(f"{PLACE}(spans[9].getBoundingClientRect())")
        phone.tap(x, y)
        phone.wait_for("state.kept === 9")
        before = phone.value("state.step")
        x, y = phone.value(f"{PLACE}(element('step').getBoundingClientRect())")
        phone.tap(x + 150, y)
        phone.wait_for(f"state.step > {before}")
        assert phone.errors == []
