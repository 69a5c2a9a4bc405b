"""What only a GPU can show: the same run as a CPU, half precision, compiling, resuming.

`python -m pytest -m gpu` on a machine with CUDA. With GPU_TEST_DEVICE=cpu the same tests run on the
CPU, so that only the device is new when they meet a GPU.
"""

import json
import os
import shutil

import numpy as np
import pytest
import test_parity
import torch
from tiny_generator import even_samples, fill_parameters
from tiny_run import build_generator, options, run, world

import terms
import train
from config import METHODS
from harness.checkpoints import load_checkpoint
from models import eg3d
from models.eg3d import TriPlaneGenerator
from models.renderer import Rays

DEVICE = os.environ.get("GPU_TEST_DEVICE", "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        DEVICE == "cuda" and not torch.cuda.is_available(),
        reason="needs a CUDA GPU (GPU_TEST_DEVICE=cpu runs it on the CPU)",
    ),
]


@pytest.fixture
def same_rays(monkeypatch):
    """Draw the jitter of the rays on the CPU, as all other random numbers, for any device."""
    draw = eg3d.draw_rays

    def draw_on_cpu(origins, directions, options):
        drawn = draw(origins.cpu(), directions.cpu(), options)
        return Rays(*(value.to(origins.device) for value in vars(drawn).values()))

    monkeypatch.setattr(eg3d, "draw_rays", draw_on_cpu)


def logged(out, **changes):
    run(out, **changes)
    return [json.loads(row) for row in (out / "log.jsonl").read_text().splitlines()]


def assert_close(rows, wanted, rel):
    costs = {"seconds", "peak_gb"}
    for row, expected in zip(rows, wanted, strict=True):
        row, expected = ({k: v for k, v in r.items() if k not in costs} for r in (row, expected))
        assert row == pytest.approx(expected, rel=rel, abs=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_is_that_of_the_cpu(tmp_path, same_rays, method):
    changes = {"method": method, "steps": 2, "save_every": 9}
    ours = logged(tmp_path / "gpu", device=DEVICE, precision="fp32", **changes)
    assert_close(ours, logged(tmp_path / "cpu", **changes), rel=1e-2)
    got, wanted = (load_checkpoint(tmp_path / name)["weights"] for name in ("gpu", "cpu"))
    for name, value in wanted.items():
        # Adam's first steps go by the sign of a gradient: where that is noise they may differ.
        agree = torch.isclose(got[name], value, rtol=1e-2, atol=1e-4).float().mean()
        assert agree > 0.97, name


def test_a_puppets_run_is_that_of_the_cpu(tmp_path, same_rays):
    """The embedded world at its real size, two steps of two."""
    changes = {"prompt": "a bronze statue", "steps": 2, "batch": 2}
    rows = []
    for device in (DEVICE, "cpu"):
        cfg = train.Config(
            out=tmp_path / device / "run", device=device, precision="fp32", **changes
        )
        train.main(cfg)
        log = (cfg.out / "log.jsonl").read_text().splitlines()
        rows.append([json.loads(row) for row in log])
    assert_close(*rows, rel=2e-2)


def test_the_generator_draws_as_on_the_cpu(same_rays):
    G = build_generator()
    ws = G.mapping(torch.randn(2, G.z_dim), G.cameras.frontal(2))
    c = G.cameras.sample(2)
    pictures = []
    for device in ("cpu", DEVICE):
        torch.manual_seed(1)
        with torch.no_grad():
            pictures.append(G.to(device).synthesis(ws.to(device), c.to(device)))
    for name, wanted in pictures[0].items():
        torch.testing.assert_close(pictures[1][name].cpu(), wanted, rtol=1e-3, atol=2e-3, msg=name)


def test_parity_with_the_official_generator():
    """The stored render of test_parity.py, at float32 on the device; TF32 would be too coarse."""
    G = TriPlaneGenerator(**test_parity.read_keys("tiny2x")["init_kwargs"])
    G.neural_rendering_resolution = 32
    G = fill_parameters(G).requires_grad_(False).to(DEVICE)
    with np.load(test_parity.DATA / "parity_tiny2x.npz") as arrays:
        expected = {k: torch.from_numpy(v) for k, v in arrays.items() if v.dtype.kind != "U"}
    z, c, c_cond = (expected[f"in.{name}"].to(DEVICE) for name in ("z", "c", "c_cond"))
    with even_samples(), torch.backends.cudnn.flags(allow_tf32=False):
        out = G.synthesis(G.mapping(z, c_cond, 0.7, 14), c)
    test_parity.check_render(expected, "det", {name: value.cpu() for name, value in out.items()})


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_of_the_prior_is_close(tmp_path, same_rays, precision):
    if precision == "fp16" and DEVICE == "cpu":
        precision = "bf16"  # Convolutions of half precision are not for CPUs.
    exact = logged(tmp_path / "a", device=DEVICE, precision="fp32", steps=1)
    half = logged(tmp_path / "b", device=DEVICE, precision=precision, steps=1)
    assert half[0]["grad_norm"] == pytest.approx(exact[0]["grad_norm"], rel=0.05)
    assert half[0]["grad_norm"] != exact[0]["grad_norm"]


def test_a_resumed_run_is_the_unbroken_one(tmp_path):
    """To tolerance: the backward pass of grid_sample adds up in any order on CUDA."""
    changes = {"device": DEVICE, "steps": 3, "save_every": 2, "grid_every": 9}
    unbroken = logged(tmp_path / "a", **changes)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b/ckpt-000003.pt").unlink()
    assert_close(logged(tmp_path / "b", **changes), unbroken, rel=1e-2)


@pytest.mark.parametrize("changes", [{"low_memory": True}, {"micro_batch": 1}], ids=str)
def test_what_saves_memory_changes_nothing(tmp_path, same_rays, changes):
    plain = logged(tmp_path / "a", device=DEVICE, steps=1)
    assert_close(logged(tmp_path / "b", device=DEVICE, steps=1, **changes), plain, rel=1e-2)


def test_a_compiled_step_is_the_eager_one(tmp_path, same_rays):
    plain = logged(tmp_path / "a", device=DEVICE, precision="fp32", steps=1)
    fast = logged(tmp_path / "b", device=DEVICE, precision="fp32", steps=1, compile=True)
    assert_close(fast, plain, rel=1e-2)


def test_networks_and_gradients_are_on_the_device(tmp_path):
    cfg = train.Config(**options(tmp_path / "run", device=DEVICE))
    device = torch.device(DEVICE)
    G = train.load_generator(cfg.generator, device)
    guides = terms.load_guides(cfg, G, None, device)
    step = train.prepare(cfg, G, guides)
    train.take_step(step, 1)
    assert isinstance(step.G, TriPlaneGenerator) and world().exists()
    for weight in step.weights.values():
        assert weight.device.type == device.type
        assert weight.grad is not None and weight.grad.device.type == device.type
