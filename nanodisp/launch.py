"""`python train.py key=value …`: from `conf/` and the command line to a `Config`, through Hydra.

An unknown key, a wrong type or an impossible value ends the program with a one-line error before anything is loaded.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import os
import re
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
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from nanodisp import cli
from nanodisp.config import SECTIONS, Config, Unused, flatten, name_of, unused
from nanodisp.data.prepare import DataConfig
from nanodisp.data.shards import MANIFEST, Manifest
from nanodisp.data.tokenizer import identity
from nanodisp.distributed import of_torchrun, rank_lost
from nanodisp.errors import AlreadyReported, InUse, RankLost, UserError, first_line, to_stderr

CONF = Path(__file__).resolve().parents[1] / "conf"
OFF = Unused(("dispersion.lambda_disp",), "dispersion", lambda value: value == "off", "leave one of them out")
EXTRAS = {"joblib": "joblib", "submitit_slurm": "slurm"}  # of Hydra's launchers
NOT_TYPED = {  # keys that are set elsewhere -> what to do
    "command": "train.py sets it; leave it out",
    "hydra.run.dir": "out_dir= and run_name= name the folder",
    "hydra.sweep.dir": "out_dir= is the folder of a sweep",
    "hydra.sweep.subdir": "run_name= names the folder",
}
TEXTS = ("run_name", "out_dir", "init_from", "data.path", "data.folder")  # keys of names, which may look like numbers
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


def parse(overrides: Sequence[str]) -> list[Override]:
    return OverridesParser.create().parse_overrides(list(overrides))


def typed(arguments: Sequence[str]) -> list[Override]:
    """The overrides among the arguments of a command line."""
    return parse([each for each in arguments if each[:1] != "-" and (each[:1] == "~" or "=" in each)])


def without_unused(config: Config, task: Sequence[str], swept: AbstractSet[str]) -> tuple[Config, list[str]]:
    """The configuration, and those of the overrides `task` that have an effect; see `configure`."""
    overrides = parse(task)
    values = {override.key_or_group: override.value() for override in overrides}
    off = str(values.get("dispersion")) == "off" and "dispersion.lambda_disp" in values
    off = off and config.dispersion.lambda_disp > 0
    if off:  # a contradiction, or in a sweep over both the baseline
        config = dataclasses.replace(config, dispersion=dataclasses.replace(config.dispersion, lambda_disp=0.0))
    flat = {**flatten(dataclasses.asdict(config)), "dispersion": "off"}
    rules = {**unused(flat), **({OFF.keys[0]: OFF} if off else {})}
    kept = []
    for override in overrides:
        key = override.key_or_group
        rule = rules.get(key) if override.value() is not None else None
        if rule is None:
            kept.append(str(override.input_line))
        elif swept.isdisjoint((key, rule.decider, rule.decider.partition(".")[0], "intervention", "experiment")):
            with_ = f"{rule.decider.removesuffix('.name')}={flat[rule.decider]}"  # data=…, optim=…
            raise UserError(f"{override.input_line} has no effect with {with_}: {rule.advice}")
    if config.data.name == "shards" and "data.tokenizer" in values:
        refuse_another_tokenizer(config.data)
    return config, kept


def refuse_another_tokenizer(data: DataConfig) -> None:
    """UserError for another tokenizer than the one in the manifest of the shards, which decides."""
    folder = Path(data.path or "")
    if not (folder / MANIFEST).is_file():
        return
    made = Manifest.load(folder).tokenizer
    if identity(data.tokenizer) != identity(str(folder / made) if (folder / made).is_file() else made):
        raise UserError(f"data.tokenizer={data.tokenizer} has no effect: {folder} was made with {made}; leave it out")


def refuse_dashes(arguments: Sequence[str]) -> None:
    """UserError for a key given as --key, and for two flags of Hydra that exclude each other."""
    keys = [*flatten(dataclasses.asdict(Config())), *SECTIONS, "experiment"]
    for argument in arguments:
        name, equals, value = argument.lstrip("-").partition("=")
        meant = [key for key in keys if key == name] or [key for key in keys if key.endswith(f".{name}")]
        if argument.startswith("-") and meant:
            raise UserError(f"{argument}: keys have no dashes: {meant[0]}={value if equals else '…'}")
    if {"-m", "--multirun"} & set(arguments) and {"-c", "--cfg"} & set(arguments):
        raise UserError("-m and --cfg exclude each other: --cfg shows one configuration")


def check_typed(arguments: Sequence[str]) -> None:
    """UserError for a key that is set elsewhere, and for a group such as dispersion that is not given by name."""
    for override in typed(arguments):
        key, line, folder = override.key_or_group, str(override.input_line), CONF / override.key_or_group
        if key in NOT_TYPED:
            raise UserError(f"{line}: {NOT_TYPED[key]}")
        if key == "switch" and "experiment=architecture" not in arguments and not override.is_add():
            raise UserError(f"{line}: switch= is of experiment=architecture; give the key, such as model.norm=rmsnorm")
        number, text = override.value() if key in TEXTS else None, line.partition("=")[2]
        if isinstance(number, (int, float)) and str(number) != text:  # 1e3, 2026_01, true
            quoted = shlex.quote(f'{key}="{text}"')
            raise UserError(f"{line} would be {key}={number}; as text: {quoted}")
        if not (key in SECTIONS or folder.is_dir()):
            continue
        value = None if override.is_delete() else override.value()
        if override.is_sweep_override() and key == "experiment":
            raise UserError(f"{line}: an experiment is a sweep of its own; give one in each command")
        for each in value.list if isinstance(value, ChoiceSweep) else [value]:
            if isinstance(each, dict):
                keys = " ".join(f"{part}=…" for part in flatten(each, f"{key}."))
                raise UserError(f"{line}: give the keys of {key} one by one: {keys}")
            if isinstance(each, list) and each and folder.is_dir():
                sweep = f", or for a sweep -m {key}={','.join(map(str, each))}" if len(each) > 1 else ""
                raise UserError(f"{line} is a list: give {key}={each[0]}{sweep}")
        if folder.is_dir() and not (override.is_sweep_override() or isinstance(value, str)):
            choices = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
            raise UserError(f"{line}: give {key}= one of {choices}")


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


def keys_of(schema: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(schema)]


def unknown(key: str, schema: Any) -> str:
    return f"unknown key {key}; known keys: {', '.join(keys_of(schema))}"


def explain(error: BaseException) -> str:
    """One line for an error of Hydra or OmegaConf: the key or argument, and what the innermost cause says of it."""
    while error.__cause__ is not None:
        error = error.__cause__
    key, schema = getattr(error, "full_key", None), getattr(error, "object_type", None)
    if isinstance(error, MissingConfigException):
        launcher = Path(error.missing_cfg_file or "").name
        if launcher in EXTRAS:
            return f"this launcher needs hydra's plugin for {launcher}: pip install -e '.[{EXTRAS[launcher]}]'"
        if error.options:
            return f"{error.missing_cfg_file} does not exist; choose one of {', '.join(error.options)}"
    if isinstance(error, (ConfigAttributeError, ConfigKeyError)) and dataclasses.is_dataclass(schema):
        return unknown(str(key), schema)
    if isinstance(error, OverrideParseException):
        return explain_quoting(error.override)
    if ambiguous := re.match("Ambiguous value for argument '(.*)'", str(error)):
        name, _, value = ambiguous[1].partition("=")
        text = shlex.quote(f'{name}="{value}"')
        return f"{ambiguous[1]} has several values: add -m for a sweep; as a list: {name}=[{value}]; as text: {text}"
    return f"{key}: {first_line(error)}" if key else first_line(error)


def explain_quoting(override: str) -> str:
    """What to do about an override that Hydra cannot parse."""
    key, equals, value = override.partition("=")
    if not equals:
        return f"{override}: give key=value"
    if value.startswith("~"):
        return f"{override}: ~ is not expanded here; give {key}=$HOME{value[1:]}"
    quoted = value.replace('"', r"\"")
    text = shlex.quote(f'{key}="{quoted}"')
    return f"{override} cannot be parsed; if the value is text, quote it twice: {text}"


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
