"""What inversions and directions are measured against: people and numbers that are known."""

import pytest
import torch

from files.generators import load_generator
from harness.run_folder import REPOSITORY
from puppets import people
from puppets.data import CAMERAS
from puppets.heads import Z_DIM
from puppets.oracle import load_oracle
from subjects import seed_to_person


def test_people_are_always_the_same_and_each_is_another():
    z, c = people.draw_person(5000)
    again, _ = people.draw_person(5000)
    other, elsewhere = people.draw_person(5001)
    assert torch.equal(z, again) and not torch.equal(z, other)
    assert z.shape == (1, Z_DIM) and c.shape == (1, 25) and not torch.equal(c, elsewhere)


@pytest.mark.parametrize("number", [12, 15])
def test_a_known_direction_changes_its_number_most(number):
    G, eye = load_generator(REPOSITORY / people.SOURCE), load_oracle()
    z = torch.randn(4000, Z_DIM, generator=torch.Generator().manual_seed(1))
    w = G.mapping(z, CAMERAS.frontal(len(z)))[:, 0]
    direction = people.known_direction(w, z, number)
    heads = [seed_to_person(G, seed) for seed in range(6)]
    moved = [people.replace(x, ws=x.ws + people.MOVE * direction) for x in heads]
    change = (people.readings(G, eye, moved) - people.readings(G, eye, heads)).mean(0)
    assert change.argmax() == number and change[number] > 1


def test_a_summary_has_medians_worst_values_and_shares():
    rows = [{"pose_deg": float(i), "right_devil": i < 2} for i in range(3)]
    line = people.summary(rows)
    assert "pose_deg median 1.00, 0.00 to 2.00" in line and "right_devil 67%" in line
