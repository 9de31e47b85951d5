"""The harness on runs: the figures of the exported model, and those of one token at a time."""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ |= {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}  # before their packages are imported

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import export, loglikelihood, model_of, write_checkpointed_run, write_json_tokenizer, write_ranks_file

from nanodisp.data.corpus import open_corpus
from nanodisp.data.questions import Question, read_questions, write_questions
from nanodisp.data.tokenizer import ByteTokenizer
from nanodisp.distributed import World
from nanodisp.errors import UserError
from nanodisp.evaluate import __main__ as evaluate
from nanodisp.models.generate import generate
from nanodisp.training.validation import Validation

pytestmark = pytest.mark.slow

lm_eval, datasets = pytest.importorskip("lm_eval"), pytest.importorskip("datasets")
pytest.importorskip("lm_eval.evaluator")

from nanodisp.evaluate.tasks import find_tasks  # noqa: E402

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{label}}}}"
target_delimiter: ""
metadata: {{version: 2.0}}
"""
CHOICES = """
output_type: multiple_choice
doc_to_choice: "{{choices}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
TEXTS = """
output_type: loglikelihood_rolling
metric_list:
  - {metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
"""
PAIR = """
group: pair
task: [letters, letters_again]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
"""
BYTE = ByteTokenizer()


def encode(text: str) -> list[int]:
    return BYTE.encode(text).tolist()


def rows() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(3)
    letters = lambda n: bytes((97 + torch.randint(0, 9, (n,), generator=generator)).tolist()).decode()  # noqa: E731
    lengths = (3, 9, 2, 6)  # so that a sum prefers the short, and a mean does not
    return [
        {"question": letters(6 + i), "choices": [" " + letters(n) for n in lengths], "label": i % 4} for i in range(40)
    ]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    for name, kind in (("letters", CHOICES), ("letters_again", CHOICES), ("texts", TEXTS)):
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, data=folder / "rows.jsonl") + kind)
    (folder / "nowhere.yaml").write_text(TASK.format(name="nowhere", data=folder / "none.jsonl") + CHOICES)
    (folder / "pair.yaml").write_text(PAIR)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpointed_run(tmp_path_factory.mktemp("model") / "run", "byte", block_size=48)


list_tasks = functools.cache(lm_eval.tasks.TaskManager)  # all of the harness's take seconds


@pytest.fixture(autouse=True)
def quick(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip slow looks at the machine, and write nothing outside of the test's folder."""
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", list_tasks)
    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda results: None)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


def go(checkpoint: Path, tasks: Path, *arguments: str) -> None:
    defaults = {"checkpoint": str(checkpoint), "task_folder": str(tasks), "device": "cpu"}
    given = dict(argument.split("=", 1) for argument in arguments)
    evaluate.main([f"{key}={value}" for key, value in {**defaults, **given}.items()])


def tasks_in(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())["tasks"]


def by_hand(run: Path) -> tuple[float, float]:
    """acc and acc_norm of the rows."""
    model, found = model_of(run), []
    for row in rows():
        sums = [loglikelihood(model, encode(row["question"]), encode(choice))[0] for choice in row["choices"]]
        means = [total / len(choice) for total, choice in zip(sums, row["choices"], strict=True)]
        found.append((sums.index(max(sums)) == row["label"], means.index(max(means)) == row["label"]))
    return sum(a for a, _ in found) / 40, sum(b for _, b in found) / 40


# --- one task, four ways ------------------------------------------------------------------------


