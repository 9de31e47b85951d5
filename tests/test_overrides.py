"""What a command line may say: mistakes in one line, keys without effect, names that look like numbers."""

from __future__ import annotations

import dataclasses
import importlib.util
import shlex
import shutil
from pathlib import Path

import pytest
from conftest import compose
from hydra.errors import HydraException
from tiny_models import write_json_tokenizer

from nanodisp.data.shards import Manifest
from nanodisp.data.tokenizer import copy_tokenizer
from nanodisp.errors import UserError
from nanodisp.overrides import check_typed, explain, without_unused


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
        ("run_name=.hidden", [".hidden", "begin with a letter or digit"]),
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
