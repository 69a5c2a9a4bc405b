"""eval.py: what each score sees of known changes, and when a run is scored again."""

import csv
import json
import shutil
from dataclasses import replace
from math import degrees
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny_run import build_generator, change_settings, world

import eval as evaluation
import metrics
from eval import Config, Renders, Source, Views
from files.generators import load_generator, save_generator
from harness.pictures import image_grid, save_image
from models.fingerprints import fingerprint_generator


class FakeClip:
    """A CLIP whose features are the picture itself, shrunk: what is where is all it knows."""

    model = SimpleNamespace(device=torch.device("cpu"))

    def images(self, images):
        return F.normalize(F.adaptive_avg_pool2d(images, 4).flatten(1), dim=1)

    def tokens(self, images):
        return F.adaptive_avg_pool2d(images, 8).permute(0, 2, 3, 1)


def renders(angles, people):
    """Pictures of a blob that lies where the camera's angles say, of as many patterns as people."""
    yaw, pitch = angles.T.reshape(2, -1, 1, 1)
    x, y = torch.meshgrid(torch.linspace(-1, 1, 32), torch.linspace(-1, 1, 32), indexing="xy")
    blob = torch.exp(-((x - yaw) ** 2 + (y - pitch) ** 2) * 2)
    image = blob.unsqueeze(1).repeat(1, 3, 1, 1)
    depth = 2.5 + blob.unsqueeze(1)
    mask = torch.ones_like(depth)
    return Renders(image, depth, mask, people, depth, mask)


@pytest.fixture
def scene():
    """What a source shows of some views, and of others for the pose probe."""
    generator = torch.Generator().manual_seed(3)
    views, probe_views = (
        Views(torch.empty(0), torch.rand(n, 2, generator=generator) * 1.2 - 0.6, torch.empty(n, 0))
        for n in (48, 96)
    )
    people = 0.1 * torch.randn(48, 3, 32, 32, generator=generator)
    probes = renders(probe_views.angles, people[:1])
    return Source(views, renders(views.angles, people), probe_views, probes)


PLOTS = {name: getattr(evaluation, name) for name in ("plot_bars", "plot_steps")}


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    """Leave out what takes a second at each call."""
    for name in PLOTS:
        monkeypatch.setattr(evaluation, name, lambda *_: None)


def score(ckpt, out, **changes):
    """Run eval.py on eight samples and return the rows it wrote."""
    evaluation.main(Config(ckpt=(ckpt,), out=out, samples=8, device="cpu", **changes))
    return json.loads(out.read_text())


def depth_corr(source, adapted):
    return metrics.depth_correlation(source.depth, adapted.depth, source.mask)


CFG = Config(ckpt=(), batch=16)


def test_an_unchanged_generator_scores_perfectly(scene):
    source = scene.renders
    scores = evaluation.likeness(FakeClip(), scene, source, CFG)
    assert scores["pose_deg"] == pytest.approx(scores["pose_source_deg"], abs=1e-3)
    assert scores["pose_source_deg"] < 3
    assert scores["identity_top1"] == scores["identity_mrr"] == scores["diversity"] == 1
    assert depth_corr(source, source) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("noise", [0.0, 1e-4])
@pytest.mark.parametrize("picture", ["constant", "one head"])
def test_a_collapsed_generator_has_no_diversity_and_chance_identity(scene, picture, noise):
    source = scene.renders
    generator = torch.Generator().manual_seed(0)
    one = source.front[:1] if picture == "one head" else torch.full_like(source.front[:1], 0.25)
    front = one + noise * torch.randn(source.front.shape, generator=generator)
    scores = evaluation.likeness(FakeClip(), scene, replace(source, front=front), CFG)
    assert scores["diversity"] < 0.01 and (noise or scores["diversity"] == 0)
    # One of 48 is chance; among pictures that differ at least by noise, some more may be luck.
    assert scores["identity_top1"] <= (0.15 if noise else 1 / 48 + 1e-6)
    assert scores["identity_mrr"] < 0.2


def test_a_collapsed_source_and_infinite_pictures_are_refused(scene):
    source = scene.renders
    same = replace(source, front=source.front[:1].expand_as(source.front))
    with pytest.raises(ValueError, match="same picture"):
        evaluation.likeness(FakeClip(), replace(scene, renders=same), source, CFG)
    broken = replace(source, front=source.front / 0, depth=source.depth / 0)
    with pytest.raises(ValueError, match="not finite"):
        evaluation.likeness(FakeClip(), scene, broken, CFG)
    with pytest.raises(ValueError, match="not finite"):
        depth_corr(source, broken)