def test_the_harness_the_file_of_questions_and_one_token_at_a_time_agree(
    run: Path, tasks: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    go(run, tasks, "tasks=letters", "batch_size=3")
    found = tasks_in(run / "evaluation.json")["letters"]
    acc, acc_norm = by_hand(run)
    assert acc != acc_norm
    assert [found["metrics"][name]["value"] for name in ("acc", "acc_norm")] == [acc, acc_norm]
    assert {key: found[key] for key in ("shots", "examples", "version", "seed")} == {
        **{"shots": 0, "examples": 40, "version": 2.0, "seed": 1234}
    }
    printed = capsys.readouterr().out
    stderr = found["metrics"]["acc"]["stderr"]
    assert f"letters                  acc                   {acc:.4f}   {stderr:.4f}     0       40" in printed
    assert f"mean                     of 1 tasks            {acc:.4f}   {stderr:.4f}" in printed

    questions = [Question(encode(row["question"]), list(map(encode, row["choices"])), row["label"]) for row in rows()]
    write_questions(tmp_path / "letters.bin", questions)
    validation = Validation(
        open_corpus(corpus, "byte"),
        World(0, 1, torch.device("cpu")),
        block_size=48,
        n_windows=1,
        rows=1,
        autocast=contextlib.nullcontext,
        questions=read_questions(tmp_path / "letters.bin", 257),
    )
    assert validation.answer(model_of(run)) == {"accuracy": acc_norm, "examples": 40}


def test_the_exported_model_has_the_same_figures(run: Path, tasks: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    exported = export(run, tmp_path / "exported")
    for checkpoint in (run, exported):
        go(checkpoint, tasks, "tasks=letters,texts", f"out={tmp_path / checkpoint.name}.json")
    one, other = (tasks_in(tmp_path / f"{name}.json") for name in ("run", "exported"))
    assert one["letters"] == other["letters"]
    perplexity = [found["texts"]["metrics"]["byte_perplexity"]["value"] for found in (one, other)]
    assert perplexity[0] == pytest.approx(perplexity[1], rel=1e-5)


def test_a_llama_with_a_tokenizer_json_has_the_figures_of_its_export(tasks: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    spec, shape = write_json_tokenizer(tmp_path / "tokenizer", around=False), {"norm": "rmsnorm", "position": "rotary"}
    run = write_checkpointed_run(tmp_path / "run", str(spec), block_size=48, **shape, mlp="swiglu", bias=False)
    for checkpoint in (run, export(run, tmp_path / "exported")):
        go(checkpoint, tasks, "tasks=letters", f"out={tmp_path / checkpoint.name}.json")
    assert tasks_in(tmp_path / "run.json") == tasks_in(tmp_path / "exported.json")


# --- the file and the tasks ----------------------------------------------------------------------


def test_a_later_call_adds_and_replaces_tasks(run: Path, tasks: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "evaluation.json"
    go(run, tasks, "tasks=letters", "limit=5", f"out={out}")
    first = tasks_in(out)
    assert first["letters"]["examples"] == 5
    go(run, tasks, "tasks=letters_again,texts", "limit=4", "num_fewshot=1", f"out={out}")
    assert tasks_in(out)["letters"] == first["letters"]
    assert tasks_in(out)["letters_again"]["shots"] == 1
    assert list(tasks_in(out)["texts"]["metrics"]) == ["byte_perplexity"]
    go(run, tasks, "tasks=letters", f"out={out}")
    assert tasks_in(out)["letters"]["examples"] == 40
    assert len(tasks_in(out)) == 3


def test_a_group_is_one_task(run: Path, tasks: Path, tmp_path: Path) -> None:
    go(run, tasks, "tasks=pair", "limit=8", f"out={tmp_path / 'out.json'}")
    found = tasks_in(tmp_path / "out.json")
    assert list(found) == ["pair"]
    assert found["pair"]["examples"] == 16
    assert list(found["pair"]["metrics"]) == ["acc"]


def test_the_seed_decides_the_few_shot_examples(
    run: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nanodisp.evaluate.harness import HarnessModel

    encode, read = HarnessModel.tok_encode, set()
    monkeypatch.setattr(HarnessModel, "tok_encode", lambda self, text: read.add(text) or encode(self, text))
    found = []
    for seed in (1, 1, 2):
        go(run, tasks, "tasks=letters", "num_fewshot=1", f"seed={seed}", f"out={tmp_path / 'out.json'}", "redo=true")
        found.append(read.copy())
        read.clear()
    assert found[0] == found[1] != found[2]
    assert found[0]


def test_the_papers_tasks_are_known_to_the_harness(tasks: Path) -> None:
    assert (len(evaluate.PAPER), len(set(evaluate.PAPER14))) == (10, 14)
    find_tasks(evaluate.PAPER14, str(tasks))


def test_the_papers_tasks_have_zero_shots_or_one(
    run: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "PAPER", ("letters", "letters_again"))  # the data of the paper's tasks are on the hub
    monkeypatch.setattr(evaluate, "FEW_SHOT", ("letters_again",))
    out, shots = tmp_path / "out.json", []
    for arguments in ((), ("num_fewshot=2",)):
        go(run, tasks, "tasks=paper", "limit=2", f"out={out}", *arguments)
        shots.append([entry["shots"] for entry in tasks_in(out).values()])
    assert shots == [[0, 1], [0, 2]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tasks=nowhere"], "task nowhere cannot be loaded"),
        (["tasks=hellaswag"], "task hellaswag cannot be loaded.*(Offline|reach|Hub)"),
        (["tasks=lettters"], "tasks=lettters is unknown; did you mean letters"),
        (["tasks=blinp", "task_data=nowhere"], "tasks=blinp is unknown; did you mean blimp"),
        (["tasks=letters,"], "empty name"),
        (["tasks=letters", "limit=0"], "limit=0 must be at least 1"),
        (["tasks=letters", "batch_size=0"], "batch_size=0"),
        (["tasks=letters", "num_fewshot=-1"], "must not be negative"),
        (["tasks=letters", "seed=-1"], "seed=-1"),
        (["tasks=letters", "task_folder=nowhere"], "task_folder=nowhere is not a folder"),
        (["tasks=letters", "checkpoint=nowhere"], "nowhere holds no checkpoint"),
    ],
)
def test_mistakes_are_reported_in_one_line(run: Path, tasks: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        go(run, tasks, *arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("what", ["weights", "tokenizer"])
def test_an_incomplete_hugging_face_folder_is_rejected(run: Path, tasks: Path, tmp_path: Path, what: str) -> None:
    folder = tmp_path / "exported"
    export(run, folder)
    if what == "weights":
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    else:
        for file in folder.glob("tokenizer*"):
            file.unlink()
    with pytest.raises(UserError, match="cannot be loaded" if what == "weights" else "has no tokenizer"):
        go(folder, tasks, "tasks=letters")


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_a_model_with_invented_or_damaged_weights_is_rejected(run: Path, tasks: Path, tmp_path: Path) -> None:
    folder = export(run, tmp_path / "exported")
    change_weights(folder, lambda tensors: tensors["transformer.ln_f.weight"].fill_(torch.nan))
    with pytest.raises(UserError, match="exported gives NaN or infinite logits"):
        go(folder, tasks, "tasks=letters")
    change_weights(folder, lambda tensors: tensors.pop("transformer.h.1.mlp.c_fc.weight"))
    with pytest.raises(UserError, match=r"is incomplete: as a GPT2LMHeadModel it lacks weights, such as \S*c_fc"):
        go(folder, tasks, "tasks=letters")
    assert not (folder / "evaluation.json").exists()


def test_an_encoder_is_rejected(run: Path, tasks: Path, tmp_path: Path) -> None:
    """transformers opens BERT as a language model, but it sees the tokens that it should predict."""
    transformers = pytest.importorskip("transformers")
    shape = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
    torch.manual_seed(0)
    model = transformers.BertForMaskedLM(transformers.BertConfig(**shape, vocab_size=257, max_position_embeddings=48))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    folder = export(run, tmp_path / "exported")  # for its tokenizer
    model.save_pretrained(folder)
    with pytest.raises(UserError, match="sees the tokens that it should predict, so it is an encoder"):
        go(folder, tasks, "tasks=letters")
    ours = write_checkpointed_run(tmp_path / "encoder", "byte", causal=False)
    with pytest.raises(UserError, match=r"bidirectional model .* cannot be evaluated on benchmarks; .*condensation"):
        go(ours, tasks, "tasks=letters")


def test_an_encoder_decoder_is_rejected(run: Path, tasks: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    shape = {"num_layers": 1, "num_heads": 2, "d_model": 16, "d_ff": 16, "d_kv": 8}
    folder = export(run, tmp_path / "exported")  # for its tokenizer
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**shape, vocab_size=257))
    model.save_pretrained(folder)
    with pytest.raises(
        UserError, match=r"exported is an encoder-decoder \(t5\): give a decoder, such as GPT-2"
    ) as error:
        go(folder, tasks, "tasks=letters")
    assert "\n" not in str(error.value)


def test_prompts_that_are_cut_are_counted_for_a_hugging_face_model(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from nanodisp.evaluate.hugging_face import HuggingFaceModel

    model = HuggingFaceModel(str(export(run, tmp_path / "exported")), device="cpu", batch_size=2)
    settings = {"max_gen_toks": 8, "until": ["x"], "do_sample": False}
    model.generate_until(requests(("ab" * 19, settings), ("ab" * 25, settings)), disable_tqdm=True)
    assert (model.max_length, model.cut) == (48, 1)


def test_a_missing_tokenizer_can_be_given_if_it_fits(tasks: Path, tmp_path: Path) -> None:
    ranks = write_ranks_file(tmp_path / "tiny.tiktoken")
    folder = write_checkpointed_run(tmp_path / "run", str(ranks))
    moved = ranks.rename(tmp_path / "moved.tiktoken")
    with pytest.raises(UserError, match=r"tiny\.tiktoken cannot be read.*; tokenizer=… replaces the run's own"):
        go(folder, tasks, "tasks=letters")
    go(folder, tasks, "tasks=letters", "limit=2", f"tokenizer={moved}")
    small = write_checkpointed_run(tmp_path / "byte", "byte")
    with pytest.raises(UserError, match="has a vocabulary of 270 tokens, the model of 257"):
        go(small, tasks, "tasks=letters", f"tokenizer={moved}")


def test_the_checkpoint_of_a_step_is_evaluated(run: Path, tasks: Path, tmp_path: Path) -> None:
    go(Path(f"{run}@3"), tasks, "tasks=letters", "limit=2", f"out={tmp_path / 'out.json'}")
    assert json.loads((tmp_path / "out.json").read_text())["model"] == "run at step 3"


def test_the_tasks_after_one_that_cannot_be_loaded_are_evaluated(run: Path, tasks: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^task nowhere cannot be loaded.*$"):
        go(run, tasks, "tasks=nowhere,letters", "limit=2", f"out={tmp_path / 'out.json'}")
    assert list(tasks_in(tmp_path / "out.json")) == ["letters"]


def test_more_than_one_rank_is_rejected(run: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="without torchrun"):
        go(run, tasks, "tasks=letters")


def test_figures_of_another_step_are_not_mixed(run: Path, tasks: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    out.write_text(json.dumps({"model": "run at step 2", "tasks": {}}))
    with pytest.raises(UserError, match="is of run at step 2, this is run at step 3: give another file"):
        go(run, tasks, "tasks=letters", f"out={out}")
    out.write_text("{")
    with pytest.raises(UserError, match="is not what nanodisp"):
        go(run, tasks, "tasks=letters", f"out={out}")


# --- the requests of the harness ------------------------------------------------------------------


@pytest.fixture(scope="module")
def harness_model(run: Path) -> Any:
    from nanodisp.evaluate.harness import HarnessModel

    return HarnessModel(model_of(run), BYTE, batch_size=2)


def requests(*arguments: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=args) for args in arguments]


texts = st.text(min_size=1, max_size=20)


@settings(deadline=None, max_examples=10)
@given(st.lists(st.tuples(st.sampled_from(["", " ", "ab", "ab "]) | texts, texts), min_size=1, max_size=4))
def test_loglikelihoods_equal_those_of_one_token_at_a_time(harness_model: Any, pairs: list[tuple[str, str]]) -> None:
    found = harness_model.loglikelihood(requests(*pairs), disable_tqdm=True)
    for (context, continuation), (total, greedy) in zip(pairs, found, strict=True):
        stripped = context.rstrip()  # the harness scores the space between with the continuation
        expected = loglikelihood(
            harness_model.model, encode(stripped) or [BYTE.eot], encode(context[len(stripped) :] + continuation)
        )
        assert total == pytest.approx(expected[0], abs=1e-3)
        assert greedy == expected[1]


def test_each_rank_gets_the_sum_and_the_greedy_answers_of_all(harness_model: Any) -> None:
    from nanodisp.evaluate.harness import HarnessModel

    sent: list[torch.Tensor] = []  # by the other rank

    class TwoRanks(World):
        def sum(self, x: torch.Tensor) -> torch.Tensor:
            if self.rank == 1:
                sent.append(x)
                return x
            return x + sent.pop(0)

    every_token = [(None, [context], [token]) for context in (97, 98) for token in range(256)]
    other, first = (
        HarnessModel(harness_model.model, BYTE, 2, TwoRanks(rank, 2, torch.device("cpu"))) for rank in (1, 0)
    )
    other._loglikelihood_tokens(every_token, disable_tqdm=True)
    assert all(0 < part.count_nonzero() < len(every_token) for part in sent), "each has a share, and a greedy answer"
    expected = harness_model._loglikelihood_tokens(every_token, disable_tqdm=True)
    assert first._loglikelihood_tokens(every_token, disable_tqdm=True) == expected
    assert sum(greedy for _, greedy in expected) == 2


@settings(deadline=None, max_examples=10)
@given(st.lists(st.text(max_size=120), min_size=1, max_size=3))
def test_a_long_text_is_scored_window_by_window(harness_model: Any, long: list[str]) -> None:
    found = harness_model.loglikelihood_rolling(requests(*((text,) for text in long)), disable_tqdm=True)
    for text, total in zip(long, found, strict=True):
        row, block_size = [BYTE.eot, *encode(text)], harness_model.model.config.block_size
        expected = 0.0
        for start in range(1, len(row), block_size):
            end = min(start + block_size, len(row))
            first = 0 if start == 1 else end - block_size - 1  # the last window is full
            expected += loglikelihood(harness_model.model, row[first:start], row[start:end])[0]
        assert total == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("prompt", ["", "ab", "abcdefgh" * 9])
@pytest.mark.parametrize("new_tokens", [9, 40, 60])
def test_a_greedy_continuation_ends_at_the_first_stop(harness_model: Any, prompt: str, new_tokens: int) -> None:
    room = harness_model.model.config.block_size - new_tokens
    context = (encode(prompt) or [BYTE.eot])[-max(room, 24) :]
    harness_model.cut = 0
    tokens = [int(t) for t in generate(harness_model.model, torch.tensor([context]), new_tokens, temperature=0)]
    text = BYTE.decode_bytes(tokens[: tokens.index(BYTE.eot)] if BYTE.eot in tokens else tokens).decode(
        errors="replace"
    )
    stop = text[4:5]
    options = {"max_gen_toks": new_tokens, "do_sample": False}
    free, stopped, other = harness_model.generate_until(
        requests((prompt, options), (prompt, {**options, "until": [stop, "never"]}), ("x" + prompt, options)),
        disable_tqdm=True,
    )
    assert (free, stopped) == (text, text[: text.index(stop)])
    assert harness_model.cut == (3 if len(prompt) > len(context) else 0)
    assert isinstance(other, str)


def test_the_name_of_end_of_text_is_plain_text(harness_model: Any) -> None:
    assert BYTE.eot not in harness_model.tok_encode("a<|endoftext|>b")
    assert harness_model.prefix_token_id == BYTE.eot
