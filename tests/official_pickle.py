"""Writes generators as NVIDIA's trainings do: the bytes of a .pkl, from stand-in classes.

The classes here bear the names of EG3D's and hold nothing but state, so no file written by them
carries EG3D's source text: where that would be is `SOURCE`, which leaves a trace if it is executed.
"""

import pickle
import re
import sys
import types
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import nn

from models.eg3d import TriPlaneGenerator
from models.panohead import PanoHeadGenerator
from models.stylegan2 import StyleGAN2Generator

SOURCE = "import os\nos.mkdir('executed')\n" * 20
ATTRIBUTES = ("z_dim", "c_dim", "w_dim", "img_resolution", "img_channels", "rendering_kwargs")
CLASS_NAMES = {
    r"backbone": "Generator",
    r".*synthesis": "SynthesisNetwork",
    r".*mapping": "MappingNetwork",
    r".*(b|block)\d+": "SynthesisBlock",
    r".*conv\d": "SynthesisLayer",
    r".*torgb": "ToRGBLayer",
    r".*(affine|embed|fc\d|net\.\d)": "FullyConnectedLayer",
}


def _reconstruct_persistent_obj(meta):
    raise AssertionError("the official loader would execute meta['module_src'] here")


class EasyDict(dict):
    """EG3D's dict for settings."""


class Persistent(nn.Module):
    """A module that pickles as class name, state and source text."""

    def __init__(self, class_name, **attributes):
        super().__init__()
        self.class_name = class_name
        self.__dict__.update(attributes)

    def __reduce__(self):
        state = {k: v for k, v in self.__dict__.items() if k != "class_name"}
        meta = {"type": "class", "version": 6, "module_src": SOURCE}
        return _reconstruct_persistent_obj, (
            meta | {"class_name": self.class_name, "state": state},
        )


class Network:
    """A network of StyleGAN2 for TensorFlow."""

    def __init__(self, name, variables):
        self.name, self.variables = name, variables


class OSGDecoder(nn.Module):
    """One of the four classes that EG3D pickles by reference."""


class ImportanceRenderer(nn.Module):
    """Another."""


class MipRayMarcher2(nn.Module):
    """Another."""


class RaySampler(nn.Module):
    """Another."""


HOMES = {
    _reconstruct_persistent_obj: "torch_utils.persistence",
    EasyDict: "dnnlib.util",
    Network: "dnnlib.tflib.network",
    OSGDecoder: "training.triplane",
    ImportanceRenderer: "training.volumetric_rendering.renderer",
    MipRayMarcher2: "training.volumetric_rendering.ray_marcher",
    RaySampler: "training.volumetric_rendering.ray_sampler",
}


def official_modules():
    """Return a context in which the stand-ins are where EG3D's classes would be."""
    parents = ("torch_utils", "dnnlib", "dnnlib.tflib", "training", "training.volumetric_rendering")
    modules = {name: types.ModuleType(name) for name in (*parents, *HOMES.values())}
    for thing, home in HOMES.items():
        thing.__module__ = home
        setattr(modules[home], thing.__name__, thing)
    return mock.patch.dict(sys.modules, modules)


def pack(G: TriPlaneGenerator | StyleGAN2Generator) -> Persistent:
    """Return a generator as a tree of stand-ins, in the order of its official code."""
    if isinstance(G, StyleGAN2Generator):
        root = Persistent(
            "Generator",
            **{name: getattr(G, name) for name in (*ATTRIBUTES[:5], "num_ws")},
            _init_args=(),
            _init_kwargs=EasyDict(easy(G.init_kwargs)),
        )
    else:
        root = Persistent(
            "TriPlaneGenerator",
            **{name: getattr(G, name) for name in ATTRIBUTES},
            neural_rendering_resolution=G.neural_rendering_resolution,
            _init_args=(),
            _init_kwargs=EasyDict(G.init_kwargs),
            _last_planes=torch.zeros(2, 3),
        )
        persistent = isinstance(G, PanoHeadGenerator)  # By its classes of them, not by reference.
        root.renderer = Persistent("ImportanceRenderer") if persistent else ImportanceRenderer()
        root.renderer.ray_marcher = Persistent("MipRayMarcher2") if persistent else MipRayMarcher2()
        root.renderer.__dict__["plane_axes"] = G.plane_axes.clone()
        root.ray_sampler = RaySampler()
    parameters = dict(G.named_parameters())
    for key, value in G.state_dict().items():
        *path, name = key.split(".")
        module = root
        for i, part in enumerate(path):
            if part not in module._modules:
                module.add_module(part, stand_in(G, ".".join(path[: i + 1])))
            module = module._modules[part]
        if key in parameters:
            module.register_parameter(name, nn.Parameter(value.clone(), requires_grad=False))
        else:
            module.register_buffer(name, value.clone())
    for name in ("torgb", "bcg_synthesis"):
        if getattr(G, name, ...) is None:
            root.register_module(name, None)
    first = next(iter(root._modules.values()))
    first.register_buffer("scratch", torch.zeros(2), persistent=False)
    return root.eval()


def easy(settings: dict) -> dict:
    """Return settings whose dicts are of the official class, as training has them."""
    return {k: EasyDict(v) if isinstance(v, dict) else v for k, v in settings.items()}


def stand_in(G: TriPlaneGenerator, path: str) -> nn.Module:
    """Return an empty stand-in for the module at a path such as "backbone.mapping"."""
    if path == "superresolution":
        return Persistent(G.rendering_kwargs["superresolution_module"].rsplit(".", 1)[-1])
    if path == "decoder":
        return OSGDecoder()
    if path == "decoder.net":
        return nn.Sequential(*(stand_in(G, f"{path}.{i}") for i in range(3)))
    if path == "decoder.net.1":
        return nn.Softplus()
    name = next(name for rule, name in CLASS_NAMES.items() if re.fullmatch(rule, path))
    module = Persistent(name, weight_gain=np.float64(0.1), bias_gain=np.float32(1))
    module.register_parameter("absent", None)  # As torch notes the bias of a layer without one.
    return module


def content_of(G: TriPlaneGenerator, others: int = 10) -> dict:
    """Return what a .pkl of EG3D holds: of `G` the average, besides it `others` numbers in each."""
    D = Persistent("DualDiscriminator", _init_kwargs=EasyDict(c_dim=25))
    D.b4 = Persistent("DiscriminatorBlock")
    D.b4.register_parameter("weight", nn.Parameter(torch.randn(others)))
    augment_pipe = Persistent("AugmentPipe", p=np.float64(0.5))
    augment_pipe.register_buffer("Hz_geom", torch.randn(12))
    training_set_kwargs = EasyDict(
        class_name="training.dataset.ImageFolderDataset", path="/data/FFHQ_512.zip", max_size=None
    )
    return {
        "training_set_kwargs": training_set_kwargs,
        "G": pack(G),
        "D": D,
        "G_ema": pack(G),
        "augment_pipe": augment_pipe,
    }


def write_pickle(path: Path, content: object, protocol: int = 4) -> Path:
    """Write a pickle whose stand-ins pass for EG3D's classes, and return its path."""
    with official_modules(), open(path, "wb") as file:
        pickle.dump(content, file, protocol)
    return path