def test_shuffled_people_are_found_by_chance_only(scene):
    source = scene.renders
    rolled = replace(source, front=source.front.roll(1, 0))
    scores = evaluation.likeness(FakeClip(), scene, rolled, CFG)
    assert scores["identity_top1"] == 0 and scores["diversity"] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("change", ["mirrored", "swapped"])
def test_wrong_views_score_the_angle_between_them(scene, change):
    source, angles = scene.renders, scene.views.angles
    wrong = {
        "mirrored": (source.image.flip(-1), angles * torch.tensor([-1, 1])),
        "swapped": (source.image.roll(1, 0), angles.roll(1, 0)),
    }
    image, shown = wrong[change]
    pose = evaluation.likeness(FakeClip(), scene, replace(source, image=image), CFG)
    known = metrics.angle_deg(metrics.direction(shown), metrics.direction(angles))
    assert pose["pose_deg"] == pytest.approx(known.mean().item(), rel=0.15)


def test_a_turn_that_all_pictures_share_is_taken_for_the_domain(scene):
    turned = renders(scene.views.angles + torch.tensor([0.2, 0.0]), scene.renders.front)
    pose = evaluation.likeness(FakeClip(), scene, turned, CFG)
    assert pose["pose_deg"] < 3 < degrees(0.2)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_views_that_are_drawn_to_the_front_score_what_is_missing(scene, share):
    source, angles = scene.renders, scene.views.angles
    less = renders(angles * share, source.front)
    scores = evaluation.likeness(FakeClip(), scene, less, CFG)
    known = metrics.angle_deg(metrics.direction(angles * share), metrics.direction(angles))
    assert scores["pose_deg"] == pytest.approx(known.mean().item(), rel=0.1, abs=1)


def test_a_recoloured_domain_keeps_pose_and_a_paler_one_identity(scene):
    source = scene.renders
    tint = torch.tensor([-0.3, -0.2, 0.0]).view(1, 3, 1, 1)  # Within what is clamped.
    tinted = replace(source, image=source.image + tint, front=source.front / 3 + tint)
    scores = evaluation.likeness(FakeClip(), scene, tinted, CFG)
    assert scores["pose_deg"] == pytest.approx(scores["pose_source_deg"], abs=0.05)
    assert scores["identity_top1"] == 1


def test_views_to_be_scored_fill_the_range_of_the_cameras():
    G = build_generator()
    cfg = Config(ckpt=(), samples=512)
    for views in evaluation.draw_views(G, cfg):
        low, high = views.angles.amin(0), views.angles.amax(0)
        width = torch.tensor([G.cameras.yaw_range, G.cameras.pitch_range])
        assert (high <= width).all() and (low >= -width).all()
        torch.testing.assert_close(torch.stack([-low, high]), width.expand(2, 2), rtol=0.05, atol=0)
        assert (views.angles.mean(0).abs() < 0.1 * width).all()
        assert abs(views.z.mean()) < 0.05 and views.z.std() == pytest.approx(1, abs=0.05)


class NamingClip(FakeClip):
    """A CLIP that knows brightness as words."""

    model = SimpleNamespace(device=torch.device("cpu"))
    brightness = {"a person": [1.0, 0.0], "a clown": [0.0, 1.0]}

    def images(self, images):
        bright = (images.mean((1, 2, 3)) > 0).float()
        return torch.stack([1 - bright, bright], dim=1)

    def text(self, prompts):
        return torch.tensor([self.brightness[prompt] for prompt in prompts])


def test_fidelity_is_of_the_adapted_pictures_and_gains_over_the_source(scene, monkeypatch):
    pytest.importorskip("torchmetrics")
    monkeypatch.setattr(
        evaluation, "known_domains", lambda _: {n: n for n in NamingClip.brightness}
    )
    dark = replace(scene.renders, image=-scene.renders.image)
    settings = {"prompt": "a clown", "image": None}
    bright_ones = NamingClip().text(["a clown"]).expand(48, 2)
    scores = evaluation.fidelity(
        NamingClip(), settings, None, dark, scene.renders, CFG, real=bright_ones
    )
    assert (scores["clip_text"], scores["clip_text_gain"]) == (1, 1)
    assert (scores["clip_share"], scores["clip_domain"]) == (1, "a clown")
    assert scores["fid"] == pytest.approx(0, abs=1e-6)
    scores = evaluation.fidelity(
        NamingClip(), settings, None, scene.renders, dark, CFG, real=bright_ones
    )
    assert (scores["clip_text"], scores["clip_text_gain"], scores["clip_share"]) == (0, -1, 0)
    assert scores["fid"] > 1


