"""Runs on files of real size and format, with random weights: EG3D, PanoHead, Stable Diffusion."""

import json
import subprocess
import sys
from math import isfinite
from pathlib import Path

import pytest
import torch
from official_pickle import content_of, write_pickle
from safetensors import safe_open
from transformers import CLIPTokenizer

import avatar
import bench
import presets
import train
from files.generators import load_generator
from harness.run_folder import REPOSITORY
from models import full_size
from models.panohead import PanoHeadGenerator

CPU = torch.device("cpu")


def write_stable_diffusion(folder):
    """Write a diffusers folder of Stable Diffusion 1.5's size, in half precision, and return it."""
    prior = full_size.random_prior(bench.TOKENIZER, CPU, torch.bfloat16)
    parts = {"vae": prior.vae, "unet": prior.unet, "text_encoder": prior.text_encoder}
    for name, network in (parts | {"controlnet": prior.controlnet}).items():
        network.half().save_pretrained(folder / name)
    prior.tokenizer.save_pretrained(folder / "tokenizer")
    schedule = {"_class_name": "PNDMScheduler", "num_train_timesteps": 1000}
    schedule |= {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    (folder / "scheduler").mkdir()
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(schedule))
    index = {name: ["diffusers", type(network).__name__] for name, network in parts.items()}
    index |= {"_class_name": "StableDiffusionPipeline"}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def visible_generator():
    """Return EG3D's generator for faces, at whose mean raw density there is something to see."""
    torch.manual_seed(0)
    G = bench.random_generator()
    with torch.no_grad():
        G.decoder.net[2].bias[0] = 4
    return G


@pytest.mark.slow
def test_bfloat16_of_the_full_generator_is_close():
    G = visible_generator()
    ws, c = G.mapping(torch.randn(1, G.z_dim), G.cameras.frontal()), G.cameras.frontal()
    images = []
    for enabled in (False, True):
        torch.manual_seed(1)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            images.append(G.synthesis(ws, c)["image"].float())
    assert images[0].std() > 0.1
    assert 10 * torch.log10(4 / (images[0] - images[1]).square().mean()) > 40


@pytest.mark.slow
@pytest.mark.skipif(
    not any(torch.cpu.get_capabilities().get(f"{unit}_bf16") for unit in ("avx512", "amx", "arm")),
    reason="this CPU has no bfloat16 arithmetic",
)
def test_bfloat16_of_the_full_generator_is_faster(tmp_path):
    torch.set_num_threads(1)
    parts = ("generator", "generator_bf16")
    bench.main(bench.Config(random="full", parts=parts, device="cpu", json=tmp_path / "bench.json"))
    rows = json.loads((tmp_path / "bench.json").read_text())["parts"]
    assert rows["generator_bf16"]["units"] < 0.65 * rows["generator"]["units"]


def visible_panohead():
    """Return PanoHead's generator at its released size, which shows a head of some kind."""
    torch.manual_seed(0)
    keys = json.loads((Path(__file__).parent / "data/keys_panohead_512.json").read_text())
    G = PanoHeadGenerator(**keys["init_kwargs"]).eval().requires_grad_(False)
    with torch.no_grad():
        G.decoder.net[2].bias[0] = 8
    return G


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """Folders of the networks that guide, by the option that names them."""
    folder = tmp_path_factory.mktemp("networks")
    files = {"diffusion": write_stable_diffusion(folder / "sd15")}
    files["controlnet"] = files["diffusion"] / "controlnet"
    for name, network in {
        "features": full_size.random_vit(CPU).model,
        "clip": full_size.random_clip(bench.TOKENIZER, CPU).model,
    }.items():
        files[name] = folder / name
        network.save_pretrained(files[name])
    CLIPTokenizer.from_pretrained(bench.TOKENIZER).save_pretrained(files["clip"])
    return files


def command_line(base, out, files, *options):
    """Return options of a short run on files, by the option that names them, into a folder."""
    line = ["--base", base, "--prompt", "a bronze statue", "--batch", "1", "--device", "cpu"]
    return [*line, "--out", str(out), *(f"--{name}={file}" for name, file in files.items())] + [
        *options
    ]


@pytest.mark.slow
def test_training_on_files_of_real_size(tmp_path, networks):
    G = visible_generator()
    files = {"generator": write_pickle(tmp_path / "ffhq.pkl", content_of(G, others=32_500_000))}
    assert 370e6 < files["generator"].stat().st_size < 390e6
    line = command_line("ffhq", tmp_path / "run", files | networks, "--steps", "2")
    command = [sys.executable, "train.py", *line]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    rows = list(map(json.loads, (tmp_path / "run/log.jsonl").read_text().splitlines()))
    print(rows)
    assert [row["step"] for row in rows] == [1, 2]
    assert all(isfinite(value) for row in rows for value in row.values())
    assert 0 < rows[-1]["grad_norm"] and rows[-1]["peak_gb"] < 16

    adapted, source = load_generator(tmp_path / "run"), load_generator(files["generator"])
    moved = {n for n, w in adapted.named_parameters() if not w.equal(source.get_parameter(n))}
    assert len(moved) == len(train.learning_weights(source, presets.WEIGHTS_LEARN[0]))
    with safe_open(tmp_path / "run/generator.safetensors", "pt") as file:
        assert len(file.keys()) == len(G.state_dict())


@pytest.mark.slow
def test_an_avatar_of_files_of_real_size(tmp_path, networks, monkeypatch):
    trimesh = pytest.importorskip("trimesh")
    for name, few in {"ROUNDS": ((1, 1), (2, 1)), "WAY": 1, "CODES": 10}.items():
        monkeypatch.setattr(avatar, name, few)  # On a CPU the search would be most of it.
    file = write_pickle(tmp_path / "easy-khair.pkl", content_of(visible_panohead(), 32_500_000))
    few = ("--steps=1", "--search=2", "--views=4", "--frames=2", "--voxels=64", "--faces=5000")
    few += ("--targets.steps=2", "--targets.pool=1")
    line = command_line("panohead", tmp_path / "run", {"generator": file} | networks, *few)
    avatar.main(avatar.parse(line, ""))
    (row,) = map(json.loads, (tmp_path / "run/fit/log.jsonl").read_text().splitlines())
    print(row)
    assert all(isfinite(value) for value in row.values()) and 0 < row["grad_norm"]
    made = load_generator(tmp_path / "run")
    assert isinstance(made, PanoHeadGenerator) and not made.z_dim
    (mesh,) = trimesh.load(tmp_path / "run/avatar.glb").geometry.values()
    assert 100 < len(mesh.faces) <= 5000
    assert mesh.visual.material.baseColorTexture.size == (2048, 2048)
