"""What inversions and directions are measured against: people and numbers that are known."""

import json
from dataclasses import replace

import pytest
import torch

from files.generators import load_generator
from harness.run_folder import REPOSITORY
from puppets import people
from puppets.data import CAMERAS
from puppets.heads import Z_DIM
from puppets.oracle import load_oracle
from subjects import seed_to_person, wide_codes


def test_people_are_always_the_same_and_each_is_another():
    z, c = people.draw_person(5000)
    again, _ = people.draw_person(5000)
    other, elsewhere = people.draw_person(5001)
    assert torch.equal(z, again) and not torch.equal(z, other)
    assert z.shape == (1, Z_DIM) and c.shape == (1, 25) and not torch.equal(c, elsewhere)


@pytest.mark.parametrize("number", [12, 14, 15])
def test_a_known_direction_changes_its_number_and_drawn_near_hardly_another(number):
    G, eye = load_generator(REPOSITORY / people.SOURCE), load_oracle()
    z = torch.randn(4000, Z_DIM, generator=torch.Generator().manual_seed(1))
    w = G.mapping(z, CAMERAS.frontal(len(z)))[:, 0]
    direction = people.known_direction(w, z, number)
    heads = [seed_to_person(G, seed) for seed in range(6)]
    codes = wide_codes(G)
    before = people.readings(G, eye, heads)
    others = []
    for near in (False, True):
        moved = [x.ws + people.MOVE * direction for x in heads]
        if near:
            moved = [codes.draw_near(ws, x.ws) for ws, x in zip(moved, heads, strict=True)]
        moved = [replace(x, ws=ws) for ws, x in zip(moved, heads, strict=True)]
        change = (people.readings(G, eye, moved) - before).mean(0)
        assert change.argmax() == number and change[number] > 1.2
        others.append((change / change[number]).abs().sort().values[:-1])  # Of the other numbers.
    assert others[1].max() < 0.35
    assert others[1].norm() < others[0].norm()


def test_tables_have_medians_worst_values_and_shares():
    rows = {
        f"{i}, tune 0": {"pose_deg": float(i), "psnr": 20.0 + i, "right_devil": i < 2}
        for i in range(3)
    }
    directions = {"hair": {"cosine": 0.5, "change": 1.0, "worst_other": 0.25}}
    text = "\n".join(people.tables({"inversions": rows, "directions": directions}))
    assert "| angle of the camera [deg], codes alone | 3 | 1.00 | 2.00 |" in text
    assert "| PSNR of the head [dB], codes alone | 3 | 21.00 | 20.00 |" in text
    assert "as devil, codes alone | 3 | 67% | |" in text and "tune 100" not in text
    assert "| hair | 0.50 | 1.00 | 0.25 |" in text


def test_the_page_says_what_was_measured():
    known = json.loads((REPOSITORY / people.OUT).read_text())
    assert "\n".join(people.tables(known)) in (REPOSITORY / "docs/people.md").read_text()