def test_depth_is_compared_on_the_foreground_of_the_source(finished):
    G = build_generator()
    views, _ = evaluation.draw_views(G, cfg := replace(CFG, samples=2))
    source = evaluation.render_all(G, views, 1.0, cfg, "")
    adapted = replace(source, mask=torch.zeros_like(source.mask))
    scores = evaluation.geometry(G, Source(views, source, views, source), adapted)
    assert scores["depth_corr"] == pytest.approx(1, abs=1e-5)


def test_geometry_compares_a_random_view_with_the_frontal_one(finished):
    G = build_generator()
    cfg = replace(CFG, samples=2)
    views, _ = evaluation.draw_views(G, cfg)
    drawn = evaluation.render_all(G, views, 1.0, cfg, "")
    scores = evaluation.geometry(G, Source(views, drawn, views, drawn), drawn)
    assert scores["depth_corr"] == pytest.approx(1, abs=1e-5)
    assert 0 <= scores["multiview_px"] < 32
    torch.manual_seed(cfg.seed + 1)
    ws = G.mapping(views.z[1:], G.cameras.frontal())
    c = torch.cat([G.cameras.label(*views.angles[1:].T), G.cameras.frontal()])
    out = G.synthesis(ws, c[None])
    assert torch.equal(drawn.front_depth[1], out["image_depth"][1])
    assert torch.equal(drawn.front_mask[1], out["mask"][1])


def test_eval_scores_a_run_and_writes_json(finished, tmp_path, capsys):
    out = tmp_path / "new" / "folder" / "results.json"
    row = score(finished, out)[str(finished)]
    names = {"clip_text", "pose_deg", "identity_top1", "identity_mrr", "diversity", "depth_corr"}
    names |= {"multiview_px"}
    assert names < set(row) and 0.1 < row["peak_gb"] < 50
    assert (row["samples"], row["seed"], row["trunc"]) == (8, 1_000_000, 1.0)
    assert row["total_minutes"] == pytest.approx(2 * row["step_seconds"] / 60)
    assert f"{row['diversity']:.3g}" in capsys.readouterr().out


