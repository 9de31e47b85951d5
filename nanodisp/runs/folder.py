"""A run and its folder: begin, record, save, resume, finish. docs/formats.md describes its files."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from nanodisp.config import ADDED, BUDGET, CONFIG, Config, identity
from nanodisp.data import tokenizer_json
from nanodisp.data.corpus import Corpus, fingerprint, sample_start
from nanodisp.data.tokenizer import copy_tokenizer, load_tokenizer
from nanodisp.distributed import layout
from nanodisp.distributed.world import World
from nanodisp.errors import UserError, first_line
from nanodisp.files import write_whole
from nanodisp.models.generate import generate
from nanodisp.models.gpt import GPT
from nanodisp.plan import Plan
from nanodisp.runs import checkpoint, replicas, snapshots
from nanodisp.runs.checkpoint import CHECKPOINTS
from nanodisp.runs.metrics import METRICS, Metrics, read_records
from nanodisp.runs.snapshots import SNAPSHOTS
from nanodisp.training import optim
from nanodisp.training.signals import EXIT_CODE, StopSignals

SAMPLES, TOKENIZER = "samples.txt", "tokenizer.tiktoken"


@dataclass
class TrainState:
    """The progress of a run.

    step: updates done.
    seconds: wall-clock time before the last resume.
    bad_steps, bad_in_a_row: int64 scalars on the device: updates skipped because their gradient was not finite.
    val_loss: of the validation after this step, an encoder's masked loss; None without one.
    """

    step: int
    seconds: float
    bad_steps: Tensor
    bad_in_a_row: Tensor
    val_loss: float | None = None

    def count(self, bad: Tensor) -> None:
        """Count a step; `bad`, a bool scalar on the device, says that its update was skipped."""
        self.step += 1
        self.bad_steps += bad
        self.bad_in_a_row = (self.bad_in_a_row + 1) * bad
        self.val_loss = None


class Run:
    """A run in progress: its folder, locked; its records; its checkpoints; requests to stop.

    Used as a context. Only rank 0 writes, and with `train.replicate_checkpoints` the first rank of each host, into its
    own host's folder; all ranks call every method.
    """

    def __init__(self, plan: Plan, corpus: Corpus, world: World) -> None:
        self.plan, self.config, self.corpus, self.world = plan, plan.config, corpus, world
        self.folder = Path(plan.config.out_dir) / str(plan.config.run_name)
        self.fingerprint = fingerprint(corpus)
        self.replicated = plan.config.train.replicate_checkpoints and world.size > 1
        self.writes = world.is_main or (self.replicated and world.local_rank == 0)
        self.sample_start = sample_start(corpus) if self.writes else None
        self.began = time.perf_counter()
        self.stop = StopSignals()
        train = plan.config.train
        self.saver = checkpoint.Saver(self.folder / CHECKPOINTS, train.keep_last, train.keep_every)

    def __enter__(self) -> Run:
        self.contexts = contextlib.ExitStack()
        with contextlib.ExitStack() as contexts:
            contexts.enter_context(self.stop)
            with self.world.together():
                self.metrics = contexts.enter_context(Metrics(self.folder if self.writes else None))
            contexts.enter_context(self.saver)
            contexts.enter_context(self.world)
            self._check_same_tokens()
            self.contexts = contexts.pop_all()
        return self

    def __exit__(self, *exception: Any) -> bool | None:
        return self.contexts.__exit__(*exception)

    def _check_same_tokens(self) -> None:
        """UserError on all ranks when a host has other tokens than rank 0's."""
        own = int(self.fingerprint[:15], 16)
        first = self.world.sum(torch.tensor(own if self.world.is_main else 0, device=self.world.device))
        with self.world.together():
            if int(first) != own:
                raise UserError(
                    f"the tokens in {self.corpus.folder} on {socket.gethostname()} are not those of rank 0: give all "
                    "hosts the same text, or a data.folder on a disk that they share"
                )

    # --- from the beginning or a checkpoint to the first step

    def resume(
        self, model: GPT, optimizers: list[torch.optim.Optimizer], scaler: torch.amp.GradScaler
    ) -> TrainState | None:
        """Load the newest intact checkpoint and return its state; None without a checkpoint.

        Raises UserError for a checkpoint of another run, or one that this model cannot load.
        """
        folder, saved = self.folder / CHECKPOINTS, None
        check_may_resume(self.folder, self.config.resume)
        if self.replicated:  # read below: another host's may take the place of this one's
            step = replicas.same_on_all(self.folder, self.world, self.writes)
        else:
            with self.world.together():
                saved = checkpoint.load_newest(folder) if self.writes else None
            found = torch.tensor(saved.step + 1 if saved else 0, device=self.world.device)
            step = int(self.world.sum(found)) - 1  # rank 0 tells the others
        if step < 0:
            return None
        with self.world.together():
            if saved is None:
                saved = self._load(checkpoint.path_of(folder, step))
        try:
            with self.world.together():  # each host has read its own
                check_same_run(saved.path, saved.state, self.config, self.corpus, self.fingerprint)
            if self.writes and self.plan.is_done(saved.step):
                restore_config(self.folder, saved.state["config"])
            model.load_state_dict(layout.scatter(saved.model, model))
            optim.load_state_tensors(model, optimizers, layout.scatter(saved.optimizer, model))
            scaler.load_state_dict(saved.state["scaler"])
            bad = torch.tensor([saved.state["bad_steps"], saved.state["bad_in_a_row"]], device=self.world.device)
            return TrainState(saved.step, saved.state["seconds"], bad[0], bad[1])
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise UserError(f"{saved.path} cannot be resumed although its checksums match: {reason}") from error

    def _load(self, path: Path) -> checkpoint.Checkpoint:
        """A checkpoint that rank 0, or this host's first rank, has found intact."""
        if not path.exists():
            raise UserError(
                f"{path} exists for rank 0, but not on {socket.gethostname()}: put out_dir on a disk that the hosts "
                "share, or give train.replicate_checkpoints=true to all of them"
            )
        return checkpoint.load(path)

    def begin(self, state: TrainState | None) -> TrainState:
        """Write the configuration, open the records after `state` (None for a new run) and print what runs."""
        plan, resumed = self.plan, state is not None
        if state is None:
            none = torch.zeros(2, dtype=torch.int64, device=self.world.device)
            state = TrainState(0, 0.0, none[0], none[1])
        if self.writes and not plan.is_done(state.step):
            write_config(self.folder, self.config)
            with unwritable(self.folder):
                if Path(self.corpus.tokenizer).exists():
                    copy_tokenizer(self.corpus.tokenizer, self.folder, TOKENIZER)
        if self.world.is_main:
            with unwritable(self.folder):
                snapshots.drop_after(self.folder / SNAPSHOTS, state.step if resumed else -1)
        self.metrics.begin(
            config=dataclasses.asdict(self.config),
            wandb_config=self.config.wandb,
            tensorboard=self.config.tensorboard,
            quiet=not self.world.is_main,
            step=state.step if resumed else -1,
            total_steps=plan.total_steps,
        )
        self.metrics.say(
            f"{self.folder}: {plan.n_parameters:,} parameters, {plan.total_steps} steps of {plan.tokens_per_step:,} "
            f"tokens, {self.world.size} x {plan.device.type} in {self.config.train.dtype}"
        )
        if resumed:
            done = f"the run is complete at step {state.step}"
            self.metrics.say(done if plan.is_done(state.step) else f"resuming from step {state.step}")
        return state

    # --- during the run

    def tally(self, state: TrainState) -> dict[str, float]:
        """Tokens and seconds of the run so far."""
        seconds = state.seconds + time.perf_counter() - self.began
        return {"tokens": state.step * self.plan.tokens_per_step, "seconds": round(seconds, 3)}

    def record(self, split: str, state: TrainState, figures: dict[str, Any]) -> None:
        """Record figures by name, see `runs/metrics.py`."""
        self.metrics.record({"step": state.step, "split": split, **figures, **self.tally(state)})

    def save_snapshot(self, state: TrainState, tokens: Tensor, hidden: Tensor) -> None:
        """Write a snapshot, see `runs/snapshots.py`; raises UserError on all ranks if rank 0 cannot."""
        with self.world.together():
            if self.world.is_main:
                snapshots.write(self.folder / SNAPSHOTS, state.step, tokens, hidden)

    def save(
        self,
        state: TrainState,
        model: GPT,
        optimizers: list[torch.optim.Optimizer],
        scaler: torch.amp.GradScaler,
    ) -> None:
        """Start writing a checkpoint; training continues once the tensors are copied."""
        # weights first: state_dict shards again what an evaluation has gathered, as the optimizers expect
        weights = layout.gather(model.state_dict(), self.writes)
        tensors = layout.gather(optim.state_tensors(model, optimizers), self.writes)
        if self.writes:
            self.metrics.flush()
            self.saver.save(
                weights,
                tensors,
                {
                    "step": state.step,
                    **self.tally(state),
                    "val_loss": state.val_loss,
                    "bad_steps": int(state.bad_steps),
                    "bad_in_a_row": int(state.bad_in_a_row),
                    "scaler": scaler.state_dict(),
                    "config": dataclasses.asdict(self.config),
                    "corpus": self.corpus.folder.name,
                    "corpus_fingerprint": self.fingerprint,
                    "sample_start": self.sample_start,
                },
            )

    def is_asked_to_stop(self) -> bool:
        """Whether any rank has received SIGINT, SIGTERM or SIGUSR1."""
        return self.world.any(self.stop.received is not None)

    # --- the end

    def leave(self, state: TrainState) -> None:
        """End the process with exit code 75 after a request to stop; the checkpoint has been saved."""
        self.saver.wait()
        self.world.barrier()  # until rank 0 has written: torchrun ends all ranks when one exits
        asked = self.stop.received or "another rank stops"
        self.metrics.say(f"{asked}: saved at step {state.step}; the same command resumes")
        raise SystemExit(EXIT_CODE)

    def conclude(self, model: GPT) -> None:
        """Report the loss, condensation before and after, a sample, and where the files are."""
        self.saver.wait()
        if self.samples:
            layout.unshard(model)  # rank 0 writes the sample alone
        if self.world.is_main:
            self._report(model)
        if self.is_asked_to_stop():  # this run is complete, but a sweep ends here
            raise SystemExit(EXIT_CODE)

    @property
    def samples(self) -> bool:
        """Whether the run ends with a sample."""
        return self.config.train.sample_tokens > 0 and self.config.model.causal

    def _report(self, model: GPT) -> None:
        say, folder, loss = self.metrics.say, self.folder, self.config.model.loss_name
        validations = read_records(folder / METRICS, "val")
        for when, record in (("before", validations[0]), ("after", validations[-1])) if validations else ():
            cosines = " ".join("nan" if value is None else f"{value:.3f}" for value in record["mean_cosine"])
            say(f"mean cosine by layer {when:>6} training: {cosines}")
        if not validations:
            say(
                f"{folder / METRICS} holds no validation: it was deleted or damaged after training. The model is "
                f"intact; for the figures, delete {folder} and run the same command again"
            )
        elif validations[-1][loss] is None:
            say(f"the loss is not finite: a lower optim.lr or optim.grad_clip may help; see {folder}")
            return
        if self.samples:
            say(f"--- sample\n{self._sample(model)}\n---")
        if validations:
            last = validations[-1]
            bpb = f", {last['bpb']:.4f} bits per byte" if last.get("bpb") else ""
            what, unit = ("loss", "token") if self.config.model.causal else ("masked loss", "masked token")
            say(f"validation {what} {last[loss]:.4f} nats per {unit}{bpb} after {last['step']} steps")
        say(f"{CONFIG}, {METRICS}{f', {SAMPLES}' * self.samples} and {CHECKPOINTS}/ are in {folder}")
        named = shlex.quote(f"checkpoint={folder}")
        more = f"more text: python sample.py {named} prompt='…'"
        say(more if self.config.model.causal else f"its layers: python -m nanodisp.condensation {named}")

    def _sample(self, model: GPT) -> str:
        """Text generated without a prompt; also written to samples.txt."""
        try:
            tokenizer = load_tokenizer(self.corpus.tokenizer)
        except UserError as error:  # training does not need the tokenizer's file, so a finished run does not fail
            return f"(no sample: {error})"
        generator = torch.Generator(model.device).manual_seed(self.config.seed)
        first = tokenizer.eot if self.sample_start is None else self.sample_start
        start = torch.full((1, 1), first, device=model.device)
        n_tokens = self.config.train.sample_tokens
        model.eval()
        tokens = generate(model, start, n_tokens, temperature=0.8, top_k=50, generator=generator)
        text = tokenizer.decode_bytes([first, *(int(token) for token in tokens)]).decode("utf-8", errors="replace")
        with contextlib.suppress(OSError):  # no reason to fail, and the text is shown anyway
            (self.folder / SAMPLES).write_text(text, encoding="utf-8")
        return text


