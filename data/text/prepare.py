"""Your own text: a file or a folder of text, jsonl or parquet, tokenised into shards.

python data/text/prepare.py path=<file or folder> tokenizer=<byte, gpt2 or a .tiktoken file>

Training with `data=text data.path=…` runs this automatically. The content is hashed each time,
about a second per gigabyte; for a large corpus, train with `data=shards data.path=<the folder
printed by this script>` instead.
"""

from pathlib import Path

from nanodisp.data.documents import find_files
from nanodisp.data.prepare import DataConfig, main, prepare_files
from nanodisp.errors import UserError


def prepare(config: DataConfig) -> Path:
    if config.path is None:
        raise UserError("data=text needs data.path, a file or a folder of text, jsonl or parquet")
    path = Path(config.path).resolve()
    files = find_files(path)
    if path.is_dir():
        return prepare_files(config, files, root=path, stem=path.name)
    return prepare_files(config, files, root=path.parent, stem=path.stem)


if __name__ == "__main__":
    main(prepare)
