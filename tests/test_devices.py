"""The device, and the memory that malloc keeps."""

import os
from types import SimpleNamespace

import pytest
import torch

from harness import devices
from harness.devices import flush_denormals, keep_freed_memory, peak_gb, pick_device


@pytest.fixture
def calls(monkeypatch):
    """Record what malloc is told, in an environment without its own variables."""
    for name in list(os.environ):
        if name.startswith("MALLOC_"):
            monkeypatch.delenv(name)
    told = []
    library = SimpleNamespace(mallopt=lambda option, value: told.append((option, value)))
    monkeypatch.setattr(devices.ctypes, "CDLL", lambda name: library)
    return told


def test_malloc_is_told_to_keep_what_is_freed(calls):
    """M_TRIM_THRESHOLD is -1, M_TOP_PAD -2 and M_MMAP_THRESHOLD -3 in glibc's malloc.h."""
    keep_freed_memory()
    assert dict(calls) == {-3: 32 * 2**20, -1: 2**30, -2: 64 * 2**20}


def test_malloc_s_own_variables_win(calls, monkeypatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    keep_freed_memory()
    assert calls == []


def test_numbers_that_are_slow_to_compute_with_count_as_zero():
    tiny = torch.full((64,), 1e-30)
    try:
        flush_denormals()
        assert (tiny * 1e-10 == 0).all()
    finally:
        torch.set_flush_denormal(False)
    assert (tiny * 1e-10 != 0).all()


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(devices.ctypes, "CDLL", lambda name: SimpleNamespace())
    keep_freed_memory()


def test_auto_is_a_device_and_memory_is_known():
    assert pick_device("auto") == pick_device(None)
    assert peak_gb(torch.device("cpu")) > 0.01
