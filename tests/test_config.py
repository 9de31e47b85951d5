"""Configuration: one set of defaults, help for every key, names that follow from what decides results."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from conftest import ROOT, command, compose
from omegaconf import OmegaConf

from nanodisp import cli, config, launch
from nanodisp.config import SECTIONS, Config, flatten
from nanodisp.data.prepare import DataConfig
from nanodisp.data.tokenizer import load_tokenizer
from nanodisp.dispersion.formulas import CLAMPED, VARIANTS, WITH_TAU
from nanodisp.models.gpt import GPTConfig
from nanodisp.plan import size_of
from nanodisp.training.optim import OptimConfig
from sample import SampleConfig

GROUPS = [
    f"{folder.name}={'off' if file.stem == 'off' else file.stem}"
    for folder in sorted(launch.CONF.iterdir())
    if folder.is_dir()
    for file in sorted(folder.glob("*.yaml"))
]


@pytest.mark.parametrize("choice", GROUPS)
def test_every_file_of_conf_composes(choice: str) -> None:
    where = ("experiment=architecture",) if choice.startswith("switch=") else ()  # has that group
    assert compose(*where, choice, "data.path=some/text").train.steps


def test_the_dataclasses_decide_all_but_what_the_chosen_files_of_conf_say() -> None:
    def says(group: str, choice: str) -> Any:
        return OmegaConf.to_container(OmegaConf.load(launch.CONF / group / f"{choice}.yaml")) or {}

    plain = compose("model=nano", "data=pystdlib_bytes", "optim=adamw")
    assert plain == Config(model=GPTConfig(**says("model", "nano")))
    model, data, optim = says("model", "modern"), says("data", "pystdlib"), says("optim", "muon")
    assert compose() == Config(model=GPTConfig(**model), data=DataConfig(**data), optim=OptimConfig(**optim))


def test_the_default_runs_vocabulary_is_that_of_its_model_and_has_a_file() -> None:
    tokenizer = load_tokenizer(ROOT / "data" / "pystdlib" / compose().data.tokenizer)
    assert tokenizer.vocab_size == 4096
    text = "class Python:\n    def __init__(self, *args, **kwargs):\n        return None\n"
    assert tokenizer.decode_bytes(tokenizer.encode(text)).decode() == text
    assert len(tokenizer.encode(text)) < len(text) / 3


def test_the_speedrun_keeps_to_its_limit_of_parameters() -> None:
    model = dataclasses.replace(compose("experiment=speedrun", "data.path=a").model, vocab_size=2048)
    assert size_of(model)[0] <= 850_000


FILES = [file for group in (*SECTIONS, "experiment") for file in sorted((launch.CONF / group).glob("*.yaml"))]


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_files_of_conf_hold_only_what_differs_from_the_dataclasses(file: Path) -> None:
    content: Any = OmegaConf.to_container(OmegaConf.load(file)) or {}
    if "@package _global_" not in file.read_text():
        content = {file.parent.name: content}
    content = {key: part for key, part in content.items() if key not in ("defaults", "hydra")}
    defaults = flatten(dataclasses.asdict(Config()))
    repeated = {key: value for key, value in flatten(content).items() if value == defaults[key]}
    of_other_files = {
        "dispersion": {"dispersion.lambda_disp": 0.1},  # off, in experiment=interventions
        "architecture": {"model.d_ff": None, "model.norm_eps": 1e-5},  # nano_qwen3's
    }
    assert repeated in ({}, of_other_files.get(file.stem))


def test_every_variant_has_its_file() -> None:
    for variant in VARIANTS:
        assert compose(f"dispersion={variant}").dispersion.variant == variant


def test_the_formulas_with_tau_and_of_angles_are_known() -> None:
    z = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(0))
    z = torch.cat((z, z), dim=1)  # with cosines of 1
    uses_tau = {name for name, formula in VARIANTS.items() if not torch.equal(formula(z, 1.0), formula(z, 2.0))}
    clamps = {name for name, formula in VARIANTS.items() if not torch.equal(formula(z, 1.0, 0.1), formula(z, 1.0, 0.3))}
    assert uses_tau == set(WITH_TAU)
    assert clamps == set(CLAMPED)


@pytest.mark.parametrize("key", ["path", "chunks"])
def test_the_data_sets_that_use_a_key_are_known(key: str) -> None:
    for script in (ROOT / "data").glob("*/prepare.py"):
        if (launch.CONF / "data" / f"{script.parent.name}.yaml").is_file():
            is_used = f"data.{key}" not in config.unused({"data.name": script.parent.name})
            assert is_used == (f"config.{key}" in script.read_text()), script


@pytest.mark.parametrize("schema", [Config, *SECTIONS.values(), SampleConfig])
def test_every_key_has_its_description(schema: type) -> None:
    described = [name for names, _ in cli.descriptions(schema) for name in names]
    assert sorted(described) == sorted({field.name for field in dataclasses.fields(schema)} - set(SECTIONS))


@pytest.mark.slow
def test_help_of_training_shows_groups_and_every_key_with_its_default(tmp_path: Path) -> None:
    result = command("--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert re.search(r"dispersion= +angular condition", result.stdout)
    assert re.search(r"model\.n_layer=4 .*\n +blocks, attention heads, width", result.stdout)
    for section, schema in {"": Config, **SECTIONS}.items():
        for field in dataclasses.fields(schema):
            assert f" {section}.{field.name}=".replace(" .", " ") in result.stdout or field.name in SECTIONS
    assert all(len(line) <= 120 for line in result.stdout.splitlines())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("--steps=5", "--steps=5: keys have no dashes: train.steps=5"),
        ("-m seed=1,2 --cfg job", "-m and --cfg exclude each other: --cfg shows one configuration"),
        ("optim=adamw optim.muon_lr=1", "optim.muon_lr=1 has no effect with optim=adamw: add optim=muon"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(arguments: str, line: str) -> None:
    result = forked.train(*arguments.split())
    assert (result.returncode, result.stderr, result.stdout) == (2, f"error: {line}\n", "")


@pytest.mark.slow
def test_the_command_prints_only_that_line_and_writes_nothing(tmp_path: Path) -> None:
    arguments = [f"out_dir={tmp_path}", f"data.folder={tmp_path}", "model.n_head=5"]
    result = subprocess.run([sys.executable, str(ROOT / "train.py"), *arguments], capture_output=True, text=True)
    assert result.returncode == 2
    assert (
        result.stderr
        == "error: model.n_embd=128 is not divisible by model.n_head=5: change one, or give model.head_dim\n"
    )
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_a_name_follows_from_what_decides_the_result() -> None:
    name = config.name_of(compose(), "nano")
    assert name.startswith("nano-pystdlib-angular0.1-s1337-")
    same = ("device=cpu", "wandb.mode=offline", "train.log_interval=7", "train.micro_batch_size=1", "out_dir=else")
    same += ("tensorboard=true",)
    assert config.name_of(compose(*same), "nano") == name
    ways = ("train.parallel=fsdp", "train.activation_checkpointing=true", "train.timeout_minutes=5")
    assert config.name_of(compose(*ways), "nano") == name
    for other in (
        "seed=1",
        "optim.lr=0.1",
        "model.n_layer=3",
        "train.steps=7",
        "dispersion.max_tokens=8",
        "init_from=a",
        "intervention=noisy_embeddings",
        "intervention.forget_interval=7",
        "intervention.teacher=a",
    ):
        assert config.name_of(compose(other), "nano") != name
    assert "-off-" in config.name_of(compose("dispersion=off"), "nano")


@pytest.mark.parametrize(
    ("budget", "steps"),
    [
        ({"steps": 7}, 7),
        ({"tokens": 100}, 4),
        ({"tokens": 96}, 3),
        ({"tokens_per_param": 2}, 63),
        ({"steps": 7, "tokens": 100}, 4),
    ],
)
def test_a_budget_in_tokens_becomes_steps(budget: dict[str, int], steps: int) -> None:
    assert config.count_steps(config.TrainConfig(**budget), n_parameters=1000, tokens_per_step=32) == steps


def test_unused_keys_do_not_change_a_name() -> None:
    def name(*overrides: str) -> str:
        return config.name_of(compose(*overrides), "nano")

    for used, unused in (
        (("optim=adamw",), "optim.muon_lr=1"),
        ((), "model.n_kv_head=4"),  # what null means
        ((), "model.head_dim=32"),
        ((), "data.chunks=3"),
        ((), "data.path=a"),
        (("dispersion=variance",), "dispersion.tau=2"),
        (("optim.warmup_fraction=0.1",), "optim.warmup_steps=7"),
        ((), "dispersion.warmup_fraction=0.5"),
        (("dispersion=off",), "dispersion.variant=cosine"),
        (("train.tokens=100000",), "train.steps=7"),
    ):
        assert name(*used, unused) == name(*used)
    for used, differs in (
        (("optim=muon",), "optim.muon_lr=1"),
        (("dispersion.schedule=warmup",), "dispersion.warmup_fraction=0.5"),
        (("train.tokens=100000",), "train.tokens=7"),
        (("data=text",), "data.path=a"),
        ((), "dispersion.tau=2"),
    ):
        assert name(*used, differs) != name(*used)


def test_layers_have_one_name() -> None:
    def name(layers: str) -> str:
        return config.name_of(compose("model.n_layer=4", f"dispersion.layers={layers}"), "nano")

    for same in (
        ("all", "[1,2,3,4]", "[4,-2,3,1,2]"),
        ("last", "[4]", "[-1]"),
        ("first_half", "[1,2]", "[2,-4]"),
        ("[1]", "[-4]", "[1,1]"),
    ):
        assert len(set(map(name, same))) == 1
    assert len(set(map(name, ("all", "last", "first_half", "last_half", "[1]", "[0]", "[0,1]")))) == 7


def test_absent_interventions_have_no_part_in_a_name() -> None:
    decides = config.identity(dataclasses.asdict(compose()))
    assert all(value is None for key, value in decides.items() if key.startswith("intervention."))


def test_an_older_checkpoints_linear_schedule_is_todays_warmup() -> None:
    today = dataclasses.asdict(compose("dispersion.schedule=warmup"))
    older = {**today, "dispersion": {**today["dispersion"], "schedule": "linear"}}
    assert config.identity(older) == config.identity(today)


def test_a_teacher_has_the_same_defaults_by_key_and_by_file() -> None:
    assert compose("intervention.teacher=out/teacher") == compose("intervention=distillation")


def test_the_arm_with_dispersion_is_the_run_with_dispersion() -> None:
    assert compose("dispersion=off", "intervention=dispersion") == compose("dispersion=angular")
