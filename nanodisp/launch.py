"""`python train.py key=value …`: from `conf/` and the command line to a `Config`, through Hydra.

An unknown key, a wrong type or an impossible value ends the program with a one-line error before anything is loaded.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import os
import shlex
import shutil
import sys
import tempfile
import textwrap
import traceback
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nanodisp import cli
from nanodisp.config import SECTIONS, Config, flatten, name_of
from nanodisp.distributed import of_torchrun, rank_lost
from nanodisp.errors import AlreadyReported, InUse, RankLost, UserError, to_stderr
from nanodisp.overrides import (
    CONF,
    check_typed,
    explain,
    keys_of,
    parse,
    refuse_dashes,
    typed,
    unknown,
    without_unused,
)

WITHOUT_OUTPUT = "the command continues, and a run's figures are in its metrics.jsonl"


def main(task: Callable[[Config], float | None]) -> None:
    """Run `task` with each configuration that Hydra composes from `conf/` and the command line.

    A user's mistake becomes one line on stderr and exit code 2; a bug shows its traceback. In a sweep neither stops the
    other jobs, and all failures are summarised at the end.

    In a dry run `task` returns the seconds that the run would take, which are added up for a sweep.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach the lines below instead of Hydra's printer
    ConfigStore.instance().store(name="schema", node=Config)
    # Hydra's parser wants flags first; a stable sort keeps "--cfg job" together
    sys.argv[1:] = sorted(sys.argv[1:], key=lambda argument: "=" in argument and not argument.startswith("-"))
    jobs = Jobs(task, sys.argv[1:])

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
    def entry(composed: DictConfig) -> None:
        jobs.run(composed)

    try:
        if not CONF.is_dir():
            raise UserError(f"training needs a clone of nanodisp, with its conf/ and data/: {CONF} does not exist")
        if cli.asks_for_help(sys.argv[1:]):
            return cli.attempt(lambda: print(*help_lines(), sep="\n"))
        cli.guard_output(WITHOUT_OUTPUT)
        refuse_dashes(sys.argv[1:])
        check_typed(sys.argv[1:])
        with jobs.ledger_of_workers():
            entry()
    except (UserError, HydraException, OmegaConfBaseException) as error:
        jobs.failures.append(explain(error))
    except KeyboardInterrupt:
        to_stderr("interrupted: the same command resumes from the last checkpoint")
        os._exit(130)  # at once, without waiting for a checkpoint that is being written
    jobs.total()
    for failure in jobs.failures:
        cli.fail(UserError(failure))
    if jobs.failures:
        sys.exit(2)


class Jobs:
    """The jobs of one command: one, or those of a sweep.

    Args:
        task: trains; in a dry run it returns the seconds that training would take.
        arguments: of the command line.
    """

    def __init__(self, task: Callable[[Config], float | None], arguments: Sequence[str]) -> None:
        self.task, self.arguments = task, arguments
        self.failures: list[str] = []
        self.seconds: dict[str, float] = {}  # of the runs of a dry run
        self.began: dict[tuple[str, ...], str] = {}  # runs by what identifies them -> the job that trains it
        self.main_process = os.getpid()
        self.ledger: Path | None = None  # where workers of a parallel launcher leave seconds and failures

    def run(self, composed: DictConfig) -> None:
        """One job. In a sweep an error is kept for the end, and noted in the sweep's folder for the report."""
        cli.guard_output(WITHOUT_OUTPUT)
        runtime = HydraConfig.get()
        in_sweep = runtime.mode == RunMode.MULTIRUN
        several = swept(self.arguments) if in_sweep else frozenset()
        overrides = [str(each.input_line) for each in parse(runtime.overrides.task) if each.key_or_group in several]
        job, command, config = " ".join(overrides), command_of(runtime.overrides.task), None
        note = Path(runtime.sweep.dir) / f"failed-{hashlib.sha256(command.encode()).hexdigest()[:6]}"
        try:
            if in_sweep and is_main_rank():
                shutil.rmtree(note, ignore_errors=True)
            config = configure(composed, several)
            if not (in_sweep and self.is_repeated(config, job)):
                if lost := [each for each in overrides if each not in shlex.split(str(config.command))]:
                    say(f"{job}: runs without {' '.join(lost)}, which has no effect here")
                seconds = self.task(config)
                self.seconds |= {f"{config.out_dir}/{config.run_name}": seconds} if seconds is not None else {}
        except AlreadyReported:
            sys.exit(2)
        except Exception as problem:
            error = rank_lost(problem) or problem
            if self.is_worker() and isinstance(error, InUse):
                say(f"{job}: skipped, {error}")
                return
            if not (mistake := isinstance(error, UserError)) and not in_sweep:
                raise
            line = str(error) if mistake else f"{type(error).__name__}: {error}"
            self.failures.append(f"{job}: {line}" if in_sweep else line)
            if not mistake:
                traceback.print_exc()
            if in_sweep and is_main_rank() and not composed.dry_run:
                leave_note(note, config, f"{command}\n{self.failures[-1]}\n")
            if of_torchrun("WORLD_SIZE", 1) > 1:  # the other ranks may be unaware: torchrun must end them
                sys.exit(cli.fail((RankLost if isinstance(error, RankLost) else UserError)(self.failures[-1])))
        if self.is_worker():
            self.write_ledger()

    def is_worker(self) -> bool:
        """Whether this is a process of a parallel launcher."""
        return os.getpid() != self.main_process

    def write_ledger(self) -> None:
        """In a worker: hand over to the main process; from another machine only a failure, through the launcher."""
        if self.ledger is not None and self.ledger.exists():
            with self.ledger.open("a") as file:
                file.write(json.dumps([self.seconds, self.failures]) + "\n")
        elif self.failures:
            raise UserError(self.failures[-1])
        self.seconds, self.failures = {}, []  # a worker may have several jobs

    @contextmanager
    def ledger_of_workers(self) -> Iterator[None]:
        if not any(argument.startswith("hydra/launcher=") for argument in self.arguments):
            yield
            return
        with tempfile.NamedTemporaryFile() as file:
            self.ledger = Path(file.name)
            yield
            for line in file.read().splitlines():
                seconds, failures = json.loads(line)
                self.seconds |= seconds
                self.failures += failures

    def is_repeated(self, config: Config, job: str) -> bool:
        """Whether an earlier job of the sweep is the same run; says so."""
        run = (config.out_dir, str(config.run_name), name_of(config, ""))
        first = self.began.get(run)
        if first is None:
            self.began[run] = job
        else:
            say(f"{job}: skipped, the same run as {first}")
        return first is not None

    def total(self) -> None:
        """Print the total of a sweep's dry run."""
        if len(self.seconds) > 1:
            duration = datetime.timedelta(seconds=round(sum(self.seconds.values())))
            done = sum(seconds == 0 for seconds in self.seconds.values())
            say(f"{len(self.seconds)} runs, {done} done already: about {duration} in all, one after the other")


