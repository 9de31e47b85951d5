"""The scripts in `data/`. Those that need a network run on local files here, through the same code."""

import runpy
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from omegaconf import OmegaConf
from test_prepare import config, documents_of, files_of, write_jsonl, write_ranks

from nanodisp.data.prepare import CONF, DATA, DataConfig, prepare, prepare_documents
from nanodisp.data.shards import Manifest, open_split, verify
from nanodisp.errors import UserError


def script(name):
    """The module of `data/<name>/prepare.py`."""
    return SimpleNamespace(**runpy.run_path(str(DATA / name / "prepare.py")))


@pytest.mark.parametrize("path", sorted(DATA.glob("*/prepare.py")), ids=lambda path: path.parent.name)
def test_every_data_set_has_a_configuration(path):
    if path.parent.name == "hellaswag":  # questions, not text
        with pytest.raises(UserError, match="hellaswag is unknown"):
            prepare(DataConfig(name="hellaswag"))
        return
    values = OmegaConf.load(CONF / f"{path.parent.name}.yaml")
    config = OmegaConf.merge(OmegaConf.structured(DataConfig), values)  # raises for an unknown key or a wrong type
    assert config.name == path.parent.name


@pytest.mark.slow
def test_the_standard_library_is_the_default_and_excludes_its_tests(tmp_path):
    files = script("pystdlib").stdlib_files(Path(sysconfig.get_path("stdlib")))
    assert any(path.parent.name == "pydoc_data" for path in files)
    assert not [path for path in files if {"test", "tests", "idle_test", "site-packages"} & set(path.parts)]
    assert 8e6 < sum(path.stat().st_size for path in files) < 20e6
    folders = [prepare(DataConfig(folder=str(tmp_path / place))) for place in ("one", "two")]
    assert files_of(folders[0]) == files_of(folders[1])
    assert documents_of(folders[0], "val")[0] == files[0].read_text()


@pytest.mark.slow
def test_the_standard_library_has_its_own_vocabulary_wherever_the_program_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = OmegaConf.load(CONF / "pystdlib.yaml")
    folder = prepare(DataConfig(folder=str(tmp_path), **values))
    manifest = Manifest.load(folder)
    assert (folder / manifest.tokenizer).read_bytes() == (DATA / "pystdlib" / values.tokenizer).read_bytes()
    assert manifest.bytes_per_token["val"] > 3


def test_shakespeare_is_downloaded_once(tmp_path):
    (tmp_path / "input.txt").write_text("To be, or not to be. " * 50)
    url = (tmp_path / "input.txt").as_uri()
    prepare_shakespeare = script("shakespeare").prepare
    folder = prepare_shakespeare(config(tmp_path, val_fraction=0.1), url)
    (tmp_path / "input.txt").unlink()
    assert prepare_shakespeare(config(tmp_path, val_fraction=0.1), url) == folder
    assert documents_of(folder, "val") == [("To be, or not to be. " * 50)[-105:]]


def test_shakespeare_without_a_network_is_reported(tmp_path):
    with pytest.raises(UserError, match="cannot be downloaded"):
        script("shakespeare").prepare(config(tmp_path), (tmp_path / "none").as_uri())
    assert not (tmp_path / "prepared").exists()


def test_english_is_four_files_with_a_vocabulary_beside_them(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    prepare_english, folder = script("english"), tmp_path / "english"
    folder.mkdir()
    write_ranks(folder / "bpe4096.tiktoken")
    values = config(tmp_path, folder, tokenizer="bpe4096.tiktoken", val_fraction=0.25)
    with pytest.raises(UserError, match=r"lacks docs\.parquet, fiction\.parquet"):
        prepare_english.prepare(values)
    for name in (*prepare_english.FILES, "other.parquet"):
        parquet.write_table(arrow.table({"text": [f"{name} {i}" for i in range(2)]}), folder / name)
    prepared = prepare_english.prepare(values)
    assert documents_of(prepared, "val") == ["docs.parquet 0", "stories.parquet 0"]
    assert len(documents_of(prepared, "train")) == 6
    assert (prepared / "bpe4096.tiktoken").is_file()


@pytest.fixture
def offline_datasets(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "huggingface"))
    return pytest.importorskip("datasets")


