"""Run benchmarks of EleutherAI's lm-evaluation-harness on a model, or measure its embeddings of texts, or its loss.

    python -m nanodisp.evaluate checkpoint=out/<run> tasks=blimp,hellaswag task_data=<folder>
    python -m nanodisp.evaluate checkpoint=out/<run> tasks=paper limit=500 checkpoints=all
    python -m nanodisp.evaluate checkpoint=hf:gpt2 tasks=hellaswag,arc_easy num_fewshot=5
    python -m nanodisp.evaluate checkpoint=out/<run> tasks=retrieval,similarity,probes data=<folder>
    python -m nanodisp.evaluate checkpoint=out/<run> tasks=loss quantize=int4
    python -m nanodisp.evaluate compare out/<run> out/<other run>

`checkpoint` is a run's folder, one of its checkpoints, a Hugging Face folder or hf:<id>. Runs are evaluated through
`harness.py`, others through the harness's own `hf` model, from safetensors and without running code of their authors.
Results are printed as a table and written to evaluation.json beside the model, task by task, and the figures of each
item to evaluation_items.npz: a later call adds or replaces tasks, and the same call skips those that are done. Each
task is run on its own with the same seed, so its figures do not depend on the others.

With `task_data`, benchmarks of `data/benchmarks.py` are read from files below that folder, without a network, also
where the harness has a task of the same name.

`tasks=paper` selects the ten benchmarks whose mean arXiv 2602.00217 reports, with the shots of its authors' code for
GPT-2 (github.com/ChenLiu-1996/LM-Dispersion): none, but one for arc, mmlu and medmcqa, which `num_fewshot` changes. The
paper uses the first 500 examples of each task: limit=500. `tasks=paper14` are all tasks of that code.

`retrieval`, `similarity`, `probes` and `mteb:<name>` are of `text_tasks.py`, `loss` is of `loss.py`. `quantize`
evaluates the model after rounding it, into a file of its own.

`compare` prints how the second of two evaluated runs differs from the first, with 95% intervals of a paired bootstrap.
"""

from __future__ import annotations

import nanodisp.process  # noqa: F401 - first: for what is loaded after it

# isort: split
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nanodisp import cli
from nanodisp.data.benchmarks import BENCHMARKS, fingerprint
from nanodisp.data.tokenizer import identity
from nanodisp.distributed import hardware, of_torchrun, start
from nanodisp.errors import UserError, first_line, optional
from nanodisp.evaluate.compare import compare
from nanodisp.evaluate.embeddings import open_embedder
from nanodisp.evaluate.loss import LOSS, evaluate_loss
from nanodisp.evaluate.results import describe_checkpoints, entries, items_of, save, save_items, table
from nanodisp.evaluate.text_tasks import MTEB, TASKS, Result, Settings, is_of_texts
from nanodisp.evaluate.text_tasks import evaluate as evaluate_texts
from nanodisp.hf.open import folder_of, is_hugging_face, load_their_tokenizer, name_of, need_causal, open_run
from nanodisp.models.quantize import check_scheme, quantize
from nanodisp.runs import checkpoint
from nanodisp.runs.evaluation import EVALUATION, evaluation_of_step, quantized, read_evaluation, rename_earlier

FEW_SHOT = ("arc_easy", "arc_challenge", "mmlu", "medmcqa")
PAPER = ("anli_r2", "lambada_openai", "openbookqa", "piqa", "truthfulqa_mc2", "winogrande", *FEW_SHOT)
PAPER14 = ("anli_r1", "anli_r3", "hellaswag", "paloma_wikitext_103", *PAPER)
SHOTS = 1  # of the paper's few-shot tasks


