"""A scene as one HTML page that needs nothing else: no network, no library.

`page.html` is the template, `page.css` its style; `read.js` decodes the data, `draw.js` draws, `page.js` has the
controls. Text of the runs reaches the page as JSON and is only ever set as text, never as HTML.
"""

from __future__ import annotations

import base64
import json
import zlib
from importlib.resources import files

import matplotlib
import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib.colors import to_hex

from nanodisp import __version__
from nanodisp.explore.scene import Scene

SCRIPTS = ("read.js", "draw.js", "page.js")
N_COLOURS = 64
LARGEST_ANGLE = np.pi


def render(scene: Scene) -> str:
    """The page's HTML."""
    template = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return template.from_string(_file("page.html")).render(
        scene=scene,
        version=__version__,
        style=Markup(_file("page.css")),
        script=Markup("\n".join(_file(name) for name in SCRIPTS)),
        data=Markup(in_script(describe(scene))),
        blobs=[
            (f"cosines-{run}-{layer}", pack(view.cosines[:, layer]))
            for run, view in enumerate(scene.views)
            for layer in range(view.cosines.shape[1])
        ],
    )


def describe(scene: Scene) -> dict[str, object]:
    """Everything but the cosines, for JSON."""
    shades = matplotlib.colormaps["viridis"](np.linspace(0, 1, N_COLOURS))
    return {
        "steps": list(scene.steps),
        "tokens": list(scene.tokens),
        "projection": scene.projection,
        "colours": [to_hex(shade) for shade in shades],
        "runs": [
            {
                "name": view.name,
                "layers": view.means.shape[1],
                "means": np.round(view.means, 4).tolist(),
                "places": encode_places(view.places, scene.projection),
            }
            for view in scene.views
        ],
    }


def encode_places(places: np.ndarray, projection: str) -> str:
    """Places as int16 in units of 1/32767, of pi if they are angles; little-endian, base64."""
    whole = LARGEST_ANGLE if projection == "cone" else 1.0
    return base64.b64encode(np.rint(places / whole * 32767).astype("<i2").tobytes()).decode()


def pack(cosines: np.ndarray) -> str:
    """int8 [S, P] as the differences from step to step (modulo 256), deflated, base64: a third smaller than without."""
    steps = np.diff(cosines.view(np.uint8), axis=0, prepend=np.uint8(0) * cosines[:1].view(np.uint8))
    return base64.b64encode(zlib.compress(steps.tobytes(), 6)).decode()


def in_script(value: object) -> str:
    """JSON that nothing in it can end: a token may be "</script>" or "<!--"."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _file(name: str) -> str:
    return (files("nanodisp.explore") / name).read_text(encoding="utf-8")
