"""The training loop: what it draws, what it changes, what survives a stop or a kill."""

import builtins
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import combinations, count, pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_run import arguments, build_generator, contents, hurry, run, world

import guides
import samples
import terms
import train
from config import METHODS as METHOD_ROWS
from files.generators import load_generator
from guides import Guides, resize
from harness.checkpoints import load_checkpoint
from losses import dsds_loss, hsc_loss, source_noise
from models.diffusion import DiffusionPrior, depth_condition
from models.eg3d import TriPlaneGenerator
from models.features import TokenFeatures


@pytest.fixture(autouse=True, scope="module")
def short_runs():
    with pytest.MonkeyPatch.context() as monkeypatch:
        hurry(monkeypatch)
        yield


@pytest.fixture(scope="module")
def unbroken(short_runs, tmp_path_factory):
    return run(tmp_path_factory.mktemp("unbroken") / "run")


@pytest.fixture
def cheap(monkeypatch):
    """Replace the objective by one without networks: grey images."""
    world()  # Whose files are not those of a run.

    def grey(images, now):
        return images.square().flatten(1).sum(1)

    term = terms.Term("image", grey, frozenset({"prior"}))
    monkeypatch.setattr(terms, "TERMS", {"dsds": term, "hsc": term})


# Resuming.


class Stopped(BaseException):
    """A kill, as far as one process can imitate it."""


def stop_after(monkeypatch, steps):
    """Kill the run when it begins the step after `steps`."""
    draw = train.draw_times

    def draw_or_die(cfg, guides, step):
        if step > steps:
            raise Stopped
        return draw(cfg, guides, step)

    monkeypatch.setattr(train, "draw_times", draw_or_die)


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 5])
def test_resumed_run_equals_unbroken_run(tmp_path, unbroken, steps):
    with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(Stopped):
        stop_after(monkeypatch, steps)
        run(tmp_path / "run")
    assert run(tmp_path / "run") == unbroken


# Two draws of heads that are used twice each, and then a third.
PAINTED = {
    "method": "denoised",
    "targets": {"steps": 2, "pool": 2, "reuse": 2},
}


@pytest.fixture(scope="module")
def unbroken_painted(short_runs, tmp_path_factory):
    return run(tmp_path_factory.mktemp("painted") / "run", **PAINTED)


# Three draws; the last two are painted from the depth of what the steps before have made.
SHAPED = {
    "method": "denoised-shapes",
    "targets": {"steps": 2, "pool": 1, "reuse": 2, "guided": (0.4, 0.5), "adapted_depth": True},
}


@pytest.fixture(scope="module")
def unbroken_shaped(short_runs, tmp_path_factory):
    return run(tmp_path_factory.mktemp("shaped") / "run", **SHAPED)


# The same by inversion, where SHAPED edits.
INVERTED = SHAPED | {"targets": SHAPED["targets"] | {"draws": 0}}


@pytest.fixture(scope="module")
def unbroken_inverted(short_runs, tmp_path_factory):
    return run(tmp_path_factory.mktemp("inverted") / "run", **INVERTED)


@pytest.mark.parametrize(
    ("given", "name", "steps"),
    [(PAINTED, "unbroken_painted", steps) for steps in (1, 3, 4)]
    + [(SHAPED, "unbroken_shaped", steps) for steps in (1, 2, 5)]
    + [(INVERTED, "unbroken_inverted", steps) for steps in (1, 3)],
)
def test_resumed_run_with_targets_equals_unbroken_run(tmp_path, request, given, name, steps):
    with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(Stopped):
        stop_after(monkeypatch, steps)
        run(tmp_path / "run", **given)
    assert run(tmp_path / "run", **given) == request.getfixturevalue(name)


@pytest.fixture
def painted(monkeypatch):
    """Collect what the prior is given to paint, source by source."""
    sources = []
    paint = Guides.paint

    def spy(guides, source, latents_src):
        sources.append(source)
        return paint(guides, source, latents_src)

    monkeypatch.setattr(Guides, "paint", spy)
    return sources