@dataclass
class EvaluateConfig:
    """Which tasks to run, and how.

    checkpoint: a run's folder, one of its checkpoints, a Hugging Face folder, or hf:<id>.
    checkpoints: "one", or "all" that the run has kept, oldest first.
    tasks: "paper", "paper14", or names separated by commas: of the harness (tasks, groups or tags) or of local files;
        retrieval, similarity, probes and mteb:<name>, which score embeddings; loss, on a run's validation split.
    task_data: a folder of local files with benchmarks, see docs/evaluation.md; null reads all from the hub.
    data: for retrieval, similarity and probes: the folder of a data set, or of several (docs/evaluation.md).
    text: for retrieval and similarity: a text file to fit transforms on; null is held-out text of the run's own data.
    task_folder: a folder of your own tasks, YAML files in the harness's format. Their `!function` lines run code.
    limit: evaluate only the first so many examples of each task (of BLiMP evenly over its paradigms,
        of probes of each class, of loss windows); null for all.
    num_fewshot: examples in front of each question; null is the task's own number, 1 for the paper's few-shot tasks.
    batch_size: sequences of full context per forward pass.
    seed: of everything that the harness draws, such as the few-shot examples.
    redo: evaluate again what evaluation.json has from the same data with the same settings.
    quantize: int8, int4, w8a8 or w4a4: round the model first, see `models/quantize.py`.
    device: "auto", "cpu" or "cuda".
    tokenizer: byte, gpt2, or the path of a .tiktoken file or of a folder with a tokenizer.json, if the run's own is not
        available.
    out: the file to write; null is evaluation.json in the model's folder, or in out/<model> for one from the hub, and
        evaluation_<quantize>.json after rounding.
    """

    checkpoint: str = cli.MISSING
    checkpoints: str = "one"
    tasks: str = cli.MISSING
    task_data: str | None = None
    data: str | None = None
    text: str | None = None
    task_folder: str | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    batch_size: int = 8
    seed: int = 1234
    redo: bool = False
    quantize: str | None = None
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
        check_scheme(self.quantize)
        self._check_unused()
        if self.checkpoints not in ("one", "all"):
            raise ValueError(f"checkpoints={self.checkpoints} is unknown; choose one of one, all")
        if self.checkpoints == "all" and (self.out is not None or is_hugging_face(self.checkpoint)):
            raise ValueError("checkpoints=all writes a file for each checkpoint of a run: leave out=… and hf:… out")

    def _check_unused(self) -> None:
        """Raises ValueError for a key that none of the tasks uses, so that no call is other than it says."""
        names = self.names()
        if len(names) > 1 and {"paper", "paper14"} & set(names):
            raise ValueError(
                f"tasks={self.tasks}: paper and paper14 are given alone, other tasks in a call of their own"
            )
        if self.limit is not None and any(name.startswith(MTEB) for name in names):
            raise ValueError(
                f"limit={self.limit} is not for tasks={MTEB}…, which mteb evaluates as a whole: leave it out"
            )
        for keys, of, used in (
            (("task_data", "task_folder", "num_fewshot"), "benchmarks", not all(map(is_own, names))),
            (("data",), f"tasks={', '.join(TASKS)}", set(names) & set(TASKS)),
            (("text",), "tasks=retrieval, similarity", set(names) & {"retrieval", "similarity"}),
        ):
            for key in keys:
                if getattr(self, key) is not None and not used:
                    raise ValueError(f"{key}={getattr(self, key)} is for {of}: leave it out")

    def names(self) -> list[str]:
        """The tasks, each once."""
        groups = {"paper": PAPER, "paper14": PAPER14}
        return list(dict.fromkeys(groups.get(self.tasks, self.tasks.split(","))))

    def shots(self, name: str) -> int | None:
        if self.tasks not in ("paper", "paper14"):
            return self.num_fewshot
        return 0 if name not in FEW_SHOT else SHOTS if self.num_fewshot is None else self.num_fewshot

    def settings(self, name: str) -> dict[str, Any]:
        """What decides a task's figures beside the model: an entry with the same need not be made again."""
        data = fingerprint(name, Path(self.task_data or "")) if self.reads_file(name) else None
        tokenizer = identity(self.tokenizer) if self.tokenizer is not None else None
        given = {"limit": self.limit, "seed": self.seed, "num_fewshot": self.shots(name)}
        return {**given, "data": data, "tokenizer": tokenizer}

    def reads_file(self, name: str) -> bool:
        """Whether a task is one of ours, on local files."""
        return self.task_data is not None and name in BENCHMARKS


def main(argv: Sequence[str]) -> None:
    if argv[:1] == ["compare"]:
        print(compare(argv[1:]))
        return
    config = cli.parse(EvaluateConfig, argv)
    if of_torchrun("WORLD_SIZE", 1) > 1:
        raise UserError("evaluation is a single process: run python -m nanodisp.evaluate without torchrun")
    device = start(config.device).device
    hardware.prepare(device, torch.float32)
    loaded, failures = load_tasks(config)
    names = [config.checkpoint]
    if config.checkpoints == "all":
        names = [str(path) for path in checkpoint.all_checkpoints(Path(config.checkpoint) / checkpoint.CHECKPOINTS)]
        if not names:
            raise UserError(f"{config.checkpoint} holds no checkpoints: checkpoints=all needs a run's folder")
    by_step = {}
    for name, results in [(name, Results(config, name)) for name in names]:  # all files before the first hour
        failures += evaluate_own(config, name, results, device)
        if loaded:
            evaluate(config, name, loaded, results, device)
        by_step[results.step] = results.evaluated
    if config.checkpoints == "all":
        print(describe_checkpoints(by_step))
    if failures:
        raise UserError("\n".join(dict.fromkeys(failures)))