def test_tables_and_plots_stand_beside_the_json(finished, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    for name, plot in PLOTS.items():
        monkeypatch.setattr(evaluation, name, plot)
    row = score(finished, tmp_path / "results.json")[str(finished)]
    with open(tmp_path / "results-table.csv", newline="") as file:
        (line,) = csv.DictReader(file)
    assert line["run"] == str(finished) and float(line["diversity"]) == row["diversity"]
    assert set(line) == {"run", *row}
    text = (tmp_path / "results-table.md").read_text()
    assert len(text.splitlines()) == 3 and f"| {row['pose_deg']:.3g} |" in text
    for name in ("bars", "steps"):
        with Image.open(tmp_path / f"results-{name}.png") as plot:
            plot.load()
    assert len(list(tmp_path.iterdir())) == 5


def test_without_matplotlib_there_is_a_hint_and_no_plot(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluation, "plot_bars", None)
    monkeypatch.setattr(evaluation, "find_spec", lambda _: None)
    monkeypatch.setattr(evaluation, "score_run", lambda *_: ROW)
    score(finished, tmp_path / "results.json")
    assert "pip install matplotlib" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.png")) and (tmp_path / "results-table.md").exists()


ROW = {"method": "gca3d", "target": "a clown", "diversity": 0.5}


def test_what_has_not_changed_is_not_scored_again(copied, tmp_path, monkeypatch):
    out = tmp_path / "results.json"
    before = score(copied, out)
    monkeypatch.setattr(evaluation, "render_all", None)
    assert score(copied, out) == before
    scored = []
    monkeypatch.setattr(evaluation, "score_run", lambda ckpt, cfg, *_: scored.append(cfg) or ROW)
    for change in (
        lambda: score(copied, out, seed=7),
        lambda: [change_settings(copied, steps=9), score(copied, out)],
        lambda: (
            [save_generator(build_generator(3), copied / "generator.safetensors")]
            + [score(copied, out)]
        ),
        lambda: [(copied / "log.jsonl").unlink(), score(copied, out)],
    ):
        out.write_text(json.dumps(before))
        change()
    assert len(scored) == 4


def test_a_run_that_changes_while_it_is_scored_is_scored_again(copied, tmp_path, monkeypatch):
    render_all = evaluation.render_all

    def train_meanwhile(*args, **options):
        save_generator(build_generator(3), copied / "generator.safetensors")
        return render_all(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "render_all", train_meanwhile)
        before = score(copied, tmp_path / "results.json")[str(copied)]
    after = score(copied, tmp_path / "results.json")[str(copied)]
    assert before["weights"] != after["weights"] == fingerprint_generator(load_generator(copied))


def test_rows_that_another_process_wrote_meanwhile_are_kept(finished, tmp_path, monkeypatch):
    out = tmp_path / "results.json"

    def score_run(*_):
        evaluation.write_rows(out, {"runs/other": ROW})
        return ROW

    monkeypatch.setattr(evaluation, "score_run", score_run)
    assert score(finished, out).keys() == {"runs/other", str(finished)}


def test_quick_scores_fewer_samples(finished, tmp_path, monkeypatch):
    samples = []
    monkeypatch.setattr(evaluation, "score_run", lambda _, cfg, *__: samples.append(cfg) or ROW)
    for count in (256, 8):
        cfg = Config(ckpt=(finished,), out=tmp_path / "x.json", samples=count, quick=True)
        evaluation.main(cfg)
    assert [cfg.samples for cfg in samples] == [evaluation.QUICK, 8]


def test_seed_and_machine_are_no_other_configuration():
    settings = {"prompt": "a clown", "seed": 0, "out": "a", "device": None, "lr": 1e-3}
    same = settings | {"seed": 1, "out": "b", "device": "cuda"}
    first, second, third = map(
        evaluation.fingerprint_settings, (settings, same, settings | {"lr": 1e-4})
    )
    assert first == second != third


@pytest.fixture
def photos(finished, tmp_path):
    """A folder of what the adapted generator of `finished` shows of the latents scored."""
    G = load_generator(finished)
    views, _ = evaluation.draw_views(G, cfg := replace(CFG, samples=8))
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, image in enumerate(evaluation.render_all(G, views, 1.0, cfg, "").image):
        save_image(image_grid([image[None]]), folder / f"{i}.PNG")
    (folder / "notes.txt").write_text("no picture")
    return folder


def test_real_pictures_that_are_the_adapted_ones_have_no_distance(finished, tmp_path, photos):
    pytest.importorskip("torchmetrics")
    near = score(finished, tmp_path / "a.json", real=photos)[str(finished)]
    for i, path in enumerate(photos.glob("*.PNG")):
        Image.new("RGB", (40, 30), (0, 25 * i, 255)).save(path)
    far = score(finished, tmp_path / "a.json", real=photos)[str(finished)]
    assert near["fid"] < 0.1 * far["fid"] and near["kid"] < far["kid"]
    assert far["real"] == str(photos) and far["pose_deg"] == near["pose_deg"]


def test_pictures_of_every_kind_and_subfolder_count_and_the_row_says_how_many(
    finished, tmp_path, photos, capsys
):
    pytest.importorskip("torchmetrics")
    for number, name in enumerate(["a.tif", "deep/er/b.JPEG", "deep/c.webp", "._0.PNG"]):
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        kind = {".tif": "TIFF", ".JPEG": "JPEG", ".webp": "WEBP", ".PNG": "PNG"}[Path(name).suffix]
        Image.new("RGB", (20, 20), (50 * number, 0, 90)).save(photos / name, format=kind)
    (photos / "broken.png").write_bytes(b"no picture")
    row = score(finished, tmp_path / "x.json", real=photos)[str(finished)]
    assert row["real_pictures"] == 11
    (line,) = (x for x in capsys.readouterr().err.splitlines() if "pictures found" in x)
    assert "--real: 12 pictures found, 11 used; 1 cannot be read" in line and "broken.png" in line


def test_a_picture_that_is_added_in_a_subfolder_or_changes_is_scored_again(finished, photos):
    cfg = replace(CFG, real=photos)
    seen = {evaluation.fingerprint_inputs(finished, cfg) for _ in range(2)}
    (photos / "deep").mkdir()
    for size in (8, 9):
        Image.new("RGB", (size, 8)).save(photos / "deep/new.png")
        seen.add(evaluation.fingerprint_inputs(finished, cfg))
    assert len(seen) == 3


@pytest.mark.parametrize("name", ["table.md", "table.csv", "bars.png", "steps.png"])
def test_tables_and_plots_of_others_are_refused_by_name(finished, tmp_path, name):
    (tmp_path / f"results-{name}").write_text("mine")
    with pytest.raises(ValueError, match=f"results-{name} was not written by eval.py"):
        score(finished, tmp_path / "results.json")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_tables_and_plots_of_an_earlier_call_are_replaced(finished, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    for name, plot in PLOTS.items():
        monkeypatch.setattr(evaluation, name, plot)
    monkeypatch.setattr(evaluation, "score_run", lambda *_: dict(ROW))
    score(finished, tmp_path / "results.json")
    (tmp_path / "results.json").unlink()  # To start over.
    score(finished, tmp_path / "results.json")


def test_a_target_of_words_and_pictures_names_them_all():
    settings = {"prompt": "a clown", "image": ["/photos/a.jpg", "b.png"]}
    assert evaluation.target_name(settings) == "a clown + a.jpg + b.png"
    assert evaluation.target_name({"prompt": "", "image": ["b.png"]}) == "b.png"


def test_where_pictures_are_is_no_other_configuration():
    settings = {"prompt": "", "image": ["a.png"], "image_pixels": "crc32 1"}
    moved = settings | {"image": ["/elsewhere/a.png"]}
    other = settings | {"image_pixels": "crc32 2"}
    first, second, third = map(evaluation.fingerprint_settings, (settings, moved, other))
    assert first == second != third


@pytest.mark.parametrize("case", ["missing", "few", "broken", "no torchmetrics"])
def test_real_pictures_that_cannot_be_used_are_refused(
    finished, tmp_path, photos, monkeypatch, case
):
    if case == "missing":
        shutil.rmtree(photos)
    elif case == "few":
        (photos / "0.PNG").unlink()
    elif case == "broken":
        (photos / "0.PNG").write_bytes(b"no picture")
    else:
        monkeypatch.setattr(evaluation, "find_spec", lambda _: None)
    word = {"few": "7 pictures", "broken": "0.PNG", "no torchmetrics": "pip install"}
    out = tmp_path / "new" / "results.json"
    with pytest.raises(ValueError, match=word.get(case, "--real")):
        score(finished, out, real=photos)
    assert not out.parent.exists()


def test_scores_do_not_depend_on_the_batch(finished, tmp_path):
    first = score(finished, tmp_path / "a.json", batch=1)[str(finished)]
    second = score(finished, tmp_path / "b.json", batch=8)[str(finished)]
    numbers = {k: v for k, v in first.items() if isinstance(v, float)}
    assert {k: second[k] for k in numbers} == pytest.approx(numbers, rel=1e-3, abs=1e-5)


def test_runs_share_the_renders_of_one_source_but_not_of_another(finished, copied, tmp_path):
    alone = score(finished, tmp_path / "a.json")[str(finished)]
    drawn, render_all = [], evaluation.render_all
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            evaluation, "render_all", lambda *a, **k: drawn.append(a[4]) or render_all(*a, **k)
        )
        cfg = Config(ckpt=(finished, copied), out=tmp_path / "b.json", samples=8, device="cpu")
        evaluation.main(cfg)
        assert drawn == ["pose probe", "source", "adapted", "adapted"]
        change_settings(copied, trunc=0.5)
        cfg.out.unlink()
        evaluation.main(cfg)
        assert drawn[4:] == ["pose probe", "source", "adapted"] * 2
    row = json.loads(cfg.out.read_text())[str(finished)]
    assert row == alone


def test_a_run_is_rendered_with_its_own_truncation(copied, tmp_path):
    change_settings(copied, trunc=0.5)
    views, _ = evaluation.draw_views(build_generator(), cfg := replace(CFG, samples=2))
    G = build_generator()
    half, full = (evaluation.render_all(G, views, trunc, cfg, "").image for trunc in (0.5, 1.0))
    assert not torch.allclose(half, full)
    trunc, render_all = [], evaluation.render_all
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            evaluation, "render_all", lambda *a, **k: trunc.append(a[2]) or render_all(*a, **k)
        )
        row = score(copied, tmp_path / "results.json")[str(copied)]
    assert trunc == [0.5, 0.5, 0.5] and row["trunc"] == 0.5


