"""Benchmarks of EleutherAI's lm-evaluation-harness on a model.

    python -m nanodisp.evaluate checkpoint=out/<run> tasks=paper limit=500
    python -m nanodisp.evaluate checkpoint=hf:gpt2 tasks=hellaswag,arc_easy num_fewshot=5

`checkpoint` is a run's folder, one of its checkpoints, a Hugging Face folder or hf:<id>. Our checkpoints are asked
through `harness.py`, others through the harness's own `hf` model, from safetensors and without code of their authors.
Figures come as a table, and go to evaluation.json beside the model, one task after the other: a later call adds its
tasks, or replaces them. Each task is run on its own with the same seed, so its figures do not depend on the others.

`tasks=paper` are the benchmarks of arXiv 2602.00217, with the shots of its authors' code for GPT-2 (github.com/
ChenLiu-1996/LM-Dispersion): none, and one for arc, mmlu and medmcqa, which `num_fewshot` changes. They take the
first 500 examples of each task: limit=500.
"""

from __future__ import annotations

import difflib
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from nanodisp import arguments, checkpoint, distributed, hf
from nanodisp.errors import UserError, first_line, optional
from nanodisp.runs import EVALUATION, main_metric, read_evaluation
from nanodisp.shards import write_whole
from nanodisp.tokenizer import load_tokenizer

ZERO_SHOT = (
    *("anli_r1", "anli_r2", "anli_r3", "hellaswag", "lambada_openai", "openbookqa"),
    *("paloma_wikitext_103", "piqa", "truthfulqa_mc2", "winogrande"),
)
FEW_SHOT = ("arc_easy", "arc_challenge", "mmlu", "medmcqa")
SHOTS = 1  # of the paper's few-shot tasks


@dataclass
class EvaluateConfig:
    """What to ask, and how.

    tasks: "paper", or names of the harness (tasks, groups or tags) with commas between.
    task_folder: of YAML files in the harness's format, with tasks of one's own. Their `!function` lines run code.
    limit: examples of each task, the first ones; null takes all.
    num_fewshot: examples in front of each question; null takes what the task says, 1 for the paper's few-shot ones.
    batch_size: sequences of full context at once.
    seed: of everything that the harness draws, such as the examples in front.
    tokenizer: byte, gpt2 or the path of a .tiktoken file, where that of one of our runs is not at hand.
    out: the file to write; null takes evaluation.json in the model's folder, or in out/<model> for one from the hub.
    """

    checkpoint: str = arguments.MISSING
    tasks: str = arguments.MISSING
    task_folder: str | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    batch_size: int = 8
    seed: int = 1234
    device: str = "auto"
    tokenizer: str | None = None
    out: str | None = None

    def __post_init__(self) -> None:
        for name in ("limit", "batch_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise ValueError(f"num_fewshot={self.num_fewshot} must not be negative")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed} must lie between 0 and 2**32 - 1")
        if not all(self.tasks.split(",")):
            raise ValueError(f"tasks={self.tasks} has an empty name: give paper, or names with commas between")


@dataclass
class Subject:
    """A model as the harness asks it; what names it in evaluation.json; the folder that its figures go to."""

    model: Any
    name: str
    folder: Path


def main(argv: Sequence[str]) -> None:
    config = arguments.parse(EvaluateConfig, argv)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("a model is asked by one process: run python -m nanodisp.evaluate without torchrun")
    harness = optional("lm_eval")
    device = distributed.start(config.device).device
    names = dict.fromkeys((*ZERO_SHOT, *FEW_SHOT) if config.tasks == "paper" else config.tasks.split(","))
    manager = find_tasks(names, config.task_folder)
    subject = open_subject(config, str(device))
    out = Path(config.out) if config.out else subject.folder / EVALUATION
    told = read_evaluation(out)
    if told and told["model"] != subject.name:
        raise UserError(
            f"{out} is of {told['model']}, this is {subject.name}: name another file with out=…, or delete it"
        )
    figures: dict[str, Any] = told["tasks"] if told else {}
    asked: dict[str, Any] = {}
    failures: list[str] = []
    for name in names:
        try:
            loaded = load(manager, name)
        except UserError as error:  # the other tasks are asked all the same
            failures.append(str(error))
            continue
        shots = config.num_fewshot
        if config.tasks == "paper":
            shots = 0 if name in ZERO_SHOT else SHOTS if shots is None else shots
        results = harness.simple_evaluate(
            model=subject.model,
            tasks=loaded,
            task_manager=manager,
            num_fewshot=shots,
            limit=config.limit,
            log_samples=False,
            random_seed=config.seed,
            numpy_random_seed=config.seed,
            torch_random_seed=config.seed,
            fewshot_random_seed=config.seed,
        )
        new = {task: {**entry, "seed": config.seed} for task, entry in entries(results)}
        asked |= new
        figures |= new
        save(out, {"model": subject.name, "harness": harness.__version__, "tasks": figures})
    if asked:
        print(table(asked))
        print(f"wrote {out}")
    if failures:
        raise UserError("\n".join(failures))


# --- the model, the tasks ------------------------------------------------------------------------


