"""Your own text: a file or a folder of text, jsonl or parquet, tokenised into shards.

In a folder, files named val, valid or validation are for validation, those named test are left out.

python data/text/prepare.py path=<file or folder> tokenizer=<byte, gpt2 or a .tiktoken file>

Training with `data=text data.path=…` runs this automatically. The content is hashed each time,
about a second per gigabyte; for a large corpus, train with `data=shards data.path=<the folder
printed by this script>` instead.
"""

from pathlib import Path

from nanodisp.data.documents import find_files
from nanodisp.data.prepare import DataConfig, main, prepare_files
from nanodisp.data.split import split_by_name
from nanodisp.errors import UserError


def prepare(config: DataConfig) -> Path:
    if config.path is None:
        raise UserError("data=text needs data.path, a file or a folder of text, jsonl or parquet")
    path = Path(config.path).resolve()
    files, skipped = find_files(path, config.encoding)
    if path.is_file():
        return prepare_files(config, files, root=path.parent, stem=path.stem)
    splits, left_out = split_by_name(files, path)
    by_name = splits if "val" in splits.values() else None
    return prepare_files(config, list(splits), root=path, stem=path.name, splits=by_name, skipped=[*skipped, *left_out])


if __name__ == "__main__":
    main(prepare)
