"""OpenWebText: the open remake of GPT-2's WebText, 8 million documents, 40 GB of text, 9 billion GPT-2 tokens.

From Skylion007/openwebtext on the Hugging Face hub, streamed; 18 GB of shards are written to disk.
Needs `pip install 'nanodisp[data]'`.
"""

from pathlib import Path

from nanodisp.data.documents import read_hub
from nanodisp.data.prepare import DataConfig, main, prepare_documents

REPO = "Skylion007/openwebtext"


def prepare(config: DataConfig, repo: str = REPO) -> Path:
    documents = read_hub(repo, None, "train", config.field)
    return prepare_documents(config, documents, stem="openwebtext", source=repo)


if __name__ == "__main__":
    main(prepare)