def steps_done(plan: Plan, corpus: Corpus) -> int:
    """The step at which the same command would go on, 0 for a new run; reads no tensors.

    Raises UserError where that command would.
    """
    folder = Path(plan.config.out_dir) / str(plan.config.run_name)
    check_may_resume(folder, plan.config.resume)
    problems = []
    for path in reversed(checkpoint.all_checkpoints(folder / CHECKPOINTS)):
        try:
            state = checkpoint.read_state(path)
        except checkpoint.Damaged as error:  # a run sets it aside
            problems.append(error)
            continue
        try:
            check_same_run(path, state, plan.config, corpus, fingerprint(corpus))
            return state["step"]
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise UserError(f"{path} cannot be resumed although its checksums match: {reason}") from error
    if problems:
        raise problems[0]
    return 0


def check_may_resume(folder: Path, resume: str) -> None:
    """UserError for a folder that holds a run, with resume=never."""
    if resume == "never" and ((folder / CONFIG).exists() or checkpoint.all_checkpoints(folder / CHECKPOINTS)):
        raise UserError(f"{folder} holds a run: resume=auto resumes it, run_name=<another> starts a new one")


def check_same_run(path: Path, state: dict[str, Any], config: Config, corpus: Corpus, fingerprint: str) -> None:
    """UserError when a checkpoint's run differs in anything that decides the result; the budget may grow."""
    theirs = {**ADDED, **identity(state["config"]), "corpus": state["corpus"]}
    ours = {**ADDED, **identity(dataclasses.asdict(config)), "corpus": corpus.folder.name}
    for side in (theirs, ours):
        tokenizer = Path(side.get("data.tokenizer", ""))
        if tokenizer.parent.name == side["corpus"]:  # a file beside the shards, wherever these are
            side["data.tokenizer"] = tokenizer.name
    known = state.get("corpus_fingerprint")  # older checkpoints have none
    may_differ = (*BUDGET, "data.path", "corpus") if known == fingerprint else BUDGET  # the same tokens, moved
    differing = [key for key in ours if key not in may_differ and theirs.get(key) != ours[key]]
    if differing == ["corpus"]:
        raise UserError(
            f"the text has changed: {path} was trained on {theirs['corpus']}, now it is {ours['corpus']}; "
            "put the old text back, or give run_name=<another> to train on the new one"
        )
    if differing:
        changes = ", ".join(f"{key}={theirs.get(key)} (now {ours[key]})" for key in differing)
        raise UserError(f"{path} is of another run: {changes}; give this one another run_name")
    if known not in (None, fingerprint):
        raise UserError(
            f"the shards in {corpus.folder} have changed since {path} was saved: put the old ones back, or give "
            "run_name=<another> to train on the new ones"
        )


def write_config(folder: Path, config: Config) -> None:
    """Write the resolved configuration into a run's folder."""
    write_whole(folder / CONFIG, OmegaConf.to_yaml(OmegaConf.structured(config)).encode())


def restore_config(folder: Path, config: dict[str, Any]) -> None:
    """Write the configuration of a complete run again if its file is missing or damaged."""
    text = OmegaConf.to_yaml(OmegaConf.create(config)).encode()
    if not (folder / CONFIG).is_file() or (folder / CONFIG).read_bytes() != text:
        write_whole(folder / CONFIG, text)


@contextlib.contextmanager
def unwritable(folder: Path) -> Any:
    try:
        yield
    except OSError as error:
        raise UserError(f"the run's folder {folder} cannot be written: {error}; choose another out_dir") from error


def spec_in(run: Path, spec: str) -> str:
    """The spec of a run's tokenizer: the copy of its file in the run's folder if there is one, else `spec`."""
    copies = (run / name for name in (TOKENIZER, tokenizer_json.NAME))
    return next((str(copy) for copy in copies if copy.is_file()), spec)
