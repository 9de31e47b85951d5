"""Run benchmarks of EleutherAI's lm-evaluation-harness on a model.

    python -m nanodisp.evaluate checkpoint=out/<run> tasks=blimp,hellaswag task_data=<folder>
    python -m nanodisp.evaluate checkpoint=out/<run> tasks=paper limit=500 checkpoints=all
    python -m nanodisp.evaluate checkpoint=hf:gpt2 tasks=hellaswag,arc_easy num_fewshot=5
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

`compare` prints how the second of two evaluated runs differs from the first, with 95% intervals of a paired bootstrap.
"""

from __future__ import annotations

import nanodisp.process  # noqa: F401 - first: for what is loaded after it

# isort: split
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanodisp import cli
from nanodisp.data.benchmarks import BENCHMARKS, fingerprint
from nanodisp.distributed import of_torchrun, start
from nanodisp.errors import UserError, first_line, optional
from nanodisp.evaluate.compare import compare
from nanodisp.evaluate.results import describe_checkpoints, entries, items_of, save, save_items, table
from nanodisp.hf.open import folder_of, is_hugging_face, load_their_tokenizer, need_causal, open_run
from nanodisp.runs import checkpoint
from nanodisp.runs.evaluation import EVALUATION, evaluation_of_step, read_evaluation

FEW_SHOT = ("arc_easy", "arc_challenge", "mmlu", "medmcqa")
PAPER = ("anli_r2", "lambada_openai", "openbookqa", "piqa", "truthfulqa_mc2", "winogrande", *FEW_SHOT)
PAPER14 = ("anli_r1", "anli_r3", "hellaswag", "paloma_wikitext_103", *PAPER)
SHOTS = 1  # of the paper's few-shot tasks


@dataclass
class EvaluateConfig:
    """Which tasks to run, and how.

    checkpoint: a run's folder, one of its checkpoints, a Hugging Face folder, or hf:<id>.
    checkpoints: "one", or "all" that the run has kept, oldest first.
    tasks: "paper", "paper14", or names of the harness (tasks, groups or tags) or of local files, separated by commas.
    task_data: a folder of local files with benchmarks, see docs/evaluation.md; null reads all from the hub.
    task_folder: a folder of your own tasks, YAML files in the harness's format. Their `!function` lines run code.
    limit: evaluate only the first so many examples of each task (of BLiMP evenly over its paradigms); null for all.
    num_fewshot: examples in front of each question; null is the task's own number, 1 for the paper's few-shot tasks.
    batch_size: sequences of full context per forward pass.
    seed: of everything that the harness draws, such as the few-shot examples.
    redo: evaluate again what evaluation.json has from the same data with the same settings.
    device: "auto", "cpu" or "cuda".
    tokenizer: byte, gpt2, or the path of a .tiktoken file or of a folder with a tokenizer.json, if the run's own is not
        available.
    out: the file to write; null is evaluation.json in the model's folder, or in out/<model> for one from the hub.
    """

    checkpoint: str = cli.MISSING
    checkpoints: str = "one"
    tasks: str = cli.MISSING
    task_data: str | None = None
    task_folder: str | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    batch_size: int = 8
    seed: int = 1234
    redo: bool = False
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
        if self.checkpoints not in ("one", "all"):
            raise ValueError(f"checkpoints={self.checkpoints} is unknown; choose one of one, all")
        if self.checkpoints == "all" and (self.out is not None or is_hugging_face(self.checkpoint)):
            raise ValueError("checkpoints=all writes a file for each checkpoint of a run: leave out=… and hf:… out")

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
        local = self.task_data is not None and name in BENCHMARKS
        data = fingerprint(name, Path(self.task_data or "")) if local else None
        return {"limit": self.limit, "seed": self.seed, "num_fewshot": self.shots(name), "data": data}