class Results:
    """The evaluation.json of a model, to which entries are added; raises UserError if it is of another model.

    head: what identifies the model in it. evaluated: the entries of this call. step: of a run, else 0.
    """

    def __init__(self, config: EvaluateConfig, name: str) -> None:
        self.evaluated: dict[str, Any] = {}
        self.step, file = 0, EVALUATION
        if is_hugging_face(name):
            self.head: dict[str, Any] = {"model": name.removeprefix("hf:")}
            folder = folder_of(self.head["model"])
        else:
            path = checkpoint.find(Path(name))
            state, folder = checkpoint.read_state(path), path.parent.parent.resolve()
            self.step = state["step"]
            self.head = {"model": name_of(folder, self.step), "weights": state["sha256"]["model.safetensors"][:16]}
            if config.checkpoints == "all":
                newest = checkpoint.newest_step(folder)
                rename_earlier(folder, newest, config.quantize)
                file = evaluation_of_step(self.step, newest)
        if config.quantize:
            self.head["model"] += f" in {config.quantize}"
            file = quantized(file, config.quantize)
        self.path = Path(config.out) if config.out else folder / file
        if self.path.is_dir():
            raise UserError(f"{self.path} is a folder: out=… is the file to write")
        earlier = read_evaluation(self.path)
        if earlier and any(earlier.get(key, value) != value for key, value in self.head.items()):
            of = self.head["model"] + (" with other weights" if earlier["model"] == self.head["model"] else "")
            hint = "give another file with out=…, or delete it"
            raise UserError(f"{self.path} is of {earlier['model']}, this is {of}: {hint}")
        self.harness = earlier.get("harness")
        self.figures: dict[str, Any] = earlier.get("tasks", {})

    def add(self, entries: dict[str, Any]) -> None:
        self.evaluated |= entries
        self.figures |= entries
        save(self.path, {**self.head, "harness": self.harness, "tasks": self.figures})


# --- tasks of ours -------------------------------------------------------------------------------


def is_own(task: str) -> bool:
    return task == LOSS or is_of_texts(task)


def evaluate_own(config: EvaluateConfig, name: str, results: Results, device: torch.device) -> list[str]:
    """Evaluate the tasks that need no harness, print and write their figures; returns what failed."""
    failures: list[str] = []
    embedder, tasks = None, [task for task in config.names() if is_own(task)]
    settings = Settings(config.data, config.text, config.limit, config.seed)
    for task in tasks:
        try:
            if task == LOSS:
                found: Iterable[Result] = [evaluate_loss(name, config.quantize, config.limit, config.seed, device)]
            else:
                if embedder is None:
                    embedder = open_embedder(name, config.tokenizer, device)
                    if config.quantize:
                        quantize(embedder.model, config.quantize)
                found = evaluate_texts(task, embedder, settings)
            for result in found:
                print(result.text, end="\n\n", flush=True)
                results.add({result.name: result.entry})
        except UserError as error:  # the other tasks are evaluated all the same
            failures.append(str(error))
    if results.evaluated:
        print(f"wrote {results.path}")
    return failures


# --- tasks of the harness ------------------------------------------------------------------------


def load_tasks(config: EvaluateConfig) -> tuple[dict[str, Any], list[str]]:
    """The harness's tasks with their data, by name, and what failed."""
    loaded: dict[str, Any] = {}
    failures: list[str] = []
    if names := [task for task in config.names() if not is_own(task)]:
        optional("lm_eval")
        from nanodisp.evaluate.tasks import find_tasks, load  # here, because it imports the harness

        manager = find_tasks(names, config.task_folder, config.task_data)
        for name in names:
            try:
                loaded[name] = load(manager, name, config.task_data)
            except UserError as error:  # the other tasks are evaluated all the same
                failures.append(str(error))
    return loaded, failures


def evaluate(config: EvaluateConfig, name: str, loaded: dict[str, Any], results: Results, device: torch.device) -> None:
    """Evaluate a model on the harness's tasks, write and print the figures."""
    from nanodisp.evaluate.tasks import score, settings_of

    model = open_model(config, name, str(device))
    results.harness, evaluated = optional("lm_eval").__version__, {}
    for number, (task, with_data) in enumerate(loaded.items(), start=1):
        version = settings_of(task)["metadata"]["version"] if config.reads_file(task) else results.harness
        settings, known = {**config.settings(task), "version": version}, results.figures.get(task, {})
        if known and not config.redo and not config.task_folder and settings == known.get("settings"):
            print(f"{task}: done already, redo=true evaluates it again")
            evaluated[task] = known
            continue
        model.label, model.cut = f"{task} ({number} of {len(loaded)})", 0
        scores = score(model, with_data, limit=config.limit, shots=settings["num_fewshot"], seed=config.seed)
        new = {
            each: {**entry, "seed": config.seed, "settings": settings, "cut": model.cut}
            for each, entry in entries(scores)
        }
        evaluated |= new
        save_items(results.path, {each: items_of(scores, each) for each in new})
        results.add(new)
    results.evaluated |= evaluated
    print(table(evaluated))
    print(f"wrote {results.path}")


def open_model(config: EvaluateConfig, name: str, device: str) -> Any:
    """The model for the harness."""
    if not is_hugging_face(name):
        from nanodisp.evaluate.harness import HarnessModel  # here, because it imports the harness

        run = open_run(name)
        need_causal(name, run.model.config, "be evaluated on benchmarks")
        tokenizer = run.load_tokenizer(config.tokenizer)
        if config.quantize:
            quantize(run.model, config.quantize)
        return HarnessModel(run.model.to(device), tokenizer, config.batch_size)
    name = name.removeprefix("hf:")
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
    if config.quantize:
        quantize(model.model, config.quantize)
    return model


if __name__ == "__main__":
    cli.run(main, EvaluateConfig)
