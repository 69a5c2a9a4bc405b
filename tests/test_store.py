"""Files are written completely or not at all."""

import os

import pytest

from harness.store import atomic_write


def test_failed_write_keeps_the_old_content(tmp_path):
    def fail(file):
        file.write(b"half of the n")
        raise OSError("disk full")

    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(OSError, match="disk full"):
        atomic_write(tmp_path / "file", fail)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


def test_content_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    acts = []
    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, lambda *_, name=name: acts.append(name))
    atomic_write(tmp_path / "file", lambda file: file.write(b"new"))
    assert acts == ["fsync", "replace"]