def test_later_pools_are_painted_from_the_adapted_depth(tmp_path, painted, unbroken_shaped):
    assert run(tmp_path / "run", **SHAPED) == unbroken_shaped
    shapes = [(source["image_depth"], source.get("adapted_depth")) for source in painted]
    assert [adapted is None for _, adapted in shapes] == [True, False, False]
    for source, adapted in shapes[1:]:
        assert source.shape == adapted.shape and not torch.equal(source, adapted)
    given = SHAPED | {"targets": SHAPED["targets"] | {"adapted_depth": False}}
    plain = run(tmp_path / "plain", **given)["log.jsonl"]
    assert plain[:2] == unbroken_shaped["log.jsonl"][:2]
    assert plain[2] != unbroken_shaped["log.jsonl"][2]


def test_edits_of_each_batch_have_noises_of_their_own(tmp_path, painted, unbroken_shaped):
    assert run(tmp_path / "run", **SHAPED) == unbroken_shaped
    noises = [source["noises"] for source in painted]
    assert noises[0].shape[:4] == (2, 2, 1, 4)  # Steps, draws.
    assert all(not torch.equal(*pair) for pair in combinations(noises, 2))


def test_heads_take_their_new_shape_when_a_pool_begins():
    targets = {"pool": 4, "reuse": 3, "adapted_depth": True}
    cfg = train.Config(prompt="x", targets=targets)
    assert [step for step in range(1, 40) if samples.reshapes(cfg, step)] == [13, 25, 37]
    cfg = train.Config(prompt="x", targets=targets | {"adapted_depth": False})
    assert not any(samples.reshapes(cfg, step) for step in range(1, 40))


def test_every_target_is_painted_once(tmp_path, painted, unbroken_painted):
    assert run(tmp_path / "run", **PAINTED) == unbroken_painted
    assert len(painted) == 4  # Draws 1 and 2 for four steps, 3 and 4 for the last two.
    assert all(not torch.equal(a["image"], b["image"]) for a, b in pairwise(painted))


def test_steps_that_use_heads_again_have_times_and_noise_of_their_own(tmp_path, monkeypatch):
    times = []
    monkeypatch.setattr(
        train, "draw_times", lambda *a: times.append(samples.draw_times(*a)) or times[-1]
    )
    pooled = run(tmp_path / "run", steps=2, targets={"pool": 1, "reuse": 2})["log.jsonl"]
    plain = run(tmp_path / "plain", steps=2)["log.jsonl"]
    assert pooled[0] == plain[0] and pooled[1] != plain[1]
    assert not torch.equal(times[0], times[1]) and torch.equal(times[1], times[3])


def test_pool_is_used_in_turn_and_then_refreshed():
    cfg = train.Config(prompt="x", targets={"pool": 2, "reuse": 3})
    numbers = [samples.draw_number(cfg, step) for step in range(1, 10)]
    assert numbers == [1, 2, 1, 2, 1, 2, 3, 4, 3]
    assert samples.draw_number(train.Config(prompt="x"), 7) == 7


def test_run_with_a_damaged_newest_checkpoint_equals_unbroken_run(tmp_path, unbroken, capsys):
    run(tmp_path)
    (tmp_path / "generator.safetensors").unlink()
    with open(tmp_path / "ckpt-000006.pt", "r+b") as file:
        file.truncate(1000)
    assert run(tmp_path) == unbroken
    assert "ckpt-000006.pt" in capsys.readouterr().err


@pytest.mark.parametrize("result", ["generator.safetensors", "grid-000006.png"])
def test_lost_result_is_written_again(tmp_path, unbroken, result):
    run(tmp_path)
    (tmp_path / result).unlink()
    assert run(tmp_path) == unbroken


def test_finished_run_says_so_and_stays_as_it_is(tmp_path, unbroken, capsys, monkeypatch):
    run(tmp_path)
    monkeypatch.setattr(train, "load_generator", None)  # Not even loaded.
    assert run(tmp_path) == unbroken
    assert f"python render.py --ckpt {tmp_path}" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_saves_and_the_same_command_goes_on(tmp_path, unbroken, capsys, monkeypatch, number):
    update = train.update_averages

    def update_and_signal(*args, **kwargs):
        update(*args, **kwargs)
        if not (tmp_path / "ckpt-000003.pt").exists() and len(rows(tmp_path)) == 2:
            os.kill(os.getpid(), number)  # In the middle of step 3.

    monkeypatch.setattr(train, "update_averages", update_and_signal)
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stop:
        run(tmp_path)
    assert stop.value.code == 128 + number
    assert load_checkpoint(tmp_path)["step"] == 3
    assert "same command" in capsys.readouterr().out
    assert signal.getsignal(number) is before
    assert run(tmp_path) == unbroken


