"""The device, and the memory that malloc keeps."""

import os
import platform
import subprocess
import sys

import pytest
import torch

from harness.devices import peak_gb, pick_device

FAULTS = """
import resource, sys, torch
sys.path.insert(0, ".")
from harness.devices import keep_freed_memory
if {keep}:
    keep_freed_memory()
torch.set_num_threads(1)
for i in range(40):
    if i == 20:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(5_000_000) for _ in range(8)]  # 20 MB each.
    del blocks
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(keep, **variables):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")} | variables
    command = [sys.executable, "-c", FAULTS.format(keep=keep)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")
def test_freed_memory_is_used_again_without_page_faults():
    assert faults(keep=True) < faults(keep=False) / 10


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")
def test_malloc_s_own_variables_win():
    small = {"MALLOC_MMAP_THRESHOLD_": "4096"}  # Everything is given back at once.
    assert faults(keep=True, **small) > 10_000


def test_auto_is_a_device_and_memory_is_known():
    assert pick_device("auto") == pick_device(None)
    assert peak_gb(torch.device("cpu")) > 0.01
