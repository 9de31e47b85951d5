"""`python train.py key=value …`: from `conf/` and the command line to a `Config`, through Hydra.

An unknown key, a wrong type or an impossible value ends the program with a one-line error before anything is loaded.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from nanodisp import cli
from nanodisp.config import SECTIONS, Config, name_of
from nanodisp.errors import UserError, first_line

CONF = Path(__file__).resolve().parents[1] / "conf"


def main(task: Callable[[Config], None]) -> None:
    """Run `task` with each configuration that Hydra composes from `conf/` and the command line.

    A user's mistake becomes one line on stderr and exit code 2; a bug shows its traceback. In a sweep neither stops the
    other jobs, and all failures are summarised at the end.
    """
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors reach the lines below instead of Hydra's printer
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
            if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # the other ranks may be unaware: torchrun must end them
                sys.exit(cli.fail(UserError(failures[-1])))
            if os.getpid() != main_process:  # a worker of a parallel launcher, which reports only the first failure
                cli.fail(UserError(failures[-1]))
                raise UserError(failures[-1]) from error

    try:
        if not CONF.is_dir():
            raise UserError(f"training needs a clone of nanodisp, with its conf/ and data/: {CONF} does not exist")
        entry()
    except (UserError, HydraException, OmegaConfBaseException) as error:
        failures.append(explain(error))
    except KeyboardInterrupt:
        print("interrupted: the same command resumes from the last checkpoint", file=sys.stderr, flush=True)
        os._exit(130)  # at once, without waiting for a checkpoint that is being written
    for failure in failures:
        cli.fail(UserError(failure))
    if failures:
        sys.exit(2)


def configure(composed: DictConfig) -> Config:
    """A job's configuration, with its name and the command that reproduces it."""
    config, runtime = check(composed), HydraConfig.get()
    if config.run_name is None:
        config.run_name = name_of(config, runtime.runtime.choices["model"])
    config.command = shlex.join(["python", "train.py", *runtime.overrides.task])
    return config


def check(composed: DictConfig) -> Config:
    """The composed configuration as dataclasses that have passed their checks; else UserError."""
    for name, schema in {"": Config, **SECTIONS}.items():  # OmegaConf lets +key=value through
        for key in composed[name] if name else composed:
            if key not in keys_of(schema):
                raise UserError(unknown(f"{name}.{key!s}".lstrip("."), schema))
    try:
        return cast(Config, OmegaConf.to_object(composed))
    except (ValueError, OmegaConfBaseException) as error:
        raise UserError(explain(error)) from error


def keys_of(schema: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(schema)]


def unknown(key: str, schema: Any) -> str:
    return f"unknown key {key}; known keys: {', '.join(keys_of(schema))}"


def explain(error: BaseException) -> str:
    """One line for an error of Hydra or OmegaConf: the key or argument, and what the innermost cause says of it."""
    while error.__cause__ is not None:
        error = error.__cause__
    key, schema = getattr(error, "full_key", None), getattr(error, "object_type", None)
    if isinstance(error, MissingConfigException) and error.options:
        return f"{error.missing_cfg_file} does not exist; choose one of {', '.join(error.options)}"
    if isinstance(error, (ConfigAttributeError, ConfigKeyError)) and dataclasses.is_dataclass(schema):
        return unknown(str(key), schema)
    if isinstance(error, OverrideParseException):
        return f"{error.override}: {first_line(error)}"
    return f"{key}: {first_line(error)}" if key else first_line(error)
