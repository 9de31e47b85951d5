"""English of four kinds, the corpus of the study: guides and documentation, novels, short stories, textbooks.

    python data/english/prepare.py path=<folder of the English corpus>

The folder holds docs.parquet, fiction.parquet, stories.parquet and textbooks.parquet, one document
per row, and the vocabulary bpe4096.tiktoken. docs/study/plan.md lists the sources, licences and
checksums. Needs `pip install 'nanodisp[data]'`.
"""

from dataclasses import replace
from pathlib import Path

from nanodisp.data.prepare import DataConfig, main, prepare_files
from nanodisp.errors import UserError

FILES = ("docs.parquet", "fiction.parquet", "stories.parquet", "textbooks.parquet")


def prepare(config: DataConfig) -> Path:
    if config.path is None:
        raise UserError(f"data=english needs data.path, the folder with {', '.join(FILES)}")
    folder = Path(config.path).resolve()
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise UserError(f"data.path={config.path} lacks {', '.join(missing)}; docs/study/plan.md describes them")
    if config.tokenizer.endswith(".tiktoken"):  # relative to the text; an absolute path is unchanged
        config = replace(config, tokenizer=str(folder / config.tokenizer))
    return prepare_files(config, [folder / name for name in FILES], root=folder, stem="english")


if __name__ == "__main__":
    main(prepare)
