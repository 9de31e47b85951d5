"""Your own text: a file or a folder of text, jsonl or parquet, tokenised into shards.

In a folder, files named val, valid or validation are for validation, those named test are left out.
A key without effect on the files that are found is an error, as on train.py's command line.

python data/text/prepare.py path=<file or folder> tokenizer=<byte, gpt2, a .tiktoken file or a folder>

Training with `data=text data.path=…` runs this automatically. The content is hashed each time,
about a second per gigabyte; for a large corpus, train with `data=shards data.path=<the folder
printed by this script>` instead.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from nanodisp.data.documents import find_files, is_parquet, is_text
from nanodisp.data.prepare import CONF, DataConfig, main, prepare_files
from nanodisp.data.split import split_by_name
from nanodisp.errors import UserError


def prepare(config: DataConfig) -> Path:
    if config.path is None:
        raise UserError("data=text needs data.path, a file or a folder of text, jsonl or parquet")
    path = Path(config.path).resolve()
    files, skipped = find_files(path, config.encoding)
    if path.is_file():
        check_effects(config, files, by_name=False)
        return prepare_files(config, files, root=path.parent, stem=path.stem)
    splits, left_out = split_by_name(files, path)
    by_name = splits if "val" in splits.values() else None
    check_effects(config, list(splits), by_name is not None)
    return prepare_files(config, list(splits), root=path, stem=path.name, splits=by_name, skipped=[*skipped, *left_out])


def check_effects(config: DataConfig, files: Sequence[Path], by_name: bool) -> None:
    """UserError for a key that is given, by another value than its default, and has no effect on these files."""
    defaults: Any = OmegaConf.load(CONF / "text.yaml")
    for key, unused, because in (
        ("val_fraction", by_name, "file names decide the split"),
        ("field", all(map(is_text, files)), "no file is jsonl or parquet"),
        ("encoding", all(map(is_parquet, files)), "all files are parquet"),
    ):
        value = getattr(config, key)
        if unused and value != defaults.get(key, getattr(DataConfig, key)):
            raise UserError(f"data.{key}={value} has no effect: {because}; leave it out")


if __name__ == "__main__":
    main(prepare)
