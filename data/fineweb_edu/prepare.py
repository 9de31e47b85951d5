"""FineWeb-Edu, the 10-billion-token sample: educational web pages, 9.7 million documents, 28 GB of parquet.

From HuggingFaceFW/fineweb-edu on the Hugging Face hub, streamed: only the shards, about 20 GB
with GPT-2's tokens, are written to disk. A killed preparation resumes when run again, although
the documents it had done are streamed again. Needs `pip install 'nanodisp[data]'`.
"""

from pathlib import Path

from nanodisp.data.documents import read_hub
from nanodisp.data.prepare import DataConfig, main, prepare_documents

REPO = "HuggingFaceFW/fineweb-edu"


def prepare(config: DataConfig, repo: str = REPO, subset: str | None = "sample-10BT") -> Path:
    documents = read_hub(repo, subset, "train", config.field)
    return prepare_documents(config, documents, stem="sample-10BT", source=f"{repo} {subset}")


if __name__ == "__main__":
    main(prepare)
