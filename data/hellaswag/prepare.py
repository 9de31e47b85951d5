"""HellaSwag's 10,042 validation questions as a file for `train.eval_task`, in llm.c's format.

    python data/hellaswag/prepare.py tokenizer=gpt2                       # from the Hugging Face hub
    python data/hellaswag/prepare.py path=hellaswag_val.jsonl out=<file>  # from the file of rowanz/hellaswag

As in llm.c, the context is `ctx`, and each choice is a space and one of `endings`, tokenised separately.
The hub needs `pip install 'nanodisp[data]'`.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanodisp import cli
from nanodisp.data.documents import read_hub
from nanodisp.data.questions import Question, write_questions
from nanodisp.data.tokenizer import Tokenizer, load_tokenizer
from nanodisp.errors import UserError

REPO = "Rowan/hellaswag"


@dataclass
class HellaSwagConfig:
    """Where the questions come from, and where they go.

    tokenizer: the run's.
    path: a jsonl file; null for the hub.
    out: the file to write; null for hellaswag_val-<tokenizer>.bin here.
    """

    tokenizer: str = "gpt2"
    path: str | None = None
    out: str | None = None


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a jsonl file."""
    try:
        yield from (json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip())
    except (OSError, ValueError) as error:
        raise UserError(f"path={path} cannot be read as jsonl: {error}") from error


def questions(rows: Iterable[dict[str, Any]], tokenizer: Tokenizer) -> Iterator[Question]:
    for number, row in enumerate(rows):
        try:
            choices = [tokenizer.encode(f" {ending}").tolist() for ending in row["endings"]]
            yield Question(tokenizer.encode(row["ctx"]).tolist(), choices, int(row["label"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"row {number} has no ctx, endings and label in HellaSwag's format: {error}") from error


def main(argv: Sequence[str], repo: str = REPO) -> None:
    config = cli.parse(HellaSwagConfig, argv)
    tokenizer = load_tokenizer(config.tokenizer)
    rows = rows_of(Path(config.path)) if config.path else read_hub(repo, None, "validation", None)
    out = Path(config.out or Path(__file__).with_name(f"hellaswag_val-{tokenizer.name}.bin"))
    converted = list(questions(rows, tokenizer))
    write_questions(out, converted)
    print(f"{out}: {len(converted):,} questions")


if __name__ == "__main__":
    cli.run(main, HellaSwagConfig)
