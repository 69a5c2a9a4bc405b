"""The oracle: what it adds to a row of eval.py, and that the truth scores perfectly."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from tiny_run import RENDERING, change_settings, world

import eval as evaluation
import metrics
from eval import Config, Renders
from files.generators import save_generator
from harness.pictures import save_image, to_uint8
from harness.run_folder import REPOSITORY
from models.eg3d import TriPlaneGenerator
from models.fingerprints import fingerprint_generator
from puppets import heads, oracle
from puppets.data import CAMERAS, DOMAIN_NAMES
from puppets.domains import DOMAINS


def people(count, seed=0):
    """Return latents and camera labels of puppets."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(count, heads.Z_DIM, generator=generator)
    return z, CAMERAS.label(*(torch.rand(2, count, generator=generator) - 0.5))


class TrueOracle:
    """An oracle that reads everything right off pictures in the order of `people`."""

    def __init__(self, z, c, domain):
        logits = F.one_hot(torch.tensor(DOMAIN_NAMES.index(domain)), len(DOMAIN_NAMES)).float()
        self.answer = logits.expand(len(z), -1), heads.identity(z), oracle.camera_direction(c)

    def __call__(self, images):
        return self.answer


def test_true_pictures_score_perfectly():
    z, c = people(1)
    truth, _, mask = heads.render(z, c, "bronze")
    scores = oracle.compare(TrueOracle(z, c, "bronze"), truth, truth, mask, z, c, "bronze")
    expected = {"id": 1, "pose_deg": 0, "domain": 1, "yaw_deg": 0}
    expected = {f"oracle_{name}": value for name, value in expected.items()}
    expected |= {f"true_{name}": value for name, value in expected.items()}
    expected |= {"oracle_l1": 0, "oracle_head_l1": 0, "oracle_background_l1": 0}
    assert scores == pytest.approx(expected, abs=1e-4)


def test_another_domain_person_and_camera_are_told_from_the_truth():
    (z, c), (other_z, other_c) = people(1), people(1, seed=1)
    eye = TrueOracle(other_z, other_c, "clown")
    black = -torch.ones(1, 3, oracle.SIZE, oracle.SIZE)
    truth, _, mask = heads.render(z, c, "bronze")
    scores = oracle.compare(eye, black, truth, mask, z, c, "bronze")
    known = metrics.angle_deg(oracle.camera_direction(c), oracle.camera_direction(other_c))
    assert scores["oracle_pose_deg"] == pytest.approx(known.mean().item(), abs=1e-3)
    assert scores["oracle_domain"] == 0 and scores["oracle_id"] < 0.9
    assert scores["oracle_l1"] == pytest.approx((truth + 1).mean().item(), abs=1e-5)


class EyeForBlack(TrueOracle):
    """An oracle that is right about the truth, and wrong about black pictures."""

    def __call__(self, images):
        domains, z, camera = super().__call__(images)
        wrong = (images.mean((1, 2, 3)) == -1).float()[:, None]
        return domains * (1 - wrong), z * (1 - 2 * wrong), camera * (1 - 2 * wrong)


def test_what_the_truth_gets_is_told_from_what_the_pictures_get():
    z, c = people(2)
    truth, _, mask = heads.render(z, c, "bronze", size=oracle.SIZE)
    black = -torch.ones_like(truth)
    scores = oracle.compare(EyeForBlack(z, c, "bronze"), black, truth, mask, z, c, "bronze")
    assert scores["oracle_id"] == pytest.approx(-1) and scores["true_oracle_id"] == pytest.approx(1)
    assert scores["oracle_pose_deg"] == pytest.approx(180)
    assert scores["true_oracle_pose_deg"] == pytest.approx(0, abs=1e-3)
    assert (scores["oracle_domain"], scores["true_oracle_domain"]) == (0, 1)


