"""The measurements are those of train.py's own step, and count what they say they count."""

import json
from math import isfinite
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_prior import build_taesd
from tiny_run import hurry, options, run, world

import bench
import terms
import train
from models.diffusion import Condition

CPU, META = torch.device("cpu"), torch.device("meta")


@pytest.fixture(autouse=True)
def short_runs(monkeypatch):
    hurry(monkeypatch)
    for size in ("CHANNELS", "SIDE", "MATRIX"):
        monkeypatch.setattr(bench, size, 8)


def config(**changes):
    """Return a bench.Config of the tiny networks."""
    tiny = {name: str(world() / name) for name in ("diffusion", "clip")}
    tiny |= {"generator": str(world() / "generator.safetensors"), "features": str(world() / "dino")}
    return bench.Config(**tiny | {"repeats": 1, "batch": 2, "device": "cpu"} | changes)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Return what bench.py writes of all parts: numbers and page."""
    folder = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as monkeypatch:
        hurry(monkeypatch)
        for size in ("CHANNELS", "SIDE", "MATRIX"):
            monkeypatch.setattr(bench, size, 8)
        bench.main(config(json=folder / "x.json", out=folder / "x.md"))
    return json.loads((folder / "x.json").read_text()), (folder / "x.md").read_text()


# Counting.


def test_operations_of_a_convolution_and_its_gradient():
    x, w = torch.randn(2, 3, 10, 10, requires_grad=True), torch.randn(5, 3, 3, 3)
    forward = 2 * 2 * 5 * 3 * 9 * 8 * 8
    assert bench.count(lambda: F.conv2d(x.detach(), w), CPU)[0] == forward / 1e9
    both = bench.count(lambda: torch.autograd.grad(F.conv2d(x, w).sum(), x), CPU)[0]
    assert both == 2 * forward / 1e9


def test_operations_of_attention_on_a_cpu():
    q = torch.randn(2, 4, 32, 8, requires_grad=True)
    forward = 2 * 2 * 2 * 4 * 32 * 32 * 8

    def attend():
        return F.scaled_dot_product_attention(q, q, q)

    with torch.no_grad():
        assert bench.count(attend, CPU)[0] == forward / 1e9
    # Going back, five products of that size replace two: the scores are computed again.
    both = bench.count(lambda: torch.autograd.grad(attend().sum(), q), CPU)[0]
    assert both == pytest.approx(3.5 * forward / 1e9)


def test_operations_in_inference_mode():
    x, w = torch.randn(2, 8), torch.randn(3, 8)
    with torch.inference_mode():
        assert bench.count(lambda: F.linear(x, w), CPU)[0] == 2 * 2 * 3 * 8 / 1e9


def test_memory_is_the_most_at_any_moment():
    megabyte = torch.ones(250_000)
    _, peak = bench.count(lambda: [megabyte + 1 for _ in range(3)] and megabyte + megabyte, CPU)
    assert peak == pytest.approx(3e-3, rel=0.01)  # Three in the list, freed before the sum.


def test_networks_of_full_size_cost_what_stable_diffusion_does():
    cfg = bench.run_options(bench.Config(random="full"))
    full = bench.World(cfg, META, random=True)
    with META:  # Nothing is computed.
        full.prior = bench.random_prior(bench.TOKENIZER, META, torch.float32)
        latents, text = torch.empty(2, 4, 64, 64), torch.empty(2, 77, 768)
        times = torch.ones(2, dtype=torch.int64)
        full.controlnet_inputs = (latents, times, text, torch.empty(2, 3, 512, 512))
        full.now = terms.Moment(None, None, times[:1], latents[None, :1], 0.5)
        full.condition = Condition(text)
        full.images = torch.empty(1, 3, 512, 512, requires_grad=True)
    measured = {
        name: bench.count(full.call(bench.PARTS[name]), META)[0] / 1e3
        for name in ("vae_backward", "controlnet", "unet")
    }
    tera = {"vae_backward": 2.268, "controlnet": 0.567, "unet": 1.607}  # Of one 512 px image.
    assert measured == pytest.approx(tera, rel=1e-3)
    millions = {"unet": 859.52, "controlnet": 361.28, "vae": 83.65, "text_encoder": 123.06}
    for name, size in millions.items():
        weights = sum(p.numel() for p in getattr(full.prior, name).parameters())
        assert weights == pytest.approx(size * 1e6, rel=1e-4)


# The step and its parts.


def test_the_step_is_that_of_train(tmp_path):
    logged = run(tmp_path, steps=2)["log.jsonl"]
    cfg = train.Config(**options(tmp_path, steps=2))
    step = bench.World(cfg, CPU).call(bench.PARTS["step"])
    assert [{"step": 1, **step()}, {"step": 2, **step()}] == logged


def test_the_step_is_the_sum_of_its_parts(report):
    gflop = {name: row["gflop"] for name, row in report[0]["parts"].items()}

    def total(*names):
        return pytest.approx(sum(gflop[name] for name in names), rel=0.01)

    assert gflop["generator"] == total("backbone", "rendering", "superresolution")
    assert gflop["dsds"] == total("vae_backward", "controlnet", "unet")
    assert gflop["hsc"] > gflop["vit"] + gflop["vit_backward"]  # And the similarities of cells.
    again = gflop["reused_step"]
    assert gflop["step"] - again == total("generator", "paint", "vit", "vit")
    similarity = gflop["hsc"] - gflop["vit"] - gflop["vit_backward"]  # Of cells.
    alone = ("generator_backward", "vit_backward", "vit_backward", "clip")
    assert again - similarity == total(*alone)


def test_the_report_is_complete(report):
    numbers, page = report
    assert list(numbers["parts"]) == list(bench.PARTS)
    for name, row in numbers["parts"].items():
        assert all(isfinite(value) and value > 0 for value in row.values()), name
        assert f"| {name} |" in page
    assert numbers["settings"]["batch"] == 2 and numbers["machine"]["threads"] >= 1
    assert {"torch", "diffusers", "transformers"} <= numbers["versions"].keys()
    assert "commit" in numbers and "Not measured on a GPU yet" in page


@pytest.mark.parametrize(
    "switch", [{"precision": "bf16"}, {"vae_precision": "bf16"}, {"vae": "another"}]
)
def test_switches_are_compared_with_the_exact_gradient(switch, tmp_path):
    if "vae" in switch:
        switch = {"vae": str(build_taesd(tmp_path, world() / "diffusion"))}
    bench.main(config(parts=("dsds",), batch=4, json=tmp_path / "x.json", **switch))
    gradient = json.loads((tmp_path / "x.json").read_text())["gradient"]
    assert gradient["cosine"] < 0.99999
    if "vae" not in switch:
        assert gradient["cosine"] > 0.98 and gradient["ratio"] == pytest.approx(1, abs=0.05)


def test_exact_switches_leave_nothing_to_compare(tmp_path):
    bench.main(config(parts=("dsds",), low_memory=True, precision="fp32", json=tmp_path / "x.json"))
    assert json.loads((tmp_path / "x.json").read_text())["gradient"] is None


def test_one_part_loads_no_other_network(monkeypatch, capsys):
    monkeypatch.setattr(bench, "load_prior", None)
    bench.main(config(parts=("generator", "generator_backward"), diffusion="no-user/no-prior"))
    assert "| generator_backward |" in capsys.readouterr().out


# Refusals.


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"parts": ("generator", "magic")}, "--parts .* got magic"),
        ({"repeats": 0}, "--repeats"),
        ({"batch": 0}, "--batch"),
        ({"micro_batch": -1}, "--micro-batch"),
        ({"random": "full"}, "--random .* --generator"),
        ({"json": world() / "nowhere/x.json"}, "--json"),
        ({"out": world()}, "--out"),
        ({"json": Path("x.txt"), "out": Path("x.txt")}, "--json and --out"),
        ({"device": "abacus"}, "--device"),
        ({"generator": "nowhere.safetensors"}, "nowhere.safetensors"),
    ],
)
def test_bad_options_are_refused_in_one_line(changes, reason):
    with pytest.raises(ValueError, match=reason) as error:
        bench.main(config(**changes))
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("network", ["generator", "diffusion", "features", "clip"])
def test_missing_network_is_refused_before_anything_is_measured(network, tmp_path, capfd):
    with pytest.raises(ValueError, match="nowhere"):
        bench.main(config(**{network: "nowhere"}, json=tmp_path / "x.json"))
    assert capfd.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())


def test_base_without_a_generator_asks_for_one():
    with pytest.raises(ValueError, match="--generator"):
        bench.main(bench.Config(base="ffhq"))
