"""One page to see embeddings condense, and disperse: tokens as points, a slider for the step and one for the layer.

    python -m nanodisp.explore out/<run>
    python -m nanodisp.explore out/<run> out/<other>                # side by side
    python -m nanodisp.explore out/<run> out/<other> animation=condensation.gif layer=3

Runs are shown from their snapshots: train them with train.snapshot_interval=25. The page is one file without a network.
"""

from __future__ import annotations

import nanodisp.process  # noqa: F401 - first: for what is loaded after it

# isort: split
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from nanodisp import cli
from nanodisp.config import CONFIG
from nanodisp.data.tokenizer import load_tokenizer
from nanodisp.errors import UserError
from nanodisp.explore import animation, page
from nanodisp.explore.scene import PROJECTIONS, Scene, build, unit
from nanodisp.files import write_whole
from nanodisp.runs import snapshots
from nanodisp.runs.folder import spec_in

MOST_RUNS = 2


@dataclass
class ExploreConfig:
    """What the page shows.

    tokens: the first so many tokens of the text, at most the 256 of a snapshot.
    projection: cone (angles to the tokens' common direction are exact), pca, tsne or umap (if installed).
    labels: names of the runs on the page, separated by "|"; null takes what tells them apart.
    out: the file to write; null is explore.html in the folder of the first run.
    animation: also write the same as an animated GIF of one layer to this file; null for none.
    layer: of the animation; null is the last one before the final norm.
    """

    tokens: int = 128
    projection: str = "cone"
    labels: str | None = None
    out: str | None = None
    animation: str | None = None
    layer: int | None = None

    def __post_init__(self) -> None:
        if self.tokens < 3:
            raise ValueError(f"tokens={self.tokens} must be at least 3")
        if self.projection not in PROJECTIONS:
            raise ValueError(f"projection={self.projection} is unknown; choose one of {', '.join(PROJECTIONS)}")
        if self.layer is not None and self.animation is None:
            raise ValueError(
                f"layer={self.layer} is of the animation: give animation=<file.gif>, too; the page has all"
            )
        if self.animation is not None and self.projection != "cone":
            raise ValueError("the animation shows projection=cone: leave out projection or animation")


def main(argv: Sequence[str]) -> None:
    names, options = cli.split_names(argv)
    config = cli.parse(ExploreConfig, options)
    if not 1 <= len(names) <= MOST_RUNS:
        raise UserError("give the folder of one run, or of two: python -m nanodisp.explore out/<run> out/<other>")
    folders = [Path(name) for name in names]
    runs = [snapshots.read(folder) for folder in folders]
    steps = snapshots.common_steps(runs)
    n_tokens = min(config.tokens, len(runs[0].tokens))
    directions = [np.stack([unit(run.hidden(step)[:, :n_tokens]) for step in steps]) for run in runs]
    views = build(label(folders, config.labels), directions, config.projection)
    scene = Scene(steps, spell(folders[0], runs[0].tokens[:n_tokens]), config.projection, views)
    layer = animation.choose_layer(scene, config.layer)
    out = Path(config.out) if config.out else folders[0] / "explore.html"
    text = page.render(scene).encode()
    write_whole(out, text)
    layers = " and ".join(str(view.means.shape[1] - 1) for view in views)
    print(f"{len(steps)} steps, {layers} layers, {n_tokens} tokens")
    print(f"wrote {out}, {len(text) / 1e6:.1f} MB")
    if config.animation:
        path = Path(config.animation)
        animation.write(path, scene, layer)
        print(f"wrote {path}, {path.stat().st_size / 1e6:.1f} MB")


def label(folders: Sequence[Path], given: str | None) -> list[str]:
    """The names of the runs: as given, else "lambda 0.1" if their lambdas differ, else the names of their folders."""
    if given is not None:
        labels = [each.strip() for each in given.split("|")]
        if len(labels) != len(folders):
            raise UserError(f"labels={given} names {len(labels)} runs, there are {len(folders)}: separate them by |")
        return labels
    lambdas = [read_section(folder, "dispersion").get("lambda_disp") for folder in folders]
    if len(set(map(str, lambdas))) == len(folders) and all(isinstance(value, (int, float)) for value in lambdas):
        return [f"lambda {value:g}" for value in lambdas]
    return [folder.resolve().name for folder in folders]


def spell(folder: Path, tokens: np.ndarray) -> list[str]:
    """The text of each token by the run's tokenizer; "#17" if it is not known."""
    spec = read_section(folder, "data").get("tokenizer")
    try:
        tokenizer = load_tokenizer(spec_in(folder, str(spec)))
    except UserError:
        return [f"#{token}" for token in tokens.tolist()]
    pieces = [tokenizer.decode_bytes([token]).decode("utf-8", "replace") for token in tokens.tolist()]
    return [piece or "⟨end⟩" for piece in pieces]


def read_section(folder: Path, name: str) -> dict[str, Any]:
    """A section of a run's config.yaml; empty if it cannot be read."""
    try:
        section = OmegaConf.to_container(OmegaConf.load(folder / CONFIG))[name]  # type: ignore[index, call-overload]
    except (OSError, YAMLError, OmegaConfBaseException, KeyError, TypeError):
        return {}
    return section if isinstance(section, dict) else {}


if __name__ == "__main__":
    cli.run(main, ExploreConfig)
