"""FineWeb, 10 billion tokens, already tokenised: GPT-2's tokens in llm.c's shards of 100 million each.

From kjj0/fineweb10B-gpt2 on the Hugging Face hub: one shard for validation and 103 for
training, of which `chunks` are downloaded, 200 MB each. Needs `pip install 'nanodisp[data]'`.
The manifest written beside them has no bytes per token, because the size of the text is not published.
"""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from nanodisp.data.prepare import DATA, DataConfig, main
from nanodisp.data.shards import MANIFEST, Manifest, describe_shard
from nanodisp.errors import UserError

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
        reason = " ".join(f"{type(error).__name__} {error}".split())[:200]
        raise UserError(f"{file} of {REPO} cannot be downloaded: {reason}") from error


def prepare(config: DataConfig, fetch: Callable[[str, Path], None] = download) -> Path:
    if config.chunks > PUBLISHED:
        raise UserError(f"data.chunks={config.chunks} is more than the {PUBLISHED} training shards of {REPO}")
    folder = Path(config.folder or DATA / config.name) / f"gpt2-{config.chunks}"
    if (folder / MANIFEST).exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    shards = []
    for split, number in [("val", 0), *(("train", number) for number in range(1, config.chunks + 1))]:
        file = f"fineweb_{split}_{number:06d}.bin"
        try:
            fetch(file, folder)
        except UserError:
            with suppress(OSError):  # unless it holds shards already, for the next attempt
                folder.rmdir()
            raise
        shards.append(describe_shard(folder / file, split))
    Manifest("gpt2", 50_257, REPO, {}, shards).save(folder)
    return folder


if __name__ == "__main__":
    main(prepare)