def rows(out):
    return [json.loads(row) for row in (out / "log.jsonl").read_text().splitlines()]


def test_log_has_a_row_per_step_with_every_term(unbroken):
    assert [row["step"] for row in unbroken["log.jsonl"]] == [1, 2, 3, 4, 5, 6]
    names = {"step", "dsds", "dsds_grad", "hsc", "hsc_grad", "grad_norm", "clip"}
    assert all(set(row) == names for row in unbroken["log.jsonl"])


# Faults while writing.


class Disk:
    """Counts what is done to the disk, and fails at the act `last` and all that follow it.

    A process that was killed does nothing more; on a full disk, deleting still works.
    """

    def __init__(self, monkeypatch, last=None, error=Stopped):
        self.acts, self.last, self.error = 0, last, error
        for name in ("replace", "fsync", "mkdir") + ("unlink",) * (error is Stopped):
            monkeypatch.setattr(os, name, self.watched(getattr(os, name)))
        monkeypatch.setattr(builtins, "open", self.watched_open(open))

    def act(self):
        self.acts += 1
        if self.last and self.acts >= self.last:
            raise self.error(28, "No space left on device")

    def watched(self, function):
        def call(*args, **kwargs):
            self.act()
            return function(*args, **kwargs)

        return call

    def watched_open(self, function):
        def call(path, mode="r", *args, **kwargs):
            file = function(path, mode, *args, **kwargs)
            if "w" in mode or "a" in mode:
                return HalfWritten(file, self)
            return file

        return call


