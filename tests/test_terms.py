"""The objective: what each term compares, what it needs, and how gradients come back."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_run import hurry, options

import terms
import train
from config import Config, Weights
from files.generators import load_generator
from harness.pictures import read_picture, to_image

DATA = Path(__file__).parent / "data"
# Runs whose gradients at the weights were stored at 5c470a9, when each term still went back through
# its network by itself; together they have all twelve terms.
STORED = {
    "gca3d": {},
    "sds": {"method": "sds"},
    "stylegan-fusion": {"method": "stylegan-fusion", "weights": {"score_reconstruction": 1.0}},
    "diffusiongan3d": {
        "method": "diffusiongan3d",
        "edit": "a person with green hair",
        "prompt": None,
    },
    "nada": {"method": "nada"},
    "3d-adapter": {
        "method": "3d-adapter",
        "image": "picture.png",
        "learns": (r"(decoder|backbone\.synthesis|superresolution)\..*\.weight",),
    },
    "delta": {"delta": 0.3, "mask": False, "micro_batch": 1},
}


@pytest.fixture(autouse=True, scope="module")
def short_runs():
    with pytest.MonkeyPatch.context() as monkeypatch:
        hurry(monkeypatch)
        yield


def prepared(cfg):
    """Return a run of the tiny world before its first step."""
    G = load_generator(cfg.generator)
    reference = torch.cat([to_image(read_picture(path)) for path in cfg.image] or [torch.empty(0)])
    guides = terms.Guides.load(cfg, G, reference if cfg.image else None, torch.device("cpu"))
    return train.prepare(cfg, G, guides)


def probe(name, weight):
    """Return a fixed direction for the gradient of a weight."""
    generator = torch.Generator().manual_seed(len(name))
    return torch.randn(weight.shape, generator=generator)


@pytest.mark.parametrize("name", STORED)
def test_gradients_are_those_of_one_pass_per_term(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Image.linear_gradient("L").convert("RGB").resize((40, 40)).save("picture.png")
    run = prepared(Config(**options(tmp_path / "run", **STORED[name])))
    torch.manual_seed(5)
    with torch.no_grad():
        for weight in run.weights.values():
            weight.add_(0.3 * torch.randn_like(weight))  # So that no term is at its zero.
    run.optimizer.step = lambda: None
    row = train.take_step(run, 3)
    products = [
        (w.grad * probe(name, w)).sum() for name, w in run.weights.items() if w.grad is not None
    ]
    stored = json.loads((DATA / "gradients.json").read_text())[name]
    assert row["grad_norm"] == pytest.approx(stored["grad_norm"], rel=1e-4)
    assert sum(products).item() == pytest.approx(
        stored["probe"], rel=1e-3, abs=1e-4 * stored["grad_norm"]
    )
    assert {term: row[term] for term in stored["terms"]} == pytest.approx(stored["terms"], rel=1e-4)
    assert row["clip"] == pytest.approx(stored["clip"], abs=1e-5)


def test_every_term_has_a_weight_and_every_weight_a_term():
    assert [field.name for field in fields(Weights)] == list(terms.TERMS)
    assert all(term.view in terms.VIEWS for term in terms.TERMS.values())
