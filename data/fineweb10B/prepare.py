"""FineWeb, 10 billion tokens, already tokenised: GPT-2's tokens in llm.c's shards of 100 million each.

From kjj0/fineweb10B-gpt2 on the Hugging Face hub: one shard for validation and 103 for
training, of which `chunks` are downloaded, 200 MB each. Needs `pip install 'nanodisp[data]'`.
The manifest written beside them has no bytes per token, because the size of the text is not published.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

from nanodisp.data.prepare import DATA, DataConfig, main
from nanodisp.data.shards import MANIFEST, Manifest, describe_shard
from nanodisp.data.writer import locked
from nanodisp.errors import UserError, one_line

REPO = "kjj0/fineweb10B-gpt2"
PUBLISHED = 103


def download(file: str, folder: Path) -> None:
    """Download one shard into the folder, unless it exists. Raises UserError if that fails."""
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise UserError(f"{REPO} needs the huggingface_hub library: pip install 'nanodisp[data]'") from error
    try:
        hf_hub_download(REPO, file, repo_type="dataset", local_dir=folder)
    except Exception as error:  # of many types, from two libraries and the network
        raise UserError(f"{file} of {REPO} cannot be downloaded: {one_line(error)}") from error


def prepare(config: DataConfig, fetch: Callable[[str, Path], None] = download) -> Path:
    if config.chunks > PUBLISHED:
        raise UserError(f"data.chunks={config.chunks} is more than the {PUBLISHED} training shards of {REPO}")
    folder = Path(config.folder or DATA / config.name) / f"gpt2-{config.chunks}"
    if (folder / MANIFEST).exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        folder.mkdir(exist_ok=True)  # another process may have failed while we waited, and removed it
        if not (folder / MANIFEST).exists():  # or it has succeeded
            make(folder, config.chunks, fetch)
    return folder


def make(folder: Path, chunks: int, fetch: Callable[[str, Path], None]) -> None:
    """Fetch the shards and write the manifest."""
    shards = []
    for split, number in [("val", 0), *(("train", number) for number in range(1, chunks + 1))]:
        file = f"fineweb_{split}_{number:06d}.bin"
        try:
            fetch(file, folder)
        except UserError:
            if not list(folder.glob("*.bin")):  # else the next attempt goes on with them
                shutil.rmtree(folder)
            raise
        shards.append(describe_shard(folder / file, split))
    Manifest("gpt2", 50_257, REPO, {}, shards).save(folder)


if __name__ == "__main__":
    main(prepare)