def open_subject(config: EvaluateConfig, device: str) -> Subject:
    """The model that `config.checkpoint` names; UserError where there is none."""
    path = Path(config.checkpoint)
    if config.checkpoint.startswith("hf:") or (path / "config.json").is_file():
        name = config.checkpoint.removeprefix("hf:")
        if config.tokenizer is not None:
            raise UserError("tokenizer=… is for our own runs: a Hugging Face model has its own")
        if path.is_dir() and not list(path.glob("tokenizer*")) and not (path / "vocab.json").is_file():
            raise UserError(f"{path} has no tokenizer: put its tokenizer.json there")
        optional("accelerate")
        theirs = optional("lm_eval.models.huggingface")
        try:
            model = theirs.HFLM(
                name, device=device, batch_size=config.batch_size, trust_remote_code=False, use_safetensors=True
            )
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(f"{name} can not be loaded: {first_line(error)}") from error
        return Subject(model, name, hf.folder_of(name))
    saved = checkpoint.load(checkpoint.find(path))
    tokenizer = load_tokenizer(config.tokenizer or hf.spec_of(saved))
    gpt = hf.build(hf.read_checkpoint(saved)).to(device).eval()
    from nanodisp.harness import HarnessModel  # here: it needs the harness

    run = saved.path.resolve().parent.parent
    return Subject(HarnessModel(gpt, tokenizer, config.batch_size), f"{run.name} at step {saved.step}", run)


def find_tasks(names: Sequence[str] | dict[str, None], folder: str | None) -> Any:
    """The harness's `TaskManager` that knows these tasks; UserError for a name that it does not know.

    Its own tasks take it seconds to list, so they are looked at only for what `folder` does not have.
    """
    tasks = optional("lm_eval.tasks")
    if folder is not None and not Path(folder).is_dir():
        raise UserError(f"task_folder={folder} is no folder: give one of YAML files in the harness's format")
    manager = tasks.TaskManager(include_path=folder, include_defaults=False)
    if not set(names) <= set(manager.all_tasks):
        manager = tasks.TaskManager(include_path=folder)
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else "lm-eval ls tasks lists what there is"
            raise UserError(f"tasks={name} is unknown; {hint}")
    return manager


def load(manager: Any, name: str) -> list[Any]:
    """A task or a group with its data, or a tag's tasks, for `simple_evaluate`; UserError where they can not be had."""
    try:
        loaded = manager.load([name])
    except Exception as error:  # of many kinds, from the harness, three libraries and the network
        reason = " ".join(f"{type(error).__name__} {error}".split())[:200]
        raise UserError(
            f"task {name} can not be loaded, with its data from the hub or a local file: {reason}"
        ) from error
    return [loaded["groups"][name]] if name in loaded["groups"] else list(loaded["tasks"].values())


# --- the figures ---------------------------------------------------------------------------------


def entries(results: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The tasks of the harness's results and their figures: of a group that has figures itself, only those."""
    within = {child for group, children in results["group_subtasks"].items() for child in children}
    names = [name for name in results["results"] if name not in within]
    for name in names:
        metrics = dict(metrics_of(results, name))
        if not metrics:  # a group that is no more than its tasks
            names += results["group_subtasks"].get(name, [])
            continue
        leaves = list(leaves_of(results["group_subtasks"], name))
        shots = {results["n-shot"][leaf] for leaf in leaves}
        yield (
            name,
            {
                "metrics": metrics,
                "shots": shots.pop() if len(shots) == 1 else None,
                "examples": sum(results["n-samples"][leaf]["effective"] for leaf in leaves),
                "version": results["versions"].get(name),
            },
        )


def leaves_of(subtasks: dict[str, list[str]], name: str) -> Iterator[str]:
    """The tasks that a group is made of, or the task itself."""
    if not subtasks.get(name):
        yield name
    for child in subtasks.get(name, []):
        yield from leaves_of(subtasks, child)


def metrics_of(results: dict[str, Any], name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """A task's metrics: value, standard error, whether higher is better. Of several filters each is one."""
    for key, value in results["results"][name].items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        stderr = results["results"][name].get(f"{metric}_stderr,{filtered}")
        yield (
            metric if filtered == "none" else key,
            {
                "value": number_or_none(value),
                "stderr": number_or_none(stderr),
                "higher_is_better": (results["higher_is_better"].get(name) or {}).get(metric),
            },
        )


def number_or_none(value: Any) -> float | None:
    """JSON has no NaN, and the harness says "N/A"."""
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def save(path: Path, told: dict[str, Any]) -> None:
    """Write evaluation.json, whole or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path} can not be written: {error.strerror}; choose another with out=…") from error
    write_whole(path, json.dumps(told, indent=2).encode() + b"\n")


def table(figures: dict[str, Any]) -> str:
    """A line per metric of each task, and the mean of those that `main_metric` chooses and of which more is better."""
    lines = [f"{'task':24} {'metric':18} {'value':>9} {'stderr':>8} {'shots':>5} {'examples':>8}"]
    show = lambda value: "\N{EN DASH}" if value is None else f"{value:.4f}"  # noqa: E731
    for task, entry in figures.items():
        for metric, figure in entry["metrics"].items():
            shots = "mixed" if entry["shots"] is None else entry["shots"]
            value, stderr = show(figure["value"]), show(figure["stderr"])
            lines.append(f"{task:24} {metric:18} {value:>9} {stderr:>8} {shots:>5} {entry['examples']:8,}")
    chosen = [entry["metrics"][main_metric(entry)] for entry in figures.values()]
    if rising := [figure for figure in chosen if figure["higher_is_better"] and figure["value"] is not None]:
        mean = sum(figure["value"] for figure in rising) / len(rising)
        error = math.sqrt(sum((figure["stderr"] or 0.0) ** 2 for figure in rising)) / len(rising)
        lines.append(f"{'mean':24} {f'of {len(rising)} tasks':18} {mean:9.4f} {error:8.4f}")
    return "\n".join(lines)


if __name__ == "__main__":
    arguments.run(main)