def test_share_names_the_domain_that_counted(copied, tmp_path):
    prior = Path(shutil.copytree(world() / "diffusion", tmp_path / "diffusion"))
    domains = {"bronze": "a bronze statue", "clown": "a clown"}
    (prior / "vocabulary.json").write_text(json.dumps({"words": [], "domains": domains}))
    change_settings(copied, diffusion=str(prior))
    row = score(copied, tmp_path / "results.json")[str(copied)]
    assert row["clip_domain"] == "a bronze statue" and 0 <= row["clip_share"] <= 1


def test_a_second_call_keeps_the_rows_of_other_runs(finished, tmp_path, monkeypatch):
    out = tmp_path / "results.json"
    other = {"method": "sds", "target": "a clown", "diversity": 0.5}
    out.write_text(json.dumps({"runs/other": other, str(finished): other}))
    monkeypatch.setattr(evaluation, "score_run", lambda *_: other | {"diversity": 0.75})
    assert score(finished, out) == {"runs/other": other, str(finished): other | {"diversity": 0.75}}


def test_a_score_that_is_no_number_is_not_written(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "score_run", lambda *_: {"diversity": float("nan")})
    with pytest.raises(ValueError, match="JSON"):
        score(finished, tmp_path / "results.json")
    assert not (tmp_path / "results.json").exists()