def test_head_and_background_are_compared_apart():
    z, c = people(2)
    truth, _, mask = heads.render(z, c, "bronze")
    inside = mask > 0.5
    redder = torch.where(inside, truth + torch.tensor([0.3, 0, 0]).view(3, 1, 1), truth)
    darker = torch.where(inside, truth, -1)
    eye = TrueOracle(z, c, "bronze")
    on_head, beside = (
        oracle.compare(eye, image, truth.clamp(-1, 0.7), mask, z, c, "bronze")
        for image in (redder.clamp(-1, 0.7), darker)
    )
    assert on_head["oracle_head_l1"] > 0.05 and on_head["oracle_background_l1"] == 0
    assert beside["oracle_background_l1"] == pytest.approx(1.7, abs=0.02)
    assert beside["oracle_head_l1"] < 0.05
    share = inside.float().mean().item()
    parts = share * beside["oracle_head_l1"] + (1 - share) * beside["oracle_background_l1"]
    assert beside["oracle_l1"] == pytest.approx(parts, abs=1e-4)


def test_a_turn_that_all_heads_share_is_signed():
    z, _ = people(3)
    yaw = torch.tensor([-0.3, 0.0, 0.4])
    c, turned = (CAMERAS.label(yaw + turn, torch.zeros(3)) for turn in (0.0, 0.1))
    truth, _, mask = heads.render(z, c, "bronze", size=oracle.SIZE)
    eye = TrueOracle(z, turned, "bronze")
    scores = oracle.compare(eye, truth, truth, mask, z, c, "bronze")
    assert abs(scores["oracle_yaw_deg"]) == pytest.approx(math.degrees(0.1), abs=0.01)
    back = oracle.compare(TrueOracle(z, c, "bronze"), truth, truth, mask, z, turned, "bronze")
    assert back["oracle_yaw_deg"] == pytest.approx(-scores["oracle_yaw_deg"], abs=0.01)


def test_flips_are_those_of_heads_that_were_otherwise():
    z = torch.ones(4, heads.Z_DIM)
    z[2:] = -1
    reference = torch.ones(heads.Z_DIM)
    assert oracle.flips(z, z, reference) == {"oracle_flips": 0}
    assert oracle.flips(torch.ones_like(z), z, reference) == {"oracle_flips": 1}
    half = z.clone()
    half[2] = 1
    assert oracle.flips(half, z, reference) == {"oracle_flips": 0.5}
    assert oracle.flips(half, z.abs(), reference) == {}


def test_silhouettes_are_compared_at_the_size_of_the_truth():
    truth = torch.zeros(2, 1, 128, 128)
    truth[..., 32:96, 32:96] = 1
    assert oracle.silhouette_iou(truth, truth) == 1
    half = truth.clone()
    half[..., 64:] = 0
    assert oracle.silhouette_iou(half, truth) == pytest.approx(0.5)
    small = F.avg_pool2d(truth, 2)
    assert oracle.silhouette_iou(small, truth) == pytest.approx(1, abs=0.01)
    assert oracle.silhouette_iou(torch.zeros_like(small), truth) == 0


def test_sets_far_from_the_truth_are_far_by_the_oracles_own_features():
    """What CLIP is fooled by: one head for all, and pictures without edges."""
    pytest.importorskip("torchmetrics")
    eye = oracle.load_oracle()
    truth = oracle.draw_truth(*people(24), "devil")[0]
    others = oracle.draw_truth(*people(24, seed=1), "devil")[0]
    blurred = F.avg_pool2d(others, 9, 1, 4, count_include_pad=False)
    alike, coarse, one = (
        metrics.distances(oracle.features(eye, truth), oracle.features(eye, pictures))["kid"]
        for pictures in (others, blurred, others[:1].expand(24, -1, -1, -1))
    )
    assert alike < 0.1 and coarse > alike + 0.2 and one > 1
    assert torch.equal(
        oracle.features(eye, truth * 9), oracle.features(eye, (truth * 9).clamp(-1, 1))
    )


def puppet_generator(seed=0):
    """Return a generator of 128 px pictures of puppets' latents, with random weights."""
    torch.manual_seed(seed)
    G = TriPlaneGenerator(
        z_dim=heads.Z_DIM,
        c_dim=25,
        w_dim=8,
        img_resolution=oracle.SIZE,
        img_channels=3,
        mapping_kwargs={"num_layers": 1},
        rendering_kwargs=RENDERING,
        sr_kwargs={"channels": (4, 4), "input_resolution": 64},
        channel_base=64,
        channel_max=4,
        plane_resolution=8,
        plane_channels=4,
        decoder_hidden=4,
        feature_channels=4,
    )
    G.neural_rendering_resolution = 8
    return G.eval().requires_grad_(False)


