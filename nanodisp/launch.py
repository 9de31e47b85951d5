"""`python train.py key=value …`: from `conf/` and the command line to a `Config`, through Hydra.

An unknown key, a wrong type or an impossible value ends the program with one line before anything is loaded.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
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
from nanodisp.config import SECTIONS, Config, name_of
from nanodisp.errors import UserError, first_line

CONF = Path(__file__).resolve().parents[1] / "conf"


def main(task: Callable[[Config], None]) -> None:
    """Run `task` with each configuration that Hydra composes from `conf/` and the command line.

    A user's mistake becomes one line on stderr and exit code 2; a bug shows its traceback. In a sweep neither keeps the
    other jobs from running, and all failures are summarised at the end.
    """
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors come to the lines below, not to Hydra's printer
    ConfigStore.instance().store(name="schema", node=Config)
    failures: list[str] = []
    main_process = os.getpid()

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
    def entry(composed: DictConfig) -> None:
        try:
            task(configure(composed))
        except Exception as error:
            mistake = isinstance(error, UserError)
            in_sweep = HydraConfig.get().mode == RunMode.MULTIRUN
            if not mistake and not in_sweep:
                raise
            line = str(error) if mistake else f"{type(error).__name__}: {error}"
            failures.append(f"{' '.join(HydraConfig.get().overrides.task)}: {line}" if in_sweep else line)
            if not mistake:
                traceback.print_exc()
            if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # the other ranks may not know: torchrun must end them
                sys.exit(cli.fail(UserError(failures[-1])))
            if os.getpid() != main_process:  # a worker of another launcher, which reports only the first failure
                cli.fail(UserError(failures[-1]))
                raise UserError(failures[-1]) from error

    try:
        if not CONF.is_dir():
            raise UserError(f"training needs a clone of nanodisp, with its conf/ and data/: {CONF} does not exist")
        check_keys(sys.argv[1:])
        entry()
    except (UserError, HydraException, OmegaConfBaseException) as error:
        failures.append(explain(error))
    except KeyboardInterrupt:
        print("interrupted: the same command resumes from the last checkpoint", file=sys.stderr, flush=True)
        os._exit(130)  # at once: a checkpoint that is being written is not waited for
    for failure in failures:
        cli.fail(UserError(failure))
    if failures:
        sys.exit(2)


def configure(composed: DictConfig) -> Config:
    """A job's configuration, with its name and the command that makes it."""
    config, runtime = check(composed), HydraConfig.get()
    if config.run_name is None:
        config.run_name = name_of(config, runtime.runtime.choices["model"])
    config.command = shlex.join(["python", "train.py", *runtime.overrides.task])
    return config


def check(composed: DictConfig) -> Config:
    """The composed configuration as dataclasses, with all of their checks passed; else UserError."""
    for name, schema in {"": Config, **SECTIONS}.items():  # OmegaConf lets +key=value through
        for key in composed[name] if name else composed:
            check_key(schema, f"{name}.{key!s}".lstrip("."))
    try:
        return cast(Config, OmegaConf.to_object(composed))
    except (ValueError, OmegaConfBaseException) as error:
        raise UserError(explain(error)) from error


def check_keys(arguments: Sequence[str]) -> None:
    """UserError for `section.key=value` with a key that its section does not have."""
    for argument in arguments:
        key = argument.partition("=")[0].lstrip("+~")
        if (section := key.partition(".")[0]) in SECTIONS and "." in key:
            check_key(SECTIONS[section], key)


def check_key(schema: Any, key: str) -> None:
    known = [field.name for field in dataclasses.fields(schema)]
    if key.split(".")[-1 if schema is Config else 1] not in known:
        raise UserError(f"unknown key {key}; known are {', '.join(known)}")


def explain(error: BaseException) -> str:
    """One line from the several that Hydra and OmegaConf raise: the key, and what the innermost error says of it."""
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    for cause in causes:
        if options := getattr(cause, "options", None):  # of Hydra's MissingConfigException
            return f"{getattr(cause, 'missing_cfg_file', '')} does not exist; choose one of {', '.join(options)}"
    inner, key = causes[-1], getattr(causes[-1], "full_key", None)
    return f"{key}: {first_line(inner)}" if key else first_line(inner)
