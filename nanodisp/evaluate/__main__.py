"""Run benchmarks of EleutherAI's lm-evaluation-harness on a model, or score its embeddings of texts.

    python -m nanodisp.evaluate checkpoint=out/<run> tasks=paper limit=500
    python -m nanodisp.evaluate checkpoint=hf:gpt2 tasks=hellaswag,arc_easy num_fewshot=5
    python -m nanodisp.evaluate checkpoint=out/<run> tasks=retrieval,similarity,probes data=<folder>

`checkpoint` is a run's folder, one of its checkpoints, a Hugging Face folder or hf:<id>. Runs are evaluated through
`harness.py`, others through the harness's own `hf` model, from safetensors and without running code of their authors.
Results are printed as a table and written to evaluation.json beside the model, task by task: a later call adds or
replaces tasks. Each task is run on its own with the same seed, so its figures do not depend on the others.

`tasks=paper` selects the benchmarks of arXiv 2602.00217, with the shots of its authors' code for GPT-2 (github.com/
ChenLiu-1996/LM-Dispersion): none, but one for arc, mmlu and medmcqa, which `num_fewshot` changes. The paper uses the
first 500 examples of each task: limit=500.
"""

from __future__ import annotations

import nanodisp.process  # noqa: F401 - first: for what is loaded after it

# isort: split
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nanodisp import cli
from nanodisp.distributed import of_torchrun, start
from nanodisp.errors import UserError, first_line, optional
from nanodisp.evaluate.embeddings import open_embedder
from nanodisp.evaluate.results import entries, save, table
from nanodisp.evaluate.text_tasks import TASKS, Settings, evaluate, is_of_texts
from nanodisp.hf.open import folder_of, is_hugging_face, load_their_tokenizer, need_causal, open_run
from nanodisp.runs.evaluation import EVALUATION, read_evaluation

ZERO_SHOT = (
    *("anli_r1", "anli_r2", "anli_r3", "hellaswag", "lambada_openai", "openbookqa"),
    *("paloma_wikitext_103", "piqa", "truthfulqa_mc2", "winogrande"),
)
FEW_SHOT = ("arc_easy", "arc_challenge", "mmlu", "medmcqa")
SHOTS = 1  # of the paper's few-shot tasks


@dataclass
class EvaluateConfig:
    """Which tasks to run, and how.

    checkpoint: a run's folder, one of its checkpoints, a Hugging Face folder, or hf:<id>.
    tasks: "paper", or names separated by commas: of the harness (tasks, groups or tags), or retrieval, similarity,
        probes and mteb:<name>, which score embeddings.
    data: for retrieval, similarity and probes: the folder of a data set, or of several (docs/evaluation.md).
    text: for retrieval and similarity: a text file to fit transforms on; null is held-out text of the run's own data.
    task_folder: a folder of your own tasks, YAML files in the harness's format. Their `!function` lines run code.
    limit: evaluate only the first so many examples of each task (probes: of each class); null for all.
    num_fewshot: examples in front of each question; null is the task's own number, 1 for the paper's few-shot tasks.
    batch_size: sequences of full context per forward pass.
    seed: of everything that the harness draws, such as the few-shot examples.
    device: "auto", "cpu" or "cuda".
    tokenizer: byte, gpt2, or the path of a .tiktoken file or of a folder with a tokenizer.json, if the run's own is not
        available.
    out: the file to write; null is evaluation.json in the model's folder, or in out/<model> for one from the hub.
    """

    checkpoint: str = cli.MISSING
    tasks: str = cli.MISSING
    data: str | None = None
    text: str | None = None
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
            raise ValueError(f"seed={self.seed} must be between 0 and 2**32 - 1")
        if not all(self.tasks.split(",")):
            raise ValueError(f"tasks={self.tasks} has an empty name: give paper, or names separated by commas")
        if not any(map(is_of_texts, self.tasks.split(","))):
            for name in ("data", "text"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name}={getattr(self, name)} is for tasks={', '.join(TASKS)}: leave it out")


def main(argv: Sequence[str]) -> None:
    config = cli.parse(EvaluateConfig, argv)
    if of_torchrun("WORLD_SIZE", 1) > 1:
        raise UserError("evaluation is a single process: run python -m nanodisp.evaluate without torchrun")
    device = start(config.device).device
    all_names = dict.fromkeys((*ZERO_SHOT, *FEW_SHOT) if config.tasks == "paper" else config.tasks.split(","))
    names = [name for name in all_names if not is_of_texts(name)]
    failures = score_texts(config, [name for name in all_names if is_of_texts(name)], device)
    if names:
        failures += run_harness(config, names, str(device))
    if failures:
        raise UserError("\n".join(failures))