@pytest.fixture
def puppet_run(copied, tmp_path):
    """A run that adapted puppets to bronze, its row of eval.py, and a file of an oracle."""
    save_generator(puppet_generator(), copied / "generator.safetensors")
    save_generator(source := puppet_generator(seed=1), tmp_path / "source.safetensors")
    prior = Path(shutil.copytree(world() / "diffusion", tmp_path / "diffusion"))
    domains = {name: spec.phrases[0] for name, spec in DOMAINS.items()}
    (prior / "vocabulary.json").write_text(json.dumps({"words": [], "domains": domains}))
    weights = fingerprint_generator(source)
    generator = str(tmp_path / "source.safetensors")
    change_settings(copied, diffusion=str(prior), generator=generator, generator_weights=weights)
    out, weights = tmp_path / "results.json", tmp_path / "oracle.safetensors"
    row = {"method": "gca3d", "target": "a bronze statue", "samples": 3, "seed": 5}
    row["weights"] = fingerprint_generator(puppet_generator())
    out.write_text(json.dumps({str(copied): row}))
    torch.manual_seed(0)
    save_file(oracle.Oracle().state_dict(), weights)
    return oracle.Config(ckpt=(copied,), out=out, oracle=weights)


def test_oracle_adds_its_scores_to_the_row(puppet_run, capsys):
    before = json.loads(puppet_run.out.read_text())[str(puppet_run.ckpt[0])]
    oracle.main(puppet_run)
    row = json.loads(puppet_run.out.read_text())[str(puppet_run.ckpt[0])]
    assert before.items() < row.items() and row["oracle_target"] == "bronze"
    assert 0 <= row["oracle_iou"] <= 1 and 0 <= row["source_iou"] <= 1
    assert 0 < row["oracle_l1"] < 2 and 0 < row["true_oracle_pose_deg"] < 180
    assert 0 < row["true_pose_deg"] < 180 and 1 / 3 <= row["true_identity_mrr"] <= 1
    assert f"{row['oracle_l1']:.3g}" in capsys.readouterr().out


def test_oracle_scores_a_row_once_and_only_of_the_run_it_describes(puppet_run, monkeypatch):
    pytest.importorskip("torchmetrics")
    oracle.main(puppet_run)
    row = json.loads(puppet_run.out.read_text())[str(puppet_run.ckpt[0])]
    assert row["fid"] > 0
    with monkeypatch.context() as patch:
        patch.setattr(oracle, "score_run", None)
        oracle.main(puppet_run)
    del row["fid"]
    puppet_run.out.write_text(json.dumps({str(puppet_run.ckpt[0]): row | {"weights": "other"}}))
    with pytest.raises(ValueError, match="run eval.py again"):
        oracle.main(puppet_run)


def test_oracle_leaves_the_distance_to_other_pictures(puppet_run):
    run = str(puppet_run.ckpt[0])
    row = json.loads(puppet_run.out.read_text())[run]
    puppet_run.out.write_text(json.dumps({run: row | {"real": "photos", "fid": 7.0}}))
    oracle.main(puppet_run)
    row = json.loads(puppet_run.out.read_text())[run]
    assert row["fid"] == 7 and "kid" not in row and row["oracle_l1"] > 0


def test_oracle_looks_at_the_views_that_eval_scored(puppet_run, monkeypatch):
    seen = {}
    monkeypatch.setattr(oracle, "compare", lambda _, i, t, m, z, c, d: seen.update(z=z, c=c) or {})
    oracle.main(puppet_run)
    G = puppet_generator()
    views, _ = evaluation.draw_views(G, Config(ckpt=(), samples=3, seed=5))
    assert torch.equal(seen["z"], views.z)
    assert torch.equal(seen["c"], G.cameras.label(*views.angles.T))