def main(argv: Sequence[str]) -> None:
    if argv[:1] == ["compare"]:
        print(compare(argv[1:]))
        return
    config = cli.parse(EvaluateConfig, argv)
    if of_torchrun("WORLD_SIZE", 1) > 1:
        raise UserError("evaluation is a single process: run python -m nanodisp.evaluate without torchrun")
    optional("lm_eval")
    from nanodisp.evaluate.tasks import find_tasks, load  # here, because it imports the harness

    device = str(start(config.device).device)
    manager = find_tasks(config.names(), config.task_folder, config.task_data)
    loaded: dict[str, Any] = {}
    failures: list[str] = []
    for name in config.names():
        try:
            loaded[name] = load(manager, name, config.task_data)
        except UserError as error:  # the other tasks are evaluated all the same
            failures.append(str(error))
    if loaded and config.checkpoints == "all":
        if not (found := checkpoint.all_checkpoints(Path(config.checkpoint) / checkpoint.CHECKPOINTS)):
            raise UserError(f"{config.checkpoint} holds no checkpoints: checkpoints=all needs a run's folder")
        by_step = {int(path.name[5:]): evaluate(config, str(path), loaded, device) for path in found}
        print(describe_checkpoints(by_step))
    elif loaded:
        evaluate(config, config.checkpoint, loaded, device)
    if failures:
        raise UserError("\n".join(failures))


def evaluate(config: EvaluateConfig, name: str, loaded: dict[str, Any], device: str) -> dict[str, Any]:
    """Evaluate a model on the tasks, write and print the results; return the entries of these tasks by name."""
    from nanodisp.evaluate.tasks import score

    model, head, out = open_model(config, name, device)
    earlier = read_evaluation(out)
    if earlier and any(earlier.get(key, value) != value for key, value in head.items()):
        of = head["model"] + (" with other weights" if earlier["model"] == head["model"] else "")
        raise UserError(f"{out} is of {earlier['model']}, this is {of}: give another file with out=…, or delete it")
    figures: dict[str, Any] = earlier["tasks"] if earlier else {}
    evaluated: dict[str, Any] = {}
    for number, (task, with_data) in enumerate(loaded.items(), start=1):
        settings = config.settings(task)
        if task in figures and not config.redo and not config.task_folder and settings == figures[task].get("settings"):
            print(f"{task}: done already, redo=true evaluates it again")
            evaluated[task] = figures[task]
            continue
        model.label, model.cut = f"{task} ({number} of {len(loaded)})", 0
        results = score(model, with_data, limit=config.limit, shots=settings["num_fewshot"], seed=config.seed)
        new = {
            each: {**entry, "seed": config.seed, "settings": settings, "cut": model.cut}
            for each, entry in entries(results)
        }
        evaluated |= new
        figures |= new
        save_items(out, {each: items_of(results, each) for each in new})
        save(out, {**head, "harness": optional("lm_eval").__version__, "tasks": figures})
    print(table(evaluated))
    print(f"wrote {out}")
    return evaluated


# --- the model -----------------------------------------------------------------------------------


def open_model(config: EvaluateConfig, checkpoint_name: str, device: str) -> tuple[Any, dict[str, Any], Path]:
    """The model for the harness, what identifies it in evaluation.json, and the file of its results."""
    if not is_hugging_face(checkpoint_name):
        from nanodisp.evaluate.harness import HarnessModel  # here, because it imports the harness

        run = open_run(checkpoint_name)
        need_causal(checkpoint_name, run.model.config, "be evaluated on benchmarks")
        tokenizer = run.load_tokenizer(config.tokenizer)
        newest = checkpoint.newest_step(run.folder)
        file = EVALUATION if config.checkpoints == "one" else evaluation_of_step(run.saved.step, newest)
        head = {"model": run.name, "weights": run.saved.state["sha256"]["model.safetensors"][:16]}
        model = HarnessModel(run.model.to(device), tokenizer, config.batch_size)
        return model, head, Path(config.out) if config.out else run.folder.resolve() / file
    name = checkpoint_name.removeprefix("hf:")
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
    return model, {"model": name}, Path(config.out) if config.out else folder_of(name) / EVALUATION


if __name__ == "__main__":
    cli.run(main, EvaluateConfig)
