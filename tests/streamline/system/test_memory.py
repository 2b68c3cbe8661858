"""Tests of `free_memory`, inside and outside of a container."""

import psutil
import pytest

from optimum.streamline.system import memory


@pytest.mark.parametrize(
    ("limit", "free"), [("5000", 5000 - 3000 + 1200), ("max", None), ("99999999999999999", None), (None, None)]
)
def test_a_container_may_have_less_than_the_machine(tmp_path, monkeypatch, limit, free):
    monkeypatch.setattr(memory, "_GROUP", tmp_path)
    if limit is not None:
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        (tmp_path / "memory.current").write_text("3000\n")
        (tmp_path / "memory.stat").write_text("anon 1700\nfile 1300\ninactive_file 1200\n")
    available = psutil.virtual_memory().available
    assert memory.free_memory() == pytest.approx(available if free is None else free, rel=0.2)
