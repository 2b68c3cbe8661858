"""Text sources: what a SPEC yields, that the parts of the library are apart, and that nothing falls back in silence."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from optimum.streamline.errors import StreamlineError
from optimum.streamline.text import STDLIB_PARTS, read_documents, stdlib_part


def test_library_parts_share_no_document_and_are_about_a_tenth() -> None:
    parts = {part: list(read_documents(f"stdlib:{part}")) for part in STDLIB_PARTS}
    digests = {part: {hashlib.sha256(text.encode()).digest() for text in texts} for part, texts in parts.items()}
    assert not digests["train"] & digests["eval"]
    assert not digests["train"] & digests["calibration"]
    assert not digests["calibration"] & digests["eval"]
    total = sum(len(text) for texts in parts.values() for text in texts)
    for part in ("calibration", "eval"):
        assert 0.05 < sum(map(len, parts[part])) / total < 0.2


def test_part_is_a_function_of_the_path_alone() -> None:
    # Literal values: a changed rule would move text that models were trained on into the evaluation part.
    paths = ("argparse.py", "asyncio/events.py", "json/decoder.py", "typing.py", "turtle.py", "zipfile.py", "ast.py")
    expected = {path: hashlib.sha256(path.encode()).digest()[0] % 10 for path in paths}
    names = {0: "calibration", 1: "eval"}
    assert {path: stdlib_part(path) for path in paths} == {p: names.get(b, "train") for p, b in expected.items()}
    assert stdlib_part("asyncio/events.py") == "train"


def test_seed_decides_the_order(tmp_path: Path) -> None:
    for name in "abcdefgh":
        (tmp_path / f"{name}.txt").write_text(name)
    first = list(read_documents(str(tmp_path), seed=1))
    assert first == list(read_documents(str(tmp_path), seed=1))
    assert first != list(read_documents(str(tmp_path), seed=2))
    assert sorted(first) == list("abcdefgh")


def test_a_file_is_one_document(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("one\n\ntwo\n")
    assert list(read_documents(str(file))) == ["one\n\ntwo\n"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere.txt", "'nowhere.txt': no such file or folder; give a text file, a folder"),
        ("stdlib:test", "'stdlib:test': the part must be one of train, calibration, eval"),
    ],
)
def test_a_bad_spec_names_itself_and_the_alternatives(spec: str, message: str) -> None:
    with pytest.raises(StreamlineError, match=message):
        list(read_documents(spec))


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StreamlineError, match=r"holds no \.md, \.py"):
        list(read_documents(str(tmp_path)))


def test_a_hub_dataset_without_network_is_an_error_with_alternatives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(StreamlineError, match=r"'hub:no/such' cannot be read \(.+\); give a text file") as caught:
        list(read_documents("hub:no/such"))
    assert "\n" not in str(caught.value)


def test_a_hub_dataset_is_read_by_datasets_own_loader(tmp_path: Path) -> None:
    # `datasets` takes a folder for a dataset's name: the same code as for the Hub, without a network.
    rows = ['{"text": "first", "source": "a"}', '{"text": "second", "source": "b"}', '{"text": " ", "source": "c"}']
    (tmp_path / "data.jsonl").write_text("\n".join(rows))
    assert sorted(read_documents(f"hub:{tmp_path}")) == ["first", "second"]
    assert sorted(read_documents(f"hub:{tmp_path},,train,source")) == ["a", "b", "c"]
    with pytest.raises(StreamlineError, match="no column 'body'; there are source, text"):
        list(read_documents(f"hub:{tmp_path},,train,body"))