@pytest.mark.parametrize("name", ["fineweb_edu", "openwebtext"])
def test_a_data_set_of_the_hub_is_streamed(tmp_path, offline_datasets, name):
    (tmp_path / "hub").mkdir()
    write_jsonl(tmp_path / "hub" / "train.jsonl", [{"text": f"page {i}", "score": i} for i in range(6)])
    where = {"repo": str(tmp_path / "hub")} | ({"subset": None} if name == "fineweb_edu" else {})
    folder = script(name).prepare(config(tmp_path, val_fraction=0.34), **where)
    assert documents_of(folder, "val") == ["page 0", "page 3"]
    assert documents_of(folder, "train") == ["page 1", "page 2", "page 4", "page 5"]


@pytest.mark.parametrize(("val_fraction", "n"), [(0.5, 10), (0.4, 8), (0.3, 6), (0.1, 2)])
def test_of_a_stream_the_share_that_was_asked_for_is_held_out(tmp_path, val_fraction, n):
    values = config(tmp_path, val_fraction=val_fraction)
    folder = prepare_documents(values, (f"page {i}" for i in range(20)), "stream", "made by a test")
    assert len(documents_of(folder, "val")) == n
    assert len(documents_of(folder, "train")) == 20 - n


def test_a_stream_that_0_1_0_prepared_is_found_if_its_split_is_still_right(tmp_path):
    values = config(tmp_path, val_fraction=0.001)
    assert prepare_documents(values, map(str, range(9)), "stream", "made by a test").name == "stream-byte-45ea7308"


def test_wikitext_keeps_its_articles_and_splits(tmp_path, offline_datasets):
    (tmp_path / "hub").mkdir()
    article = ["", " = Title = \n", "", " Words . \n", " = = Section = = \n", " More . \n"]
    write_jsonl(tmp_path / "hub" / "train.jsonl", [{"text": line} for line in article * 2])
    write_jsonl(tmp_path / "hub" / "validation.jsonl", [{"text": line} for line in article])
    folder = script("wikitext103").prepare(config(tmp_path), repo=str(tmp_path / "hub"), subset=None)
    assert documents_of(folder, "train") == ["".join(article)] * 2
    assert documents_of(folder, "val") == ["".join(article)]


def test_wikitexts_lines_are_one_text_without_the_empty_ones(tmp_path, offline_datasets):
    (tmp_path / "hub").mkdir()
    article = ["", " = Title = \n", "", " Words . \n", " = = Section = = \n", " \n", " More . \n"]
    for split, n in (("train", 2), ("validation", 1)):
        write_jsonl(tmp_path / "hub" / f"{split}.jsonl", [{"text": line} for line in article * n])
    folder = script("wikitext103_lines").prepare(config(tmp_path), repo=str(tmp_path / "hub"), subset=None)
    kept = " = Title = \n Words . \n = = Section = = \n More . \n"
    assert documents_of(folder, "train") == [kept * 2]
    assert documents_of(folder, "val") == [kept]


def test_a_data_set_that_cannot_be_read_is_reported(tmp_path, offline_datasets):
    with pytest.raises(UserError, match="cannot be read") as error:
        script("openwebtext").prepare(config(tmp_path), repo=str(tmp_path / "none"))
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "prepared").iterdir())


def test_published_shards_get_a_manifest(tmp_path):
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, 3

    def fetch(file, folder):
        (folder / file).write_bytes(header.tobytes() + np.array([50_256, 1, 2], "<u2").tobytes())

    def refuse(file, folder):
        raise UserError("no network")

    folder = script("fineweb10B").prepare(config(tmp_path, chunks=2), fetch)
    assert (len(open_split(folder, "train")), len(open_split(folder, "val"))) == (6, 3)
    assert (verify(folder).tokenizer, verify(folder).vocab_size) == ("gpt2", 50_257)
    with pytest.raises(UserError, match="no network"):
        script("fineweb10B").prepare(config(tmp_path, chunks=3), refuse)
    assert not (tmp_path / "prepared" / "gpt2-3").exists()
    with pytest.raises(UserError, match="more than the 103"):
        script("fineweb10B").prepare(config(tmp_path, chunks=104), fetch)

    fetched = []

    def fetch_slowly(file, folder):
        fetched.append(file)
        time.sleep(0.1)
        fetch(file, folder)

    with ThreadPoolExecutor(2) as machines:  # on a shared disk
        made = [machines.submit(script("fineweb10B").prepare, config(tmp_path, chunks=4), fetch_slowly) for _ in "12"]
    assert made[0].result() == made[1].result()
    assert len(fetched) == 5