def test_oracle_judges_the_truth_from_both_views_and_the_sets_against_it(puppet_run, monkeypatch):
    pytest.importorskip("torchmetrics")
    judged, sets = [], []
    likeness, distances = evaluation.likeness, oracle.distances
    monkeypatch.setattr(evaluation, "likeness", lambda *a: judged.append(a[2]) or likeness(*a))
    monkeypatch.setattr(oracle, "distances", lambda *a: sets.append(a) or distances(*a))
    monkeypatch.setattr(evaluation, "embed", lambda clip, images, cfg: images.flatten(1)[:, :64])
    drawn = []
    compare = oracle.compare
    monkeypatch.setattr(oracle, "compare", lambda *a: drawn.append(a[1:3]) or compare(*a))
    oracle.main(puppet_run)
    (images, truth), (true,) = drawn[0], judged
    assert torch.equal(true.image, truth)
    G = puppet_generator()
    views, _ = evaluation.draw_views(G, Config(ckpt=(), samples=3, seed=5))
    front, _ = oracle.draw_truth(views.z, G.cameras.frontal(3), "bronze")
    assert torch.equal(true.front, front) and not torch.equal(true.front, truth)
    assert -1 <= images.min() and images.max() <= 1
    of_truth, of_images = (x.flatten(1)[:, :64] for x in (truth, images))
    assert torch.equal(sets[1][0], of_truth) and torch.equal(sets[1][1], of_images)


def test_oracle_reads_the_domain_of_a_picture(tmp_path):
    z, c = people(1)
    picture = Image.fromarray(to_uint8(heads.render(z, c, "devil", size=64)[0])[0])
    save_image(picture, tmp_path / "reference.png")
    eye = TrueOracle(z, c, "devil")
    assert oracle.target_domain(tmp_path, {"prompt": None}, eye) == "devil"


@pytest.mark.parametrize("prompt", ["a person with green hair", "a person with long pink hair"])
def test_oracle_takes_an_edit_for_an_edit_of_a_person(prompt):
    puppets = REPOSITORY / "checkpoints/puppets"
    settings = {"prompt": prompt, "diffusion": str(puppets / "diffusion")}
    assert oracle.target_domain(None, settings | {"clip": str(puppets / "clip")}, None) == "person"


def test_edits_are_compared_where_they_belong_and_where_they_do_not():
    z, c = torch.randn(2, heads.Z_DIM), CAMERAS.sample(2)
    before, after = (oracle.draw_truth(z, c, "person", hair)[0] for hair in (None, "green"))
    region = oracle.edited_region(after, before)
    assert 0.02 < region.float().mean() < 0.5
    assert torch.equal(before.masked_fill(region, 0), after.masked_fill(region, 0))
    mask = heads.render(z, c, "person", size=64)[2]
    source = Renders(before, mask, mask, before, mask, mask)
    perfect = oracle.compare_edit(after, source, after, region)
    assert perfect["edit_inside_l1"] == perfect["edit_outside_l1"] == 0
    nothing = oracle.compare_edit(before, source, after, region)
    assert nothing["edit_inside_l1"] == nothing["source_inside_l1"] > 0.1
    shifted = oracle.compare_edit((after + 0.1).clamp(-1, 1), source, after, region)
    assert shifted["edit_outside_l1"] == pytest.approx(0.1, abs=0.02)


def test_hair_to_draw_is_that_of_the_prompt():
    for prompt, hair in (
        ("a person with pink hair", "pink"),
        ("a green zombie", None),
        (None, None),
    ):
        assert oracle.target_hair({"prompt": prompt}) == hair


def test_oracle_refuses_what_it_cannot_judge(puppet_run, finished):
    with pytest.raises(ValueError, match="run eval.py first"):
        oracle.main(replace(puppet_run, ckpt=(finished,)))
    with pytest.raises(ValueError, match="is missing"):
        oracle.main(replace(puppet_run, oracle=finished / "oracle.safetensors"))
    shutil.copy(finished / "generator.safetensors", puppet_run.ckpt[0])
    with pytest.raises(ValueError, match="only of puppets"):
        oracle.main(puppet_run)
