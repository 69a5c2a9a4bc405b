"""Files are written completely or not at all."""

import os
import subprocess
import sys
import zlib

import numpy as np
import pytest
from safetensors.numpy import save_file

from harness.run_folder import REPOSITORY
from harness.store import atomic_write, check_replaced, checksum, write_bytes, write_text


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


def test_text_and_bytes_arrive_as_they_are(tmp_path):
    write_text(tmp_path / "text", "ü\n")
    write_bytes(tmp_path / "bytes", b"\x00\r\n")
    assert (tmp_path / "text").read_bytes() == b"\xc3\xbc\n"
    assert (tmp_path / "bytes").read_bytes() == b"\x00\r\n"


def test_other_peoples_files_and_ours_of_another_kind_are_not_replaced(tmp_path):
    path = tmp_path / "x.safetensors"
    check_replaced(path, "latents")  # There is none.
    for kind, held in (("latents", "latents-safetensors"), ("eg3d", "eg3d-safetensors")):
        save_file({"x": np.zeros(2)}, path, {"format": held})
        check_replaced(path, "panohead", kind)
        with pytest.raises(ValueError, match="holds no directions, and would be lost"):
            check_replaced(path, "directions")
    for content in (b"", b"a photo", b"\x08" + bytes(30)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="holds no latents, and would be lost"):
            check_replaced(path, "latents")
    save_file({"x": np.zeros(2)}, path)  # A LoRA, say.
    with pytest.raises(ValueError, match="holds no latents"):
        check_replaced(path, "latents")


def test_checksum_does_not_depend_on_the_cuts():
    assert checksum(b"ab", b"", b"c") == checksum(b"abc") == f"crc32 {zlib.crc32(b'abc'):08x}"
    assert checksum(b"abd") != checksum(b"abc") and checksum() == "crc32 00000000"


FULL_DISK = """
import resource, sys
from pathlib import Path
import torch
from harness.checkpoints import save_checkpoint
from harness.cli import exit_codes
folder, limit = Path(sys.argv[1]), int(sys.argv[2])
save_checkpoint(folder / "ckpt-000001.pt", {"step": 1})
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # As ulimit -f does.
with exit_codes():
    save_checkpoint(folder / "ckpt-000002.pt", {"step": 2, "w": torch.zeros(100_000)})
"""


@pytest.mark.parametrize("limit", [700, 100_000, 401_000])  # In the header, the data, the index.
def test_full_disk_is_one_line_and_keeps_the_checkpoint_before(tmp_path, limit):
    pytest.importorskip("resource")
    command = [sys.executable, "-c", FULL_DISK, tmp_path, str(limit)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and "File too large" in line and "ckpt-000002.pt" in line
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt-000001.pt"]
