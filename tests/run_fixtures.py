"""Fixtures of a run that is finished, for the tests of what reads runs."""

import shutil
from pathlib import Path

import pytest
from tiny_run import hurry, run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run folder of two steps, only to be read."""
    out = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        hurry(patch)
        run(out, steps=2)
    return out


@pytest.fixture
def copied(finished, tmp_path, monkeypatch):
    """A copy of it that may be changed."""
    hurry(monkeypatch)
    return Path(shutil.copytree(finished, tmp_path / "run"))
