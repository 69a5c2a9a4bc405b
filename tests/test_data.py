"""The pictures that the embedded world's networks learn from."""

import numpy as np
import pytest
import torch

from models.cameras import VIEW_WORDS, sides_of
from puppets import data, heads
from puppets.fit import generator2d


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(data, "SHARD", 6)
    monkeypatch.setattr(generator2d, "SHARD", 2)


def test_heads_from_all_sides_are_drawn_alike_again_and_told_by_their_side():
    shard = data.draw_round_shard(3)
    assert shard["rgb"].shape == (6, 128, 128, 3) and shard["mask"].any((1, 2)).all()
    again = data.draw_round_shard(3)
    assert all(np.array_equal(shard[name], again[name]) for name in shard)
    assert not np.array_equal(shard["rgb"], data.draw_round_shard(4)["rgb"])
    told = [str(words).rpartition(", ")[2] for words in shard["caption"] if ", " in str(words)]
    assert told and set(told) <= set(VIEW_WORDS)


def test_a_code_of_pictures_holds_the_head_and_the_view():
    torch.manual_seed(0)
    z = torch.randn(2000, data.FLAT_Z_DIM)
    own, c = data.split_code(z)
    assert (data.split_code(3 * z)[1] - c).abs().max() < 1e-4  # Only its direction matters.
    torch.testing.assert_close(heads.identity(own), heads.identity(z[:, : heads.Z_DIM]))
    yaws = torch.atan2(c[:, 3], c[:, 11])
    quarters = torch.tensor([0.25, 0.5, 0.75])
    torch.testing.assert_close(
        yaws.quantile(quarters), torch.tensor([-0.3, 0.0, 0.3]), atol=0.05, rtol=0
    )
    assert yaws.abs().max() < 0.61 and set(sides_of(c)) == {0}


def test_pictures_of_codes_are_those_of_their_heads():
    shard = generator2d.draw_shard(1)
    own, c = data.split_code(torch.from_numpy(shard["z"]))
    drawn = heads.render(own[1:], c[1:])[0]
    assert np.abs(data.to_images(shard["rgb"][1:]) - drawn).max() < 0.01
