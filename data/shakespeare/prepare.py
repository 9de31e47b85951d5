"""Tiny Shakespeare: 1.1 MB of plays in one file, from the char-rnn repository on GitHub.

The last tenth is for validation, as in nanoGPT.
"""

from pathlib import Path
from urllib.request import urlopen

from nanodisp.data.prepare import DataConfig, main, prepare_files
from nanodisp.errors import UserError
from nanodisp.files import write_whole

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"


def download(url: str, path: Path) -> None:
    """Download a file, completely or not at all. Raises UserError if that fails."""
    try:
        with urlopen(url, timeout=60) as response:
            content = response.read()
    except OSError as error:
        raise UserError(
            f"{url} cannot be downloaded ({error}); put the file at {path}, or train with data=text"
        ) from error
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, content)


def prepare(config: DataConfig, url: str = URL) -> Path:
    folder = Path(config.folder or Path(__file__).parent)
    path = folder / "shakespeare.txt"
    if not path.exists():
        download(url, path)
    return prepare_files(config, [path], root=folder, stem="shakespeare")


if __name__ == "__main__":
    main(prepare)