def is_main_rank() -> bool:
    return of_torchrun("RANK", 0) == 0


def say(line: str) -> None:
    if is_main_rank():
        print(line, flush=True)


def leave_note(note: Path, config: Config | None, text: str) -> None:
    """Let the report count a job that failed before its run's folder could say so."""
    if config is None or not (Path(config.out_dir) / str(config.run_name) / "error.txt").exists():
        with suppress(OSError):  # the failure is printed anyway
            note.mkdir(parents=True, exist_ok=True)
            (note / "error.txt").write_text(text, encoding="utf-8")


# --- from the command line to a configuration


def configure(composed: DictConfig, swept: AbstractSet[str] = frozenset()) -> Config:
    """A job's configuration, with its name and the command that reproduces it.

    `swept` are the keys and groups with several values. A key without effect in this job is dropped if the sweep gives
    it an effect in another one; else UserError.
    """
    config, runtime = check(composed), HydraConfig.get()
    config, kept = without_unused(config, runtime.overrides.task, swept)
    if config.run_name is None:
        config.run_name = name_of(config, runtime.runtime.choices["model"])
    config.command = command_of(kept)
    return config


def command_of(overrides: Sequence[str]) -> str:
    return shlex.join(["python", "train.py", *overrides])


def swept(arguments: Sequence[str]) -> set[str]:
    """The keys and groups to which a sweep gives several values, by the command line or by its experiment."""
    params = HydraConfig.get().sweeper.params or {}
    overrides = [*parse([f"{key}={value}" for key, value in params.items()]), *typed(arguments)]
    return {override.key_or_group for override in overrides if override.is_sweep_override()}


def check(composed: DictConfig) -> Config:
    """The composed configuration as dataclasses that have passed their checks; else UserError."""
    for name, schema in {"": Config, **SECTIONS}.items():  # OmegaConf lets +key=value through
        for key in composed[name] if name else composed:
            if key not in keys_of(schema):
                raise UserError(unknown(f"{name}.{key!s}".lstrip("."), schema))
    try:
        config = cast(Config, OmegaConf.to_object(composed))
    except (ValueError, OmegaConfBaseException) as error:
        raise UserError(explain(error)) from error
    for key, value in flatten(dataclasses.asdict(config)).items():
        if value == "":
            raise UserError(f"{key}= is empty: give a value, or leave it out")
    return config


# --- help


def help_lines() -> Iterator[str]:
    """`--help`: the docstring of train.py, the groups, and every key with its default and description."""
    yield (sys.modules["__main__"].__doc__ or "").strip()
    yield "\nGroups, group=choice:"
    for folder in sorted(path for path in CONF.iterdir() if path.is_dir()):
        for group in [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]:
            if choices := sorted(file.stem for file in group.glob("*.yaml")):
                name = f"  {group.relative_to(CONF)}=".ljust(18)
                yield textwrap.fill(" ".join(choices), 120, initial_indent=name, subsequent_indent=" " * 18)
    yield "\nKeys, key=value, with the defaults of the command without arguments:"
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        defaults: Any = OmegaConf.to_container(hydra.compose("config"))
    for section, schema in {"": Config, **SECTIONS}.items():
        values = defaults[section] if section else defaults
        yield from ("", *cli.describe_keys(schema, section and f"{section}.", values))
    yield "\n-m: a sweep over values separated by commas. --cfg job: print the configuration. --hydra-help: more flags."
