"""The overrides of a command line: what is refused before Hydra sees it, what has no effect, and errors in one line."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override
from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf.errors import ConfigAttributeError, ConfigKeyError

from nanodisp.cli import Unused
from nanodisp.config import SECTIONS, Config, flatten, unused
from nanodisp.data.prepare import DataConfig
from nanodisp.data.shards import MANIFEST, Manifest
from nanodisp.data.tokenizer import identity
from nanodisp.errors import UserError, first_line

CONF = Path(__file__).resolve().parents[1] / "conf"
OFF = Unused(("dispersion.lambda_disp",), "dispersion", lambda value: value == "off", "leave one of them out")
EXTRAS = {"joblib": "joblib", "submitit_slurm": "slurm"}  # of Hydra's launchers
NOT_TYPED = {  # keys that are set elsewhere -> what to do
    "command": "train.py sets it; leave it out",
    "hydra.run.dir": "out_dir= and run_name= name the folder",
    "hydra.sweep.dir": "out_dir= is the folder of a sweep",
    "hydra.sweep.subdir": "run_name= names the folder",
}
TEXTS = {  # keys of names, which may look like numbers
    f"{section}.{each.name}".lstrip(".")
    for section, schema in {"": Config, **SECTIONS}.items()
    for each in dataclasses.fields(schema)
    if each.type in ("str", "str | None", "list[str]")
}


def parse(overrides: Sequence[str]) -> list[Override]:
    return OverridesParser.create().parse_overrides(list(overrides))


def typed(arguments: Sequence[str]) -> list[Override]:
    """The overrides among the arguments of a command line."""
    return parse([each for each in arguments if each[:1] != "-" and (each[:1] == "~" or "=" in each)])


def without_unused(config: Config, task: Sequence[str], swept: AbstractSet[str]) -> tuple[Config, list[str]]:
    """The configuration, and those of the overrides `task` that have an effect; see `launch.configure`."""
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
        if key in TEXTS:
            refuse_numbers(override)
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


def refuse_numbers(override: Override) -> None:
    """UserError for texts that Hydra reads as something else: 1e3 as 1000.0, 2026_01 as 202601, true as True."""
    value, (key, _, text) = override.value(), str(override.input_line).partition("=")
    given = re.split(r"[\[\](),\s]+", text)
    for each in _flat(value.list if isinstance(value, ChoiceSweep) else value):
        if isinstance(each, (int, float)) and str(each) not in given:
            quoted = shlex.quote(f'{key}="{text}"') if each is value else "each one in double quotes within single ones"
            raise UserError(f"{key}={text} would be {key}={each}; as text: {quoted}")


def _flat(value: Any) -> Iterator[Any]:
    """What a list holds at any depth, or the value itself."""
    if isinstance(value, list):
        for each in value:
            yield from _flat(each)
    else:
        yield value


# --- errors


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
