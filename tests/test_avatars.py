"""What avatars are scored by: the truth gets the best scores, and the page shows the scores."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from models.features import ClipFeatures
from models.mesh import Mesh
from models.texture import unwrap
from puppets import avatars, faces, oracle
from puppets.data import DOMAIN_NAMES, ROUND_CAMERAS
from puppets.domains import DOMAINS
from refine import Textured

REPOSITORY = Path(avatars.__file__).parents[1]


@pytest.fixture(scope="module")
def judges():
    clip = ClipFeatures.from_pretrained(REPOSITORY / "checkpoints/puppets/clip")
    names = clip.text([DOMAINS[name].phrases[0] for name in DOMAIN_NAMES])
    return avatars.Judges(oracle.load_oracle(REPOSITORY / oracle.ORACLE), clip, names)


def true_head(domain, length, seed=2):
    """Return how a true head with this length of hair is seen."""
    z = torch.randn(1, 16, generator=torch.Generator().manual_seed(seed))
    z[:, avatars.LENGTH] = length

    def see(c, size):
        pictures, _ = oracle.draw_truth(z.expand(len(c), -1), c, domain)
        return F.interpolate(pictures, (size, size), mode="bilinear")

    return see


def test_the_truth_gets_the_best_scores_and_others_do_not(judges, monkeypatch):
    monkeypatch.setattr(faces, "share", lambda clip, images: float(len(images)))
    prompt = "a zombie with long hair"
    right = avatars.score(true_head("zombie", 2.0), prompt, judges)
    assert right["domain"] == right["hair"] == right["clip"] == 1
    assert right["l1"] < 0.06 and right["kid"] < 0.1
    assert right["faces"] == 5  # Of 16 views so many are backs.
    short = avatars.score(true_head("zombie", -2.0), prompt, judges)
    assert short["domain"] == 1 and short["hair"] == 0
    other = avatars.score(true_head("robot", 2.0), prompt, judges)
    assert other["domain"] == other["clip"] == 0 and other["l1"] > 2 * right["l1"]


def test_the_gradient_counts_neighbours_where_it_is_told_to():
    ramp = torch.arange(6.0).expand(2, 3, 5, 6)  # Grows by 1 to the right, by 0 downwards.
    where = torch.zeros(2, 1, 5, 6)
    where[..., 1:3, 1:4] = 1
    assert avatars.gradient(ramp, where) == pytest.approx(1)
    assert avatars.gradient(ramp + 2 * ramp.mT[..., :5, :5].new_ones(5, 1).cumsum(0), where) == 3
    stepped = ramp.clone()
    stepped[..., 4:] += 100  # An edge outside of it.
    assert avatars.gradient(stepped, torch.where(stepped[:, :1] < 3, where, 0)) == pytest.approx(1)


def test_the_scores_of_a_texture_see_its_pictures_and_its_cuts():
    trimesh = pytest.importorskip("trimesh")
    pytest.importorskip("xatlas")
    ball = trimesh.creation.icosphere(3, 0.2)
    grey = np.full((len(ball.vertices), 3), 128, np.uint8)
    atlas = unwrap(Mesh(ball.vertices.astype(np.float32), np.array(ball.faces), grey), 128)
    even = torch.full((1, 3, 128, 128), 0.5)
    cameras = ROUND_CAMERAS.label(torch.tensor([0.0, 2.0]), torch.zeros(2))
    head = Textured(atlas, even, even, cameras, torch.full((2, 3, 64, 64), 0.4))
    scores = avatars.texture_scores(head)
    assert scores["psnr_db"] == pytest.approx(10 * np.log10(4 / 0.1**2), abs=0.01)
    assert scores["cut"] == pytest.approx(0, abs=1e-5) and scores["inside"] == 0
    places = torch.linspace(-1, 1, 128).expand(1, 3, 128, 128)  # Colour by place in the atlas.
    cut = avatars.texture_scores(replace(head, texture=places))
    assert cut["cut"] > 0.1 and cut["inside"] == pytest.approx(2 / 127, rel=1e-3)


def test_every_prompt_names_its_domain_and_a_length_of_hair():
    for prompt, (domain, sign) in avatars.PROMPTS.items():
        phrase, _, hair = prompt.partition(" with ")
        assert hair == ("long hair" if sign > 0 else "short hair")
        assert any(phrase.split()[-1] in words for words in DOMAINS[domain].phrases)


def test_parts_of_a_prompt_share_their_head_and_others_have_runs_of_their_own():
    prompt = next(iter(avatars.PROMPTS))
    runs = {part: avatars.options(part, prompt, 1).run for part in avatars.PARTS}
    last = runs[avatars.LAST]
    assert all(runs[part].out == last.out for part in ("search alone", "+ mesh", "+ refinement"))
    assert len({run.out for run in runs.values()}) == len(runs) - 3
    assert last.weights.variation and not runs["weights"].weights.variation
    assert "own_planes" in runs["+ planes of its own"].learns[0]
    assert "own_planes" not in runs["weights"].learns[0]
    assert avatars.options("without search", prompt, 1).search == 0


def test_the_page_shows_the_committed_scores():
    rows = json.loads((REPOSITORY / "docs/avatars.json").read_text())
    assert "\n".join(avatars.table(rows)) in (REPOSITORY / "docs/avatar.md").read_text()