def score_texts(config: EvaluateConfig, names: Sequence[str], device: torch.device) -> list[str]:
    """Evaluate the tasks that score embeddings, print and write their figures; returns what failed."""
    if not names:
        return []
    embedder = open_embedder(config.checkpoint, config.tokenizer, device)
    subject = embedder.subject
    out = Path(config.out) if config.out else subject.folder.resolve() / EVALUATION
    earlier = read_earlier(out, subject.name)
    failures: list[str] = []
    for name in names:
        try:
            for result in evaluate(name, embedder, Settings(config.data, config.text, config.limit, config.seed)):
                print(result.text, end="\n\n", flush=True)
                earlier["tasks"][result.name] = result.entry
                save(out, earlier)
        except UserError as error:  # the other tasks are evaluated all the same
            failures.append(str(error))
    if len(failures) < len(names):
        print(f"wrote {out}")
    return failures


def read_earlier(out: Path, model_name: str) -> dict[str, Any]:
    """What evaluation.json holds, or the beginning of one; raises UserError if it is of another model."""
    earlier = read_evaluation(out)
    if earlier and earlier["model"] != model_name:
        raise UserError(
            f"{out} is of {earlier['model']}, this is {model_name}: give another file with out=…, or delete it"
        )
    return earlier or {"model": model_name, "harness": None, "tasks": {}}


def run_harness(config: EvaluateConfig, names: Sequence[str], device: str) -> list[str]:
    """Evaluate the harness's tasks, print and write their figures; returns what failed."""
    harness = optional("lm_eval")
    manager = find_tasks(names, config.task_folder)
    model, model_name, folder = open_model(config, device)
    out = Path(config.out) if config.out else folder / EVALUATION
    figures: dict[str, Any] = read_earlier(out, model_name)["tasks"]
    evaluated: dict[str, Any] = {}
    failures: list[str] = []
    for name in names:
        try:
            loaded = load(manager, name)
        except UserError as error:  # the other tasks are evaluated all the same
            failures.append(str(error))
            continue
        shots = config.num_fewshot
        if config.tasks == "paper":
            shots = 0 if name in ZERO_SHOT else SHOTS if shots is None else shots
        results = harness.simple_evaluate(
            model=model,
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
        evaluated |= new
        figures |= new
        save(out, {"model": model_name, "harness": harness.__version__, "tasks": figures})
    if evaluated:
        print(table(evaluated))
        print(f"wrote {out}")
    return failures


# --- the model, the tasks ------------------------------------------------------------------------


def open_model(config: EvaluateConfig, device: str) -> tuple[Any, str, Path]:
    """The model of `config.checkpoint` for the harness, its name, and the folder of its results."""
    if not is_hugging_face(config.checkpoint):
        from nanodisp.evaluate.harness import HarnessModel  # here, because it imports the harness

        run = open_run(config.checkpoint)
        need_causal(config.checkpoint, run.model.config, "be evaluated on benchmarks")
        tokenizer = run.load_tokenizer(config.tokenizer)
        model = HarnessModel(run.model.to(device), tokenizer, config.batch_size)
        return model, run.name, run.folder.resolve()
    name = config.checkpoint.removeprefix("hf:")
    if config.tokenizer is not None:
        raise UserError("tokenizer=… is for runs: a Hugging Face model has its own")
    load_their_tokenizer(name)  # raises UserError without one
    optional("accelerate")
    optional("lm_eval.models.huggingface")
    from nanodisp.evaluate.hugging_face import HuggingFaceModel

    try:
        model = HuggingFaceModel(
            name, device=device, batch_size=config.batch_size, trust_remote_code=False, use_safetensors=True
        )
    except UserError:
        raise
    except Exception as error:  # of many classes, from the harness, transformers, safetensors and the network
        raise UserError(f"{name} cannot be loaded: {first_line(error)}") from error
    return model, name, folder_of(name)


def find_tasks(names: Sequence[str], folder: str | None) -> Any:
    """A `TaskManager` of the harness that knows these tasks; raises UserError for an unknown name.

    Listing the harness's own tasks takes seconds, so it is done only if `folder` does not have all of the tasks.
    """
    tasks = optional("lm_eval.tasks")
    if folder is not None and not Path(folder).is_dir():
        raise UserError(f"task_folder={folder} is not a folder: give a folder of YAML files in the harness's format")
    manager = tasks.TaskManager(include_path=folder, include_defaults=False)
    if not set(names) <= set(manager.all_tasks):
        manager = tasks.TaskManager(include_path=folder)
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else "lm-eval ls tasks lists all names"
            raise UserError(f"tasks={name} is unknown; {hint}")
    return manager


def load(manager: Any, name: str) -> list[Any]:
    """A task or a group with its data, or the tasks of a tag, for `simple_evaluate`; raises UserError if that fails."""
    try:
        loaded = manager.load([name])
    except Exception as error:  # of many classes, from the harness, three libraries and the network
        reason = " ".join(f"{type(error).__name__} {error}".split())[:200]
        raise UserError(f"task {name} cannot be loaded, or its data, from the hub or a local file: {reason}") from error
    return [loaded["groups"][name]] if name in loaded["groups"] else list(loaded["tasks"].values())


if __name__ == "__main__":
    cli.run(main, EvaluateConfig)
