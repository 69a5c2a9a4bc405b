"""Training states: they come back, and a damaged one is noticed."""

import os

import pytest
import torch

from harness.checkpoints import load_checkpoint, save_checkpoint


def test_state_comes_back_and_only_the_newest_two_stay(tmp_path):
    for step in (5, 90, 100, 1000):
        save_checkpoint(tmp_path / f"ckpt-{step:06d}.pt", {"step": step, "w": torch.ones(step)})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ckpt-000100.pt", "ckpt-001000.pt"]
    state = load_checkpoint(tmp_path)
    assert state["step"] == 1000
    assert torch.equal(state["w"], torch.ones(1000))


def test_damaged_newest_state_is_passed_over(tmp_path, capsys):
    save_checkpoint(tmp_path / "ckpt-000001.pt", {"step": 1})
    whole = (tmp_path / "ckpt-000001.pt").read_bytes()
    for step, content in enumerate([b"", b"noise" * 100, whole[:-30], whole[: len(whole) // 2]], 2):
        (tmp_path / f"ckpt-{step:06d}.pt").write_bytes(content)
    assert load_checkpoint(tmp_path) == {"step": 1}
    assert len(capsys.readouterr().err.splitlines()) == 4


def test_no_state_is_none(tmp_path):
    (tmp_path / "ckpt-best.pt").write_bytes(b"")
    assert load_checkpoint(tmp_path) is None
    assert load_checkpoint(tmp_path / "nowhere") is None


class Exploit:
    def __reduce__(self):
        return os.mkdir, ("exploited",)


def test_code_in_a_state_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"step": Exploit()}, tmp_path / "ckpt-000001.pt")
    assert load_checkpoint(tmp_path) is None
    assert not (tmp_path / "exploited").exists()


@pytest.mark.parametrize("state", [{"a": 1}, [1, 2], {"step": "many"}])
def test_checkpoint_that_is_no_training_state_is_passed_over(state, tmp_path, capsys):
    save_checkpoint(tmp_path / "ckpt-000001.pt", {"step": 1})
    torch.save(state, tmp_path / "ckpt-000002.pt")
    assert load_checkpoint(tmp_path) == {"step": 1}
    assert "ckpt-000002.pt is damaged" in capsys.readouterr().err


def flips(path):
    """Yield a file's content with one byte changed, at every 20th part of it."""
    whole = path.read_bytes()
    for part in range(21):
        damaged = bytearray(whole)
        damaged[min(part * len(whole) // 20, len(whole) - 1)] ^= 0x10
        yield part, bytes(damaged)


def test_a_flipped_byte_is_noticed_and_the_checkpoint_before_is_taken(tmp_path, capsys):
    for step in (1, 2):
        weights = torch.arange(5000.0) * step
        save_checkpoint(tmp_path / f"ckpt-{step:06d}.pt", {"step": step, "w": weights})
    noticed = 0
    for part, damaged in flips(tmp_path / "ckpt-000002.pt"):
        (tmp_path / "ckpt-000002.pt").write_bytes(damaged)
        state, err = load_checkpoint(tmp_path), capsys.readouterr().err
        assert torch.equal(state["w"], torch.arange(5000.0) * state["step"]), part
        if state["step"] == 1:
            noticed += 1
            assert err.count("\n") == 1 and "ckpt-000002.pt is damaged" in err
    assert noticed >= 19  # What is left may be padding, which nobody reads.
