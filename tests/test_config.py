"""Configuration: one set of defaults, one clear line for every mistake, names that follow from what decides results."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, compose
from hydra.errors import HydraException
from omegaconf import OmegaConf

from nanodisp import config, launch
from nanodisp.config import SECTIONS, Config, flatten
from nanodisp.dispersion import VARIANTS
from nanodisp.errors import UserError
from nanodisp.models.gpt import GPTConfig

GROUPS = [
    f"{folder.name}={'off' if file.stem == 'off' else file.stem}"
    for folder in sorted(launch.CONF.iterdir())
    if folder.is_dir()
    for file in sorted(folder.glob("*.yaml"))
]


@pytest.mark.parametrize("choice", GROUPS)
def test_every_file_of_conf_composes(choice: str) -> None:
    assert compose(choice, "data.path=some/text").train.steps


def test_without_overrides_the_dataclasses_decide_all_but_the_models_shape() -> None:
    shape = OmegaConf.to_container(OmegaConf.load(launch.CONF / "model" / "nano.yaml"))
    assert compose() == Config(model=GPTConfig(**shape))


FILES = [file for group in (*SECTIONS, "experiment") for file in sorted((launch.CONF / group).glob("*.yaml"))]


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_files_of_conf_hold_only_what_differs_from_the_dataclasses(file: Path) -> None:
    content: Any = OmegaConf.to_container(OmegaConf.load(file)) or {}
    if "@package _global_" not in file.read_text():
        content = {file.parent.name: content}
    content = {key: part for key, part in content.items() if key not in ("defaults", "hydra")}
    defaults = flatten(dataclasses.asdict(Config()))
    repeated = {key: value for key, value in flatten(content).items() if value == defaults[key]}
    overrides_off = {"dispersion.lambda_disp": 0.1} if file.parent.name == "intervention" else {}
    assert repeated in ({}, overrides_off)


def test_every_variant_has_its_file() -> None:
    for variant in VARIANTS:
        assert compose(f"dispersion={variant}").dispersion.variant == variant


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.stepz=3", ["train.stepz", "known keys", "steps"]),
        ("+train.stepz=3", ["train.stepz", "known keys", "steps"]),
        ("sede=3", ["unknown key sede", "known keys", "seed"]),
        ("+sede=3", ["unknown key sede", "known keys", "seed"]),
        ("optim={lrr: 1}", ["unknown key optim.lrr", "muon_lr"]),
        ("train=3", ["train", "TrainConfig"]),
        ("~train.steps", ["train.steps", "does not support deletion"]),
        ("train.steps", ["train.steps", "Error parsing override"]),
        ("train.steps=[1", ["train.steps=[1"]),
        ("train.steps=many", ["train.steps", "many", "Integer"]),
        ("train.steps=0", ["train.steps=0", "positive"]),
        ("train.steps=null", ["no budget"]),
        ("model=huge", ["model/huge", "nano"]),
        ("model.n_head=5", ["n_embd=128", "n_head=5"]),
        ("optim.name=sgd", ["sgd", "adamw"]),
        ("dispersion.variant=cosin", ["cosin", "cosine"]),
        ("dispersion.layers=[7]", ["7", "0 to 6"]),
        ("dispersion.schedule=linear", ["dispersion.schedule=warmup"]),
        ("train.dtype=int8", ["int8", "bfloat16"]),
        ("train.parallel=tensor", ["tensor", "ddp, fsdp"]),
        ("train.timeout_minutes=0", ["timeout_minutes=0", "positive"]),
        ("wandb.mode=on", ["on", "offline"]),
        ("run_name=a/b", ["a/b", "letters"]),
        ("optim.warmup_fraction=1", ["warmup_fraction=1.0", "[0, 1)"]),
        ("seed=-1", ["seed=-1"]),
        ("intervention.noise_alpha=0", ["noise_alpha=0.0", "positive", "null"]),
        ("intervention.forget_interval=0", ["forget_interval=0", "at least 1", "null"]),
        ("intervention.distillation_alpha=1.5", ["distillation_alpha=1.5", "(0, 1]"]),
        ("intervention.distillation_temperature=-1", ["distillation_temperature=-1.0", "positive"]),
        ("intervention.distillation_alpha=0.5", ["distillation_alpha", "give intervention.teacher="]),
        ("intervention=forgetting", ["intervention/forgetting", "active_forgetting"]),
    ],
)
def test_a_mistake_is_reported_in_one_line_that_names_it(override: str, words: list[str]) -> None:
    with pytest.raises((UserError, HydraException)) as caught:
        compose(override)
    line = launch.explain(caught.value)
    assert "\n" not in line
    for word in words:
        assert word in line


@pytest.mark.slow
def test_the_command_prints_only_that_line_and_writes_nothing(tmp_path: Path) -> None:
    arguments = [f"out_dir={tmp_path}", f"data.folder={tmp_path}", "model.n_head=5"]
    result = subprocess.run([sys.executable, str(ROOT / "train.py"), *arguments], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == "error: model.n_embd=128 is not divisible by model.n_head=5\n"
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
        ((), "optim.muon_lr=1"),
        ((), "dispersion.warmup_fraction=0.5"),
        (("dispersion=off",), "dispersion.variant=cosine"),
        (("train.tokens=100000",), "train.steps=7"),
    ):
        assert name(*used, unused) == name(*used)
    for used, differs in (
        (("optim=muon",), "optim.muon_lr=1"),
        (("dispersion.schedule=warmup",), "dispersion.warmup_fraction=0.5"),
        (("train.tokens=100000",), "train.tokens=7"),
    ):
        assert name(*used, differs) != name(*used)


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