class HalfWritten:
    """A file whose first and fortieth writes are acts; one that fails writes half."""

    def __init__(self, file, disk):
        self.file, self.disk, self.writes = file, disk, count()

    def write(self, content):
        if next(self.writes) in (0, 40):
            try:
                self.disk.act()
            except BaseException:
                self.file.write(content[: len(content) // 2])
                raise
        return self.file.write(content)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


@pytest.mark.parametrize("error", [Stopped, OSError])
def test_fault_at_any_write_loses_nothing(tmp_path, cheap, monkeypatch, error):
    # So that two steps see all acts.
    monkeypatch.setattr("harness.checkpoints.KEPT_CHECKPOINTS", 1)
    short = {"steps": 2, "save_every": 1, "grid_every": 9, "batch": 1}
    with pytest.MonkeyPatch.context() as monkeypatch:
        disk = Disk(monkeypatch, error=error)
        unbroken = run(tmp_path / "unbroken", **short)
    assert disk.acts >= 30

    for last in range(1, disk.acts + 1):
        out = tmp_path / str(last)
        with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises((error, ValueError)):
            Disk(monkeypatch, last, error)
            run(out, **short)
        assert run(out, **short) == unbroken, f"after a fault at act {last}"
        shutil.rmtree(out)


def start(out, **changes):
    command = [sys.executable, train.__file__, *arguments(out, **changes)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.mark.slow
def test_kill_at_a_random_moment_twenty_times_loses_nothing(tmp_path):
    settings = {"steps": 40, "save_every": 3, "grid_every": 5}
    began = time.perf_counter()
    assert start(tmp_path / "unbroken", **settings).wait() == 0
    seconds = time.perf_counter() - began
    unbroken = contents(tmp_path / "unbroken")
    delays, kills, out = random.Random(0), 0, tmp_path / "run0"
    while kills < 20:
        log = out / "log.jsonl"
        before = log.stat().st_mtime_ns if log.exists() else 0
        process = start(out, **settings)
        if kills % 2:  # Once it has taken the run over.
            while process.poll() is None and not (log.exists() and log.stat().st_mtime_ns > before):
                time.sleep(0.02)
            time.sleep(delays.uniform(0, 3))
        else:  # At any time, even before there is a folder.
            time.sleep(delays.uniform(0, seconds))
        process.kill()
        if process.wait() == 0:  # It was faster; take another run.
            assert contents(out) == unbroken
            out = tmp_path / f"run{kills}"
        else:
            kills += 1
    assert start(out, **settings).wait() == 0
    assert contents(out) == unbroken


# The step.


def trained(monkeypatch, tmp_path, **changes):
    """Run, and return the source generator, the one that learned, and the frozen prior if any."""
    made = {}
    learn, load, load_prior = train.learning_weights, train.load_generator, guides.load_prior

    def spy(name, function):
        def call(*args):
            result = function(*args)
            made[name] = args[0] if name == "G" else result
            return result

        return call

    monkeypatch.setattr(train, "learning_weights", spy("G", learn))
    monkeypatch.setattr(train, "load_generator", spy("G_src", load))
    monkeypatch.setattr(guides, "load_prior", spy("prior", load_prior))
    run(tmp_path / "run", **changes)
    return made["G_src"], made["G"], made.get("prior")


def test_gradient_reaches_the_learning_weights_only(monkeypatch, tmp_path):
    G_src, G, prior = trained(monkeypatch, tmp_path, steps=1)
    learning = {name for name, w in G.named_parameters() if w.grad is not None}
    assert learning == {
        name
        for name, _ in G.named_parameters()
        if name.startswith(("backbone.synthesis.", "superresolution.")) and name.endswith(".weight")
    }
    assert all(G.get_parameter(name).grad.abs().sum() > 0 for name in learning)
    frozen = [prior.unet, prior.vae, prior.text_encoder, prior.controlnet, prior.image_encoder]
    for network in [G_src, *frozen]:
        assert all(w.grad is None and not w.requires_grad for w in network.parameters())


EDIT = {"method": "diffusiongan3d", "edit": "a bronze statue", "prompt": None}
METHODS = [*({"method": method} for method in METHOD_ROWS), EDIT]


@pytest.mark.parametrize("changes", METHODS, ids=str)
def test_only_what_the_method_says_changes(monkeypatch, tmp_path, changes):
    def learns(name):
        if changes["method"] in ("diffusiongan3d", "nada"):
            frozen = "torgb" if changes["method"] == "diffusiongan3d" and changes != EDIT else "-"
            return name.startswith("backbone.synthesis") and frozen not in name
        if changes["method"] == "3d-adapter":
            taught = name.startswith(("decoder", "superresolution"))
            return taught and name.endswith(("weight", "bias"))
        return name.endswith(".weight") and "mapping" not in name and "decoder" not in name

    G_src, G, _ = trained(monkeypatch, tmp_path, **changes, steps=2)
    G_ema = load_generator(tmp_path / "run")
    before = dict(G_src.named_parameters())
    for network in (G, G_ema):
        for name, value in network.named_parameters():
            assert torch.equal(value, before[name]) != learns(name), name
        buffers = dict(network.named_buffers())
        assert all(torch.equal(x, buffers[name]) for name, x in G_src.named_buffers())


def test_a_step_goes_back_through_the_generator_once(monkeypatch, tmp_path):
    passes = []
    learn = train.learning_weights

    def learn_and_watch(G, pattern):
        weights = learn(G, pattern)
        weights["backbone.synthesis.b4.conv1.weight"].register_hook(passes.append)
        return weights

    monkeypatch.setattr(train, "learning_weights", learn_and_watch)
    run(tmp_path, steps=3)
    assert len(passes) == 3


def test_low_memory_changes_nothing(tmp_path, one_step):
    assert run(tmp_path, steps=1, low_memory=True) == one_step


def test_both_generators_render_the_same_before_the_first_update(monkeypatch, tmp_path):
    rendered = []
    synthesis = TriPlaneGenerator.synthesis

    def spy(self, *args, **kwargs):
        rendered.append(synthesis(self, *args, **kwargs))
        return rendered[-1]

    monkeypatch.setattr(TriPlaneGenerator, "synthesis", spy)
    run(tmp_path, steps=1)
    _, _, source, adapted, _ = rendered  # Two for the first grid, one for the last.
    for name in source:  # Equal but for rounding, since gradients want another memory layout.
        torch.testing.assert_close(adapted[name].detach(), source[name], rtol=0, atol=2e-5)


@pytest.mark.parametrize("seen", ["frontal", "render"])
def test_mapping_sees_the_camera_asked_for(monkeypatch, tmp_path, seen):
    cameras = []
    mapping = TriPlaneGenerator.mapping

    def spy(self, z, c, *args, **kwargs):
        cameras.append(c)
        return mapping(self, z, c, *args, **kwargs)

    monkeypatch.setattr(TriPlaneGenerator, "mapping", spy)
    run(tmp_path, steps=2, mapping_camera=seen)
    frontal = build_generator().cameras.frontal()
    in_steps = [torch.equal(c, frontal.expand_as(c)) for c in cameras if len(c) == 2]
    assert in_steps == [seen == "frontal"] * 2


def test_a_step_is_the_equation_worked_out_by_hand(tmp_path):
    run(tmp_path, steps=4, save_every=1, weights={"hsc": 0.3}, guidance=3.0, lr=1e-3)
    before, after = (
        torch.load(tmp_path / f"ckpt-00000{step}.pt", weights_only=True) for step in (3, 4)
    )
    prior = DiffusionPrior.from_pretrained(world() / "diffusion")
    vit = TokenFeatures.from_pretrained(world() / "dino")
    G_src, G = build_generator(), build_generator()
    for name, value in before["weights"].items():
        G.get_parameter(name).data.copy_(value)
        G.get_parameter(name).requires_grad_(True)

    torch.manual_seed(samples.step_seed(0, 4))
    z, c = torch.randn(2, G.z_dim), G.cameras.sample(2)
    t = 19 + ((torch.randperm(2) + torch.rand(2)) / 2 * 961).long()  # From 0.02 to 0.98.
    side = prior.image_size // prior.vae_scale_factor
    noise = torch.randn(2, 4, side, side)
    renders = []
    for network in (G_src, G):
        torch.manual_seed(samples.step_seed(0, 4, stream=1))
        renders.append(network.synthesis(G.mapping(z, G.cameras.frontal(2)), c))
    source, images = renders[0], renders[1]["image"]
    mask = source["mask"].detach()
    condition = prior.condition("a bronze statue", None, 1.0, 1.0)
    depth = depth_condition(source["image_depth"], mask, prior.image_size)
    latents, latents_src = (
        prior.encode_images(resize(x, prior.image_size)) for x in (images, source["image"])
    )
    condition_src = prior.condition("a photo of a person", None, 1.0, 1.0)
    baseline = source_noise(prior, latents_src, condition_src, t, noise, 3.0, depth)
    baseline = noise.lerp(baseline, 0.5)
    dsds = dsds_loss(prior, latents, condition, t, noise, 3.0, depth, mask, baseline)
    tokens = vit.tokens(images), vit.tokens(source["image"])
    fine_last = (1 / 6, 2 / 6, 3 / 6)
    hsc = hsc_loss(*tokens, (4, 8, None), fine_last, 0.1, mask).sum()
    ((dsds.sum() / side**2 + 0.3 * hsc) / 2).backward()

    half_life = 0.05 * 4
    for number, (name, weight) in enumerate(before["weights"].items()):
        state = before["optimizer"]["state"][number]
        gradient = G.get_parameter(name).grad
        second = 0.99 * state["exp_avg_sq"] + 0.01 * gradient.square()
        step = gradient / ((second / (1 - 0.99**4)).sqrt() + 1e-8)
        expected = weight - 1e-3 * step
        torch.testing.assert_close(after["weights"][name], expected, rtol=1e-4, atol=2e-6)
        average = before["averages"][name].lerp(expected, 1 - 0.5 ** (1 / half_life))
        torch.testing.assert_close(after["averages"][name], average, rtol=1e-4, atol=2e-6)


def test_average_forgets_half_in_its_half_life():
    averages, weights = {"w": torch.zeros(1)}, {"w": torch.ones(1)}
    for _ in range(5):
        train.update_averages(averages, weights, half_life=5)
    assert averages["w"].item() == pytest.approx(0.5)


def test_times_fill_the_annealed_range():
    prior = DiffusionPrior.from_pretrained(str(world() / "diffusion"))
    cfg = train.Config(prompt="x", t_range=(0.1, 0.8), t_end=0.4, batch=20_000, steps=100)

    def draw(cfg, step):
        guides = Guides(cfg, None, None, prior)
        return samples.draw_times(cfg, guides, step)

    for step, highest in [(0, 799), (50, 599), (100, 399)]:
        t = draw(cfg, step)
        assert (t.min(), t.max()) == (99, highest)
        quarters = (t - 99) * 4 // (highest - 98)
        assert quarters.bincount().tolist() == pytest.approx([5000] * 4, abs=100)
    few = draw(replace(cfg, batch=4), 0)
    assert sorted(((few - 99) * 4 // 701).tolist()) == [0, 1, 2, 3]


def test_streams_of_draws_never_meet():
    seeds = [samples.step_seed(s, n, k) for s in range(3) for n in range(1, 50) for k in range(4)]
    assert len(set(seeds)) == len(seeds)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_number_stops_with_step_times_and_terms(tmp_path, monkeypatch, cheap, value):
    find = train.pull_back
    steps = count(1)

    def spoil(*args):
        gradients, row = find(*args)
        factor = value if next(steps) == 4 else 1
        return {name: factor * gradient for name, gradient in gradients.items()}, row

    monkeypatch.setattr(train, "pull_back", spoil)
    message = r"step 4, t = \[\d+, \d+\].*'grad_norm': (nan|inf)"
    with pytest.raises(FloatingPointError, match=message):
        run(tmp_path)
    assert load_checkpoint(tmp_path)["step"] == 2
    assert len(rows(tmp_path)) == 3


# Presets and targets.


def test_sds_preset_has_no_depth_mask_or_consistency(tmp_path):
    result = run(tmp_path, method="sds")
    assert "hsc" not in result["log.jsonl"][0]
    settings = json.loads((tmp_path / "config.json").read_text())
    assert (settings["depth_scale"], settings["mask"]) == (0, False)
    assert {name: w for name, w in settings["weights"].items() if w} == {"dsds": 1}


@pytest.mark.parametrize(
    "change",
    [
        {"depth_scale": 0.5},
        {"depth_scale": 0.0},
        {"mask": False},
        {"delta": 0.25},
        {"guidance": 2.0},
        {"hsc_temperature": 0.2},
        {"trunc": 0.5},
        {"t_end": 0.1},
        {"prompt": "a bronze"},
        {"negative_prompt": "a clown"},
        {"vae": "taesd"},
        {"lora": (("lora.safetensors", 1.0),)},
        {"weights": {"dsds": 0.5}},
        {"hsc_levels": ((0.0, 1.0, 0.0), (0.0, 1.0, 0.0))},
        {"learns": (r"backbone\.synthesis\..*",)},
    ],
    ids=str,
)
def test_option_reaches_the_gradient(tmp_path, one_step, change, monkeypatch):
    monkeypatch.chdir(world())
    row = run(tmp_path, steps=1, **change)["log.jsonl"][0]
    assert row["grad_norm"] != one_step["log.jsonl"][0]["grad_norm"]


@pytest.mark.parametrize(
    ("changes", "logged"),
    [
        ({"method": "sds"}, ["dsds"]),
        ({"method": "stylegan-fusion"}, ["fusion", "score_direction", "perceptual"]),
        ({"method": "diffusiongan3d"}, ["dsds", "distance"]),
        (EDIT, ["dsds", "distance", "keep"]),
        ({"method": "nada"}, ["clip_direction"]),
        ({"method": "nada", "weights": {"hsc": 1.0}}, ["clip_direction", "hsc"]),
        ({"method": "3d-adapter"}, ["clip_direction", "structure", "feature_structure"]),
        ({"weights": {"score_reconstruction": 1.0, "dsds": 0.0}}, ["hsc", "score_reconstruction"]),
    ],
    ids=str,
)
def test_method_logs_its_terms_and_resumes_bit_for_bit(tmp_path, changes, logged):
    changes = changes | {"steps": 4, "grid_every": 9}
    unbroken = run(tmp_path / "a", **changes)
    rows = unbroken["log.jsonl"]
    names = {"step", "clip", "grad_norm", *logged, *(f"{name}_grad" for name in logged)}
    assert all(set(row) == names for row in rows)
    assert all(rows[-1][f"{name}_grad"] > 0 for name in logged)
    with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(Stopped):
        stop_after(monkeypatch, 3)
        run(tmp_path / "b", **changes)
    assert run(tmp_path / "b", **changes) == unbroken


def test_parts_of_a_run_teach_one_part_of_the_generator_each(tmp_path):
    Image.new("RGB", (40, 40), "orange").save(tmp_path / "x.png")
    out, method = tmp_path / "run", {"method": "3d-adapter", "image": tmp_path / "x.png"}
    run(out, **method, steps=2, save_every=1)
    first, second = (torch.load(out / f"ckpt-00000{i}.pt", weights_only=True) for i in (1, 2))
    before = dict(build_generator().named_parameters())
    for name, value in first["weights"].items():
        assert torch.equal(value, before[name]) != name.startswith("decoder."), name
        same = torch.equal(second["weights"][name], value)
        assert same != name.startswith("superresolution."), name
    assert all(row["target"] > 0 for row in rows(out))


@pytest.fixture(scope="module")
def one_step(short_runs, tmp_path_factory):
    return run(tmp_path_factory.mktemp("one_step") / "run", steps=1)


def test_picture_is_kept_and_outlives_its_file(tmp_path, unbroken):
    picture = tmp_path / "statue.png"
    Image.new("RGB", (40, 60), "orange").save(picture)
    with_picture = run(tmp_path / "a", image=picture)
    assert with_picture["log.jsonl"] != unbroken["log.jsonl"]
    with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(Stopped):
        stop_after(monkeypatch, 3)
        run(tmp_path / "b", image=picture)
    picture.unlink()
    assert run(tmp_path / "b", image=picture) == with_picture


def test_picture_alone_is_a_target(tmp_path):
    Image.new("L", (30, 30), 200).save(tmp_path / "grey.png")
    result = run(tmp_path / "run", prompt=None, image=tmp_path / "grey.png", steps=2)
    assert len(result["log.jsonl"]) == 2
    assert json.loads((tmp_path / "run" / "config.json").read_text())["image_scale"] == 1.0


def test_run_folder_may_move_with_its_repository(tmp_path, monkeypatch, cheap):
    def run_at(place):
        monkeypatch.setattr("harness.run_folder.REPOSITORY", tmp_path / place)
        names = {"generator": "generator.safetensors", "diffusion": "diffusion"}
        names |= {"features": "dino", "clip": "clip"}
        local = {name: str(tmp_path / place / "world" / file) for name, file in names.items()}
        return run(tmp_path / place / "run", **local)

    shutil.copytree(world(), tmp_path / "here" / "world")
    first = run_at("here")
    (tmp_path / "here").rename(tmp_path / "there")
    (tmp_path / "there/run/generator.safetensors").unlink()  # So that there is something to do.
    assert run_at("there") == first


def test_foreign_checkpoint_is_refused_and_the_run_kept(tmp_path, cheap):
    run(tmp_path, steps=2)
    state = torch.load(tmp_path / "ckpt-000002.pt", weights_only=True)
    name, weight = next(iter(state["weights"].items()))
    (tmp_path / "generator.safetensors").unlink()  # So that there is something left to do.
    for weights in ({}, state["weights"] | {name: weight[:1]}):
        torch.save(state | {"weights": weights}, tmp_path / "ckpt-000002.pt")
        with pytest.raises(ValueError, match="checkpoint is of another run"):
            run(tmp_path, steps=2)


def test_working_folder_becomes_no_run(tmp_path, monkeypatch, cheap):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match="no run and not empty"):  # What an unset variable gives.
        run(Path(""), steps=1)
    assert os.listdir() == ["notes.txt"]
