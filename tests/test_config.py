"""Configuration: one set of defaults, one clear line for every mistake, names that follow from what decides results."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from conftest import ROOT, command, compose
from hydra.errors import HydraException
from omegaconf import OmegaConf
from tiny_models import write_json_tokenizer

from nanodisp import cli, config, launch
from nanodisp.config import SECTIONS, Config, flatten
from nanodisp.data.prepare import DataConfig
from nanodisp.data.shards import Manifest
from nanodisp.data.tokenizer import copy_tokenizer, load_tokenizer
from nanodisp.dispersion.formulas import CLAMPED, VARIANTS, WITH_TAU
from nanodisp.errors import UserError
from nanodisp.models.gpt import GPTConfig
from nanodisp.overrides import check_typed, explain, without_unused
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
        ("train.steps", ["train.steps", "give key=value"]),
        ("train.steps=[1", ["train.steps=[1", "cannot be parsed"]),
        ("data.path=", ["data.path is empty", "data=text data.path=<file or folder>"]),
        ("out_dir=", ["out_dir= is empty", "leave it out"]),
        ("init_from=", ["init_from= is empty", "leave it out"]),
        ("intervention.teacher=", ["intervention.teacher= is empty", "leave it out"]),
        ("data.path=~/text", ["~", "data.path=$HOME/text"]),
        pytest.param(
            *("hydra/launcher=slurm", ["pip install -e '.[slurm]'"]),
            marks=pytest.mark.skipif(importlib.util.find_spec("submitit") is not None, reason="it is installed"),
        ),
        ("train.steps=many", ["train.steps", "many", "Integer"]),
        ("train.steps=0", ["train.steps=0", "positive"]),
        ("train.steps=null", ["no budget"]),
        ("model=huge", ["model/huge", "nano"]),
        ("model.n_head=5", ["n_embd=128", "n_head=5"]),
        ("optim.name=sgd", ["sgd", "adamw"]),
        ("dispersion.variant=cosin", ["cosin", "cosine"]),
        ("dispersion.layers=[7]", ["7", "0 to 4"]),
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
    line = explain(caught.value)
    assert "\n" not in line
    for word in words:
        assert word in line


@pytest.mark.parametrize("text", ["é.txt", 'it\'s "one".txt', "a(1).txt", "a#b&c", "x=y", "a,b.txt", "[1"])
def test_a_value_that_hydra_cannot_parse_is_answered_with_its_quoted_form(text: str) -> None:
    with pytest.raises(HydraException) as caught:
        compose("data=text", f"data.path={text}")
    line = explain(caught.value)
    (quoted,) = shlex.split(line[line.index("'data.path=") :])
    assert compose("data=text", quoted).data.path == text


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ("data.path=a.txt", ["data.path=a.txt has no effect with data=pystdlib", "data=text"]),
        ("data=shakespeare data.path=a.txt", ["data=shakespeare", "data=text"]),
        ("data=shards data.path=a data.val_fraction=0.2", ["data.val_fraction=0.2", "data=shards"]),
        ("data=wikitext103 data.val_fraction=0.2", ["data.val_fraction=0.2", "data=wikitext103"]),
        ("data=fineweb10B data.val_fraction=0.2", ["data.val_fraction=0.2", "data=fineweb10B"]),
        ("data=fineweb10B data.tokenizer=byte", ["data.tokenizer=byte", "GPT-2"]),
        ("data=text data.path=a data.chunks=3", ["data.chunks=3", "data=fineweb10B"]),
        ("data=english data.path=a data.encoding=cp1252", ["data.encoding=cp1252", "data=english", "UTF-8"]),
        ("data.field=body", ["data.field=body", "data=pystdlib"]),
        ("dispersion=off dispersion.lambda_disp=0.1", ["dispersion.lambda_disp=0.1", "dispersion=off", "one of them"]),
        ("dispersion=off dispersion.tau=2", ["dispersion.tau=2", "dispersion.lambda_disp=0"]),
        ("dispersion.lambda_disp=0 dispersion.layers=last", ["dispersion.layers=last", "lambda above 0"]),
        ("dispersion=variance dispersion.tau=2", ["dispersion.tau=2", "dispersion.variant=variance", "no tau"]),
        ("dispersion=cosine dispersion.clamp=0.1", ["dispersion.clamp=0.1", "dispersion.variant=cosine", "no angles"]),
        ("dispersion.warmup_fraction=0.2", ["dispersion.warmup_fraction=0.2", "dispersion.schedule=warmup"]),
        ("optim=adamw optim.muon_lr=1", ["optim.muon_lr=1", "optim=adamw", "optim=muon"]),
        ("optim.warmup_steps=5 optim.warmup_fraction=0.1", ["optim.warmup_steps=5", "optim.warmup_fraction=null"]),
        ("optim.schedule=constant optim.min_lr_fraction=0", ["optim.min_lr_fraction=0", "optim.schedule=constant"]),
        ("train.steps=5 train.tokens=100", ["train.steps=5", "train.tokens=100", "train.tokens=null"]),
        ("train.steps=5 train.tokens_per_param=1", ["train.steps=5", "train.tokens_per_param=null"]),
        ("experiment=midtrain_gpt2 train.steps=5", ["train.steps=5", "train.tokens=null"]),
        ("model=nano_encoder train.sample_tokens=9", ["train.sample_tokens=9", "model.causal=False", "leave it out"]),
        ("wandb.project=mine", ["wandb.project=mine", "wandb.mode=online"]),
    ],
)
def test_a_typed_key_without_effect_is_an_error_that_says_what_to_type(overrides: str, words: list[str]) -> None:
    typed = overrides.split()
    with pytest.raises(UserError) as caught:
        without_unused(compose(*typed), typed, frozenset())
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        "data=text data.path=a data.val_fraction=0.2 data.field=body",
        "data=english data.path=a",
        "data=fineweb10B data.chunks=3",
        "data.path=null",
        "dispersion=off",
        "dispersion=off dispersion.lambda_disp=0",
        "dispersion=cosine dispersion.tau=2 dispersion.schedule=warmup dispersion.warmup_fraction=0.5",
        "optim=muon optim.muon_lr=1",
        "train.tokens=100",
        "experiment=midtrain_gpt2 train.tokens=null train.steps=5",
        "experiment=nanogpt_cpu dispersion.lambda_disp=0.1 data.path=a",
        "experiment=interventions",
    ],
)
def test_keys_with_an_effect_and_settings_of_files_are_accepted(overrides: str) -> None:
    typed = overrides.split()
    assert without_unused(compose(*typed), typed, frozenset()) == (compose(*typed), typed)


def test_another_tokenizer_than_the_manifests_is_an_error(corpus: Path) -> None:
    typed = ["data=shards", f"data.path={corpus}", "data.tokenizer=gpt2"]
    with pytest.raises(UserError, match=r"data.tokenizer=gpt2 has no effect: .* was made with byte"):
        without_unused(compose(*typed), typed, frozenset())
    typed[-1] = "data.tokenizer=byte"
    without_unused(compose(*typed), typed, frozenset())


def test_the_tokenizer_json_that_shards_were_made_with_is_not_another(corpus: Path, tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    made, other = write_json_tokenizer(tmp_path / "made"), write_json_tokenizer(tmp_path / "other", lacking=b"q")
    shards = shutil.copytree(corpus, tmp_path / "shards")
    manifest = dataclasses.replace(Manifest.load(corpus), tokenizer=copy_tokenizer(str(made), shards))
    manifest.save(shards)
    typed = ["data=shards", f"data.path={shards}", f"data.tokenizer={made}"]
    without_unused(compose(*typed), typed, frozenset())
    typed[-1] = f"data.tokenizer={other}"
    with pytest.raises(UserError, match=r"other has no effect: .* was made with tokenizer\.json"):
        without_unused(compose(*typed), typed, frozenset())


def test_in_a_sweep_over_it_a_key_without_effect_is_dropped() -> None:
    typed = ["dispersion=off", "dispersion.lambda_disp=0.1", "seed=1"]
    for swept in ({"dispersion"}, {"dispersion.lambda_disp", "seed"}):
        config, kept = without_unused(compose(*typed), typed, swept)
        assert kept == ["dispersion=off", "seed=1"]
        assert config == compose("dispersion=off", "seed=1")
    with pytest.raises(UserError, match=r"dispersion\.lambda_disp=0\.1 has no effect"):
        without_unused(compose(*typed), typed, {"seed"})
    with pytest.raises(UserError, match="data=text"):
        without_unused(compose("data.path=a"), ["data.path=a"], {"seed", "dispersion"})


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


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("~dispersion", ["~dispersion", "give dispersion= one of", "off"]),
        ("~optim", ["give optim= one of adamw, muon"]),
        ("dispersion=null", ["dispersion=null", "off"]),
        ("dispersion=false", ["dispersion=false", "off"]),
        ("model=0", ["model=0", "nano"]),
        ("experiment=lambda,seeds", ["one in each command"]),
        ("model=[micro]", ["model=[micro] is a list: give model=micro"]),
        ("model=[nano,micro]", ["give model=nano, or for a sweep -m model=nano,micro"]),
        ("dispersion={lambda_disp: 0.3}", ["give the keys of dispersion one by one: dispersion.lambda_disp=…"]),
        ("+optim={lr: 1, name: muon}", ["give the keys of optim one by one: optim.lr=… optim.name=…"]),
        ("train={steps: 3}", ["give the keys of train one by one: train.steps=…"]),
        ("dispersion={tau: 1},{tau: 2}", ["give the keys of dispersion one by one: dispersion.tau=…"]),
        ("switch=rmsnorm", ["switch=rmsnorm", "experiment=architecture", "model.norm=rmsnorm"]),
    ],
)
def test_a_group_is_given_as_the_name_of_a_choice(argument: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        check_typed([argument, "-m", "--cfg", "job"])
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("command=hello", ["command=hello", "leave it out"]),
        ("hydra.run.dir=x", ["hydra.run.dir=x", "out_dir= and run_name="]),
        ("hydra.sweep.dir=x", ["hydra.sweep.dir=x", "out_dir="]),
        ("run_name=1e3", ["run_name=1000.0", """'run_name="1e3"'"""]),
        ("run_name=true", ["run_name=True"]),
        ("out_dir=2026_01", ["out_dir=202601"]),
        ("wandb.group=2026_01", ["wandb.group=202601", """'wandb.group="2026_01"'"""]),
        ("wandb.tags=[a,1e3]", ["wandb.tags=[a,1e3] would be wandb.tags=1000.0", "double quotes"]),
        ("data.field=1_0,2", ["data.field=10"]),
        ("train.eval_tasks=[blimp,true]", ["=True"]),
        ("wandb.tags=[a],[1e3]", ["=1000.0"]),
    ],
)
def test_a_key_that_is_set_elsewhere_or_a_name_that_is_read_as_a_number_is_an_error(
    argument: str, words: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        check_typed([argument])
    assert all(word in str(caught.value) for word in words)


def test_choices_and_sweeps_of_them_are_accepted() -> None:
    choices = ["dispersion=off", "model=nano,micro", "hydra/launcher=local", "train.steps=3", "dispersion.layers=[1,2]"]
    check_typed([*choices, "hydra.launcher.n_jobs=4", "-m"])
    check_typed(["experiment=architecture", "switch=none,rotary", "run_name=7", 'out_dir="007"', "init_from=null"])
    check_typed(["run_name=choice(a,2)", "data.field=sort(3,1)", "wandb.group=7\t", "-m"])
    check_typed(["wandb.tags=[a, 7,'1e3']", "wandb.group=null", "data.field=a,7", 'data.tokenizer="1e3"', "-m"])
