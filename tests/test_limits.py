"""Ceilings and floors of the tables: what knows the truth, and what adapts nothing."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import eval as evaluation
import train
from files.generators import load_generator
from guides import Guides
from harness.run_folder import REPOSITORY
from models.fingerprints import fingerprint_generator
from puppets import experiments, heads, limits, oracle
from puppets.data import CAMERAS
from samples import draw_heads, step_seed

N = 8


@pytest.fixture(scope="module")
def scored():
    """The source's renders of N heads, and their truth as devils."""
    cfg = evaluation.Config(ckpt=(), samples=N, seed=3)
    G_src = load_generator(REPOSITORY / experiments.SOURCE)
    source = evaluation.render_source(G_src, 1.0, cfg, {})
    return source, oracle.true_pictures(source.views, "devil", None, cfg, {})


def test_recolouring_finds_the_affine_map_of_the_heads_and_leaves_the_background(scored):
    source, truth = scored
    renders = source.renders
    shifted = 0.5 * renders.image.flip(1) + 0.1
    same = limits.recoloured(source, replace(truth, image=shifted), "devil")
    mask = F.interpolate(renders.mask, 128, mode="bilinear").expand_as(shifted)
    assert (same.image - shifted)[mask > 0.99].abs().max() < 0.02
    assert (same.image - renders.image)[mask < 0.01].abs().max() < 0.02
    best = limits.recoloured(source, truth, "devil")
    before, after = ((x.image - truth.image).abs().mean() for x in (renders, best))
    assert after < 0.9 * before and not torch.equal(best.front, renders.front)


def test_one_person_is_the_first_from_everyones_camera(scored):
    source, truth = scored
    pictures = limits.one_person(source, truth, "devil")
    assert torch.equal(pictures.image[0], truth.image[0])
    assert not torch.equal(pictures.image[1], truth.image[1])
    assert torch.equal(pictures.front, truth.front[:1].expand(N, -1, -1, -1))


def test_scores_tell_ceilings_from_floors(scored, monkeypatch):
    pytest.importorskip("torchmetrics")
    source, truth = scored
    monkeypatch.setattr(evaluation, "render_source", lambda *_: source)
    monkeypatch.setattr(oracle, "true_pictures", lambda *_: truth)
    eye, cfg = oracle.load_oracle(), evaluation.Config(ckpt=(), samples=N, seed=3)
    true, unadapted, one = (
        limits.score(kind, "devil", eye, cfg, {}, {})
        for kind in ("true pictures", "the source", "one person for all")
    )
    assert true["oracle_l1"] == 0 and true["oracle_iou"] == 1 and true["clip_share"] == 1
    assert true["oracle_id"] == true["true_oracle_id"] > one["oracle_id"] + 0.3
    assert unadapted["oracle_domain"] == 0 and unadapted["source_iou"] == unadapted["oracle_iou"]
    assert unadapted["oracle_kid"] > 0.5 and one["diversity"] < 0.01
    assert unadapted["target"] == "a devil" and unadapted["samples"] == N


def test_supervision_paints_the_truth_of_the_heads_of_the_step(tmp_path):
    cfg = train.Config(prompt="a clown", batch=2, seed=4, out=tmp_path)
    G_src = load_generator(REPOSITORY / experiments.SOURCE)
    pool = limits.TruePool(cfg, G_src, Guides(cfg, G_src, None), "clown")
    torch.manual_seed(step_seed(4, 7))
    z, c = draw_heads(cfg, G_src)
    ws = G_src.mapping(z, CAMERAS.frontal(2))
    for first in (0, 1):
        part = slice(first, first + 1)
        torch.manual_seed(0)
        seen = pool.source(7, first, ws[part], c[part], G_src.rays(c[part]))
        true = heads.render(z[part], c[part], "clown")[0]
        assert torch.equal(seen.painted.view("image"), true)


def test_supervised_run_can_be_scored_and_is_made_once(tmp_path, monkeypatch):
    steps = []
    take_step = train.take_step
    monkeypatch.setattr(train, "take_step", lambda *a: steps.append(a[1]) or take_step(*a))
    for _ in range(2):
        limits.supervise("clown", 1, tmp_path / "run")
    assert steps == [1]
    settings = evaluation.run_settings(tmp_path / "run")
    assert (settings["prompt"], settings["steps"]) == ("a clown", 1)
    trained = load_generator(tmp_path / "run")
    assert fingerprint_generator(trained) != settings["generator_weights"]
