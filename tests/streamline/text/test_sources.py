"""Opening a SPEC: which documents it gives, the parts of the standard library, and errors instead of fallbacks."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace

import datasets
import pyarrow
import pytest
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import httpx
from pyarrow import parquet

from optimum.streamline.errors import StreamlineError
from optimum.streamline.text.sources import STDLIB_PARTS, open_text, stdlib_part


def read_documents(spec: str, seed: int = 0) -> list[str]:
    return list(open_text(spec, seed).documents)


def test_library_parts_share_no_document_and_are_about_a_tenth() -> None:
    parts = {part: read_documents(f"stdlib:{part}") for part in STDLIB_PARTS}
    digests = {part: {hashlib.sha256(text.encode()).digest() for text in texts} for part, texts in parts.items()}
    assert not digests["train"] & digests["eval"]
    assert not digests["train"] & digests["calibration"]
    assert not digests["calibration"] & digests["eval"]
    total = sum(len(text) for texts in parts.values() for text in texts)
    for part in ("calibration", "eval"):
        assert 0.05 < sum(map(len, parts[part])) / total < 0.2


def test_part_is_a_function_of_the_path_alone() -> None:
    # Literal values, because a changed rule would move training text into the evaluation part.
    paths = ("argparse.py", "asyncio/events.py", "json/decoder.py", "typing.py", "turtle.py", "zipfile.py", "ast.py")
    expected = {path: hashlib.sha256(path.encode()).digest()[0] % 10 for path in paths}
    names = {0: "calibration", 1: "eval"}
    assert {path: stdlib_part(path) for path in paths} == {p: names.get(b, "train") for p, b in expected.items()}
    assert stdlib_part("asyncio/events.py") == "train"


def test_files_are_read_in_the_order_of_their_paths(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    for name in ("c.txt", "a.txt", "below/b.md"):
        (tmp_path / name).write_text(name)
    assert read_documents(str(tmp_path)) == ["a.txt", "below/b.md", "c.txt"]


def test_a_file_is_one_document(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("one\n\ntwo\n")
    assert read_documents(str(file)) == ["one\n\ntwo\n"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere.txt", "'nowhere.txt': no such file or folder; give a text file, a table"),
        ("", "SPEC '': names no text, perhaps because a variable is not set; give a text file"),
        (",text", "SPEC ',text': names no text"),
        ("x" * 300, "SPEC 'x{300}': (no such file or folder|.*File name too long.*); give a text file"),
        ("x" * 300 + ",text", "SPEC 'x{300},text': (no such file or folder|.*File name too long.*); give a text file"),
        ("stdlib:test", "'stdlib:test': the part must be one of train, calibration, eval"),
    ],
)
def test_a_bad_spec_names_itself_and_the_alternatives(spec: str, message: str) -> None:
    with pytest.raises(StreamlineError, match=message):
        read_documents(spec)


def test_a_folder_without_text_is_refused_and_says_what_it_passed_over(tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    with pytest.raises(StreamlineError, match=r"holds no \.csv, \.json, .*\.txt.* file; 1 other files were ignored"):
        read_documents(str(tmp_path))


def test_a_folder_is_read_by_the_kinds_of_its_files(tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text('{"a": 1}')  # JSON beside text files is not read
    (tmp_path / "rows.jsonl").write_text('{"text": "a row"}')
    (tmp_path / "notes.md").write_text("notes")
    (tmp_path / "weights.bin").write_bytes(bytes(10))
    assert read_documents(str(tmp_path)) == ["notes", "a row"]
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "rows.json").write_text('[{"text": "one"}, {"text": "two"}]')
    assert read_documents(str(tmp_path / "only")) == ["one", "two"]


def test_a_hub_dataset_without_network_is_an_error_with_alternatives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(StreamlineError, match=r"'hub:no/such': cannot be read \(.+\); give a text file") as caught:
        read_documents("hub:no/such")
    assert "\n" not in str(caught.value)


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def no_answer(_: object, name: str, **how: object) -> None:
        asked.append((name, how["timeout"] is not None))
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", no_answer)
    with pytest.raises(StreamlineError, match=r"cannot be read \(no network\); give a text file, .*or stdlib"):
        read_documents("hub:no/such")
    assert asked == [("no/such", True)]


def test_a_hub_dataset_is_read_by_datasets_own_loader(tmp_path: Path) -> None:
    # `datasets` also accepts a folder as a data set's name, so this runs the code for the Hub without a network.
    rows = ['{"text": "first", "source": "a"}', '{"text": "second", "source": "b"}', '{"text": " ", "source": "c"}']
    (tmp_path / "data.jsonl").write_text("\n".join(rows))
    assert read_documents(f"hub:{tmp_path}") == ["first", "second"]
    assert read_documents(f"hub:{tmp_path},,train,source") == ["a", "b", "c"]
    with pytest.raises(StreamlineError, match="no column 'body'; there are source, text"):
        read_documents(f"hub:{tmp_path},,train,body")
    with pytest.raises(StreamlineError, match="at most DATASET, CONFIG, SPLIT and COLUMN"):
        read_documents(f"hub:{tmp_path},,train,body,more")


def test_the_parts_of_a_hub_dataset_come_in_an_order_of_the_seed_and_neighbours_stay_together(tmp_path: Path) -> None:
    rows = [f"{number}" for number in range(400)]
    parquet.write_table(pyarrow.table({"text": rows}), tmp_path / "data.parquet", row_group_size=20)
    first = read_documents(f"hub:{tmp_path}", seed=1)
    assert first == read_documents(f"hub:{tmp_path}", seed=1)
    assert first != read_documents(f"hub:{tmp_path}", seed=2)
    assert sorted(first, key=int) == rows
    assert all(first[start : start + 20] == rows[(at := int(first[start])) : at + 20] for start in range(0, 400, 20))
    assert [int(first[start]) for start in range(0, 400, 20)] != list(range(0, 400, 20))


def test_a_hub_dataset_is_read_at_the_commit_that_its_revision_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "data.jsonl").write_text('{"text": "a row"}')
    load, asked = datasets.load_dataset, {}

    def info(_: object, name: str, revision: str | None, **how: object) -> SimpleNamespace:
        asked["info"] = (name, revision)
        return SimpleNamespace(sha="0123abc")

    def loaded(name: str, *words: object, revision: str | None, **how: object) -> object:
        asked["rows"] = (name, words, revision)
        return load(str(tmp_path), split="train", streaming=True)

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", info)
    monkeypatch.setattr("datasets.load_dataset", loaded)
    text = open_text("hub:org/name@v1,config,test")
    assert (text.commit, list(text.documents)) == ("0123abc", ["a row"])
    assert asked == {"info": ("org/name", "v1"), "rows": ("org/name", ("config",), "0123abc")}
    assert open_text("hub:org/name").commit == "0123abc"
    assert asked["info"] == ("org/name", None)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RepositoryNotFoundError, "'hub:org/name': the Hub has no such data set, or you have no access to it"),
        (RevisionNotFoundError, "'hub:org/name@v9': the data set has no such revision"),
    ],
)
def test_what_the_hub_does_not_have_is_said(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception], message: str
) -> None:
    def info(*_: object, **how: object) -> None:
        raise error("404 Client Error", response=httpx.Response(404, request=httpx.Request("GET", "https://hub")))

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", info)
    with pytest.raises(StreamlineError, match=message):
        open_text("hub:org/name@v9")