ROWS_OF_OTHERS = (
    *('{"a": 1}', '[{"method": 1}]', '{"a": {"b": 1}}', "no json", '{"a": null}'),
    *(
        json.dumps({"a": {"method": "m", "target": "t"} | change})
        for change in ({"target": 3}, {"method": None}, {"config": "c"}, {"diversity": [1]})
    ),
)


@pytest.mark.parametrize("text", ROWS_OF_OTHERS)
def test_a_foreign_file_is_left_alone(finished, tmp_path, text):
    out = tmp_path / "results.json"
    out.write_text(text)
    with pytest.raises(ValueError, match="results.json"):
        score(finished, out)
    assert out.read_text() == text


def test_a_folder_as_output_is_refused(finished, tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        score(finished, tmp_path)


def test_every_run_is_checked_before_any_is_scored(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "score_run", None)
    file, out = finished / "generator.safetensors", tmp_path / "new" / "results.json"
    with pytest.raises(ValueError, match="no run folder"):
        evaluation.main(Config(ckpt=(finished, file), out=out))
    with pytest.raises(ValueError, match="name a run"):
        evaluation.main(Config(ckpt=(), out=out))
    assert not out.parent.exists()


@pytest.mark.parametrize("name", ["clip", "diffusion", "method", "prompt", "seed", "trunc"])
def test_settings_without_a_key_are_refused_by_name(copied, tmp_path, name):
    path = copied / "config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in settings.items() if k != name}))
    with pytest.raises(ValueError, match=f"config.json.*'{name}'"):
        score(copied, tmp_path / "results.json")


def test_a_run_without_result_is_refused(copied, tmp_path):
    (copied / "generator.safetensors").unlink()
    with pytest.raises(ValueError, match="no generator.safetensors"):
        score(copied, tmp_path / "results.json")


def test_a_generator_of_infinite_pictures_is_refused_by_name(copied, tmp_path):
    G = build_generator()
    for weight in G.superresolution.parameters():
        weight.data.fill_(1e30)
    save_generator(G, copied / "generator.safetensors")
    with pytest.raises(ValueError, match=f"{copied}.*not finite"):
        score(copied, tmp_path / "results.json")


def test_settings_without_a_target_are_refused(copied, tmp_path):
    change_settings(copied, prompt=None, image=None)
    with pytest.raises(ValueError, match="neither 'prompt' nor 'image'"):
        score(copied, tmp_path / "results.json")


def test_a_log_cut_off_by_a_kill_still_tells_the_cost(copied):
    log = copied / "log.jsonl"
    whole = evaluation.cost(copied)
    with log.open("a") as file:
        file.write('{"step": 3, "seco')
    assert evaluation.cost(copied) == whole
    log.write_text(
        '{"step": 1, "seconds": 1, "peak_gb": 2.5}\n{"step": 2, "seconds": 3, "peak_gb": 4.5}\n'
    )
    assert evaluation.cost(copied) == pytest.approx(
        {"step_seconds": 2, "total_minutes": 4 / 60, "peak_gb": 4.5}
    )
    for foreign in (
        "[]",
        '{"step": 1, "seconds": "1"}',
        '{"step": 1, "seconds": 1, "peak_gb": "2"}',
    ):
        log.write_text(f"{foreign}\n")
        with pytest.raises(ValueError, match="log.jsonl"):
            evaluation.cost(copied)
    log.unlink()
    assert evaluation.cost(copied) == {}
