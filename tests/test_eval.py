import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tiny_run import hurry, run

import eval as evaluation
from eval import Config, Renders


class FakeClip:
    """A CLIP whose features are the picture itself, shrunk: what is where is all it knows."""

    model = SimpleNamespace(device=torch.device("cpu"))

    def images(self, images):
        return F.normalize(F.adaptive_avg_pool2d(images, 4).flatten(1), dim=1)

    def tokens(self, images):
        return F.adaptive_avg_pool2d(images, 8).permute(0, 2, 3, 1)


def renders(yaw, pitch, people):
    """Pictures of a blob that lies where the camera's angles say, of as many patterns as people."""
    x, y = torch.meshgrid(torch.linspace(-1, 1, 32), torch.linspace(-1, 1, 32), indexing="xy")
    blob = torch.exp(-((x - yaw.view(-1, 1, 1)) ** 2 + (y - pitch.view(-1, 1, 1)) ** 2) * 2)
    image = blob.unsqueeze(1).repeat(1, 3, 1, 1)
    depth = 2.5 + blob.unsqueeze(1)
    return Renders(image, depth, torch.ones_like(depth), people)


@pytest.fixture
def scene():
    generator = torch.Generator().manual_seed(3)
    yaw, pitch = torch.rand(2, 48, generator=generator) * 1.2 - 0.6
    people = torch.randn(48, 3, 32, 32, generator=generator)
    fit_yaw, fit_pitch = torch.rand(2, 96, generator=generator) * 1.2 - 0.6
    fitted = renders(fit_yaw, fit_pitch, people[:1])
    return renders(yaw, pitch, people), (yaw, pitch), fitted, (fit_yaw, fit_pitch)


CFG = Config(ckpt=(), batch=16)


def test_an_unchanged_generator_scores_perfectly(scene):
    source, truth, fitted, fitted_at = scene
    scores = evaluation.identity(FakeClip(), source, source, CFG)
    assert scores == {"identity_top1": 1.0, "identity_mrr": 1.0, "diversity": 1.0}
    pose = evaluation.pose(FakeClip(), fitted, fitted_at, source, source, truth, CFG)
    assert pose["pose_deg"] == pytest.approx(pose["pose_floor_deg"], abs=1e-3)
    assert pose["pose_floor_deg"] < 3
    assert evaluation.depth_correlation(source, source) == pytest.approx(1, abs=1e-5)


def test_a_collapsed_generator_has_no_diversity_and_chance_identity(scene):
    source, *_ = scene
    generator = torch.Generator().manual_seed(0)
    one = source.front[:1] + 1e-4 * torch.randn(source.front.shape, generator=generator)
    scores = evaluation.identity(FakeClip(), source, replace(source, front=one), CFG)
    assert scores["diversity"] < 0.01
    assert scores["identity_top1"] < 0.15


def test_shuffled_people_are_found_by_chance_only(scene):
    source, *_ = scene
    rolled = replace(source, front=source.front.roll(1, 0))
    scores = evaluation.identity(FakeClip(), source, rolled, CFG)
    assert scores["identity_top1"] == 0 and scores["diversity"] == pytest.approx(1, abs=1e-5)


def test_swapped_views_score_the_angle_between_them(scene):
    source, truth, fitted, fitted_at = scene
    mirrored = replace(source, image=source.image.flip(-1))
    pose = evaluation.pose(FakeClip(), fitted, fitted_at, source, mirrored, truth, CFG)
    known = evaluation.angle_deg(
        evaluation.direction(torch.stack([-truth[0], truth[1]], 1)),
        evaluation.direction(torch.stack(truth, 1)),
    )
    assert pose["pose_deg"] == pytest.approx(known.mean().item(), rel=0.15)


def test_a_recoloured_domain_keeps_pose_and_identity(scene):
    source, truth, fitted, fitted_at = scene
    tint = torch.tensor([0.3, -0.2, 0.1]).view(1, 3, 1, 1)
    tinted = replace(source, image=source.image + tint, front=source.front + tint)
    pose = evaluation.pose(FakeClip(), fitted, fitted_at, source, tinted, truth, CFG)
    assert pose["pose_deg"] == pytest.approx(pose["pose_floor_deg"], abs=0.05)
    assert evaluation.identity(FakeClip(), source, tinted, CFG)["identity_top1"] == 1


def test_reversed_depth_correlates_negatively(scene):
    source, *_ = scene
    turned = replace(source, depth=-source.depth)
    assert evaluation.depth_correlation(source, turned) == pytest.approx(-1, abs=1e-5)


def test_eval_scores_a_run_and_writes_json(tmp_path, monkeypatch, capsys):
    hurry(monkeypatch)
    run(tmp_path / "run", steps=2)
    out = tmp_path / "results.json"
    evaluation.main(Config(ckpt=(tmp_path / "run",), out=out, samples=8, device="cpu"))
    row = json.loads(out.read_text())[str(tmp_path / "run")]
    names = {"clip_text", "pose_deg", "identity_top1", "identity_mrr", "diversity", "depth_corr"}
    assert names < set(row)
    assert f"{row['diversity']:.3f}" in capsys.readouterr().out


def test_eval_refuses_a_generator_file(tmp_path, monkeypatch):
    hurry(monkeypatch)
    run(tmp_path / "run", steps=2)
    file = tmp_path / "run" / "generator.safetensors"
    with pytest.raises(ValueError, match="no run folder"):
        evaluation.main(Config(ckpt=(file,), out=tmp_path / "results.json", samples=8))
    assert not (tmp_path / "results.json").exists()
