"""Official files of EG3D, PanoHead, StyleGAN2: .pkl, state dicts (.pth), PTI's generators (.pt).

All become what files/generators.py builds a generator from: a header as in our files, and the
tensors by state-dict key, float32. A .pkl holds the whole training state of a GAN, of which G_ema
counts. A state dict holds no configuration: of EG3D its shapes must be a released network's, of
StyleGAN2 they tell it (files/rosinality.py).
"""

import itertools
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from files.pickles import Inert, Storage, Stored, read_pickle, read_saved, read_storage, to_numbers
from files.rosinality import is_stylegan2, read_stylegan2
from models.eg3d import PLANE_AXES, TriPlaneGenerator
from models.panohead import GRID_AXES

GROUPS = ("_parameters", "_buffers", "_modules")
SCALARS = (type(None), bool, int, float, str)
POSITIONAL = ("z_dim", "c_dim", "w_dim", "img_resolution", "img_channels")
FOREGROUND_DEPTH = 2.85  # Heads end before it, the background of faces and cats lies behind.
FACE_RAYS = {"ray_start": 2.25, "ray_end": 3.3}
PANOHEAD = {"t_mapping", "triplane_depth"}  # A module and a setting of its own.
TENSORFLOW = "dnnlib.tflib.network.Network"
MAX_PARTS = 10_000  # Modules, parameters and buffers; EG3D has some 260.
MAX_NAME = 200  # Letters in a state-dict key.
MAX_SETTINGS = 300  # Numbers, strings and what holds them; EG3D has some 80.
MAX_STORAGE = 10_000  # Bytes of a tensor among the settings.
MAX_ZIP = 20e9  # Bytes of an archive that is looked into.
GENERATOR_SUFFIXES = (".pkl", ".pt", ".pth", ".safetensors")

RENDERING = {
    "clamp_mode": "softplus",
    "disparity_space_sampling": False,
    "superresolution_noise_mode": "none",
    "sr_antialias": True,
    "c_scale": 1.0,
    "decoder_lr_mul": 1.0,
}
FACES = RENDERING | {
    **FACE_RAYS,
    "superresolution_module": "training.superresolution.SuperresolutionHybrid8XDC",
    "c_gen_conditioning_zero": False,
    "depth_resolution": 48,
    "depth_resolution_importance": 48,
    "box_warp": 1,
    "avg_camera_radius": 2.7,
    "avg_camera_pivot": [0, 0, 0.2],
}
CARS = RENDERING | {
    "superresolution_module": "training.superresolution.SuperresolutionHybrid2X",
    "c_gen_conditioning_zero": True,
    "depth_resolution": 64,
    "depth_resolution_importance": 64,
    "ray_start": 0.1,
    "ray_end": 2.6,
    "box_warp": 1.6,
    "white_back": True,
    "avg_camera_radius": 1.7,
    "avg_camera_pivot": [0, 0, 0],
}
# Image size, neural rendering resolution and rendering_kwargs of the released networks.
RELEASED = {
    "ffhq512-128": (512, 128, FACES),
    "afhqcats512-128": (512, 128, FACES | {"avg_camera_pivot": [0, 0, -0.06]}),
    "shapenetcars128-64": (128, 64, CARS),
}


def read_official_pickle(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """Read the generator of a .pkl as NVIDIA's trainings write it, executing nothing in it.

    Returns:
        The header and the tensors (see `generators.save_generator`).

    Raises:
        ValueError: it holds no generator that is known here, or is damaged; the message names no
            file.
    """
    G = find_generator(read_pickle(path))
    return describe(G), load_parts(G, most=path.stat().st_size)


def read_saved_file(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """Read a file of torch.save: a whole generator, as PTI saves it, or a state dict.

    Returns:
        The header and the tensors (see `generators.save_generator`).

    Raises:
        ValueError: it cannot be read without executing code, or is neither; the message names no
            file.
    """
    try:
        content = read_saved(path)
    except ValueError as error:
        reason = "it is damaged, compressed, or holds more than tensors and numbers"
        if files := packed_files(path):
            reason = f"it is a ZIP archive: unpack it, and give the file in it ({files})"
        raise ValueError(reason) from error
    G = content if type(content) is Inert else entries(content).get("G_ema")
    if type(G) is Inert:
        G = find_generator({"G_ema": G})
        return describe(G), load_parts(G, most=path.stat().st_size)
    return read_state_dict(path, content)


def packed_files(path: Path) -> str:
    """Return the names of the generators in a ZIP archive that torch.save did not write."""
    if path.stat().st_size > MAX_ZIP or not zipfile.is_zipfile(path):
        return ""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith(GENERATOR_SUFFIXES)]
    # A damaged ZIP, or one of a kind that zipfile cannot read: the caller has its own reason.
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return ""
    own = any(name.rpartition("/")[2] == "data.pkl" for name in names)
    return "" if own else ", ".join(names)[:MAX_NAME]


def read_state_dict(path: Path, content: Any) -> tuple[dict, dict[str, Tensor]]:
    """Read a state dict, and say on stderr which network it is taken for.

    Faces and cats of EG3D have one network; cats are known by "afhq" in the file's name.

    Args:
        path: The file, for its name.
        content: What `read_saved` found in it.

    Returns:
        The header and the tensors (see `generators.save_generator`).

    Raises:
        ValueError: its names and shapes are those of no network that is known here; the message
            names no file.
    """
    average = entries(content).get("latent_avg")
    for wrapper in ("G_ema", "g_ema", "params_ema", "G", "g", "state_dict"):
        if type(content) is dict:
            content = content.get(wrapper, content)
    if not (type(content) is dict and content and all(map(is_weight, content.values()))):
        raise ValueError("it holds no state dict of real numbers")
    content = {name.removeprefix("module."): value for name, value in content.items()}
    if is_stylegan2(content):
        return read_stylegan2(path, content, average if is_weight(average) else None)

    if any(name.startswith("t_mapping.") for name in content):
        raise ValueError("it holds PanoHead's weights without its settings: give its .pkl")
    faces = "afhqcats512-128" if "afhq" in path.name.lower() else "ffhq512-128"
    name = recognise(content, (faces, "shapenetcars128-64"))
    img_resolution, neural_rendering_resolution, rendering_kwargs = RELEASED[name]
    print(
        f"note: {path} does not say how it is rendered; it is taken for {name}, with "
        f"{neural_rendering_resolution} px before super-resolution",
        file=sys.stderr,
    )
    header = {
        "format": "eg3d-safetensors",
        "init_kwargs": released_arguments(img_resolution),
        "rendering_kwargs": with_foreground(rendering_kwargs),
        "neural_rendering_resolution": neural_rendering_resolution,
        "plane_axes": PLANE_AXES,
    }
    # Their sizes are known by now, so that those of few numbers may be expanded to them.
    return header, {name: value.load(expanded=True).float() for name, value in content.items()}


def find_generator(content: Any) -> Inert:
    """Return the averaged generator, G_ema, of a pickle's content.

    Raises:
        ValueError: there is none, or it is another project's.
    """
    networks = content if type(content) is tuple else ()
    if any(type(network) is Inert and network.name == TENSORFLOW for network in networks):
        raise ValueError(
            "it holds networks of StyleGAN or StyleGAN2 for TensorFlow, which are not read here"
        )
    G = entries(content).get("G_ema")
    if type(G) is not Inert:
        raise ValueError("it holds no generator under the name G_ema")
    state = entries(G.state)
    modules = entries(state.get("_modules"))
    if "backbone" not in modules and {"mapping", "synthesis"} <= modules.keys():
        synthesis = modules["synthesis"]
        state = entries(synthesis.state) if type(synthesis) is Inert else {}
        if "b4" not in entries(state.get("_modules")):
            raise ValueError("it holds a generator of StyleGAN3, which is not read here")
        return G
    if not {"backbone", "decoder", "superresolution"} <= modules.keys():
        raise ValueError(f"its G_ema is {G.name!r}, which is none of EG3D, PanoHead, StyleGAN2")
    return G


def describe(G: Inert) -> dict:
    """Return the header of a pickled generator: how to build it, and how it renders."""
    state = entries(G.state)
    arguments = state.get("_init_args")
    arguments = arguments if type(arguments) is tuple else ()
    named = dict(zip(POSITIONAL, arguments, strict=False))
    init_kwargs = plain(named | entries(state.get("_init_kwargs")))
    # Training changes the generator's own rendering_kwargs, not those it was built with.
    rendering_kwargs = plain(entries(state.get("rendering_kwargs")))
    modules = entries(state["_modules"])
    if "backbone" not in modules:
        return {"format": "stylegan2-safetensors", "init_kwargs": init_kwargs}
    panohead = bool(PANOHEAD & (modules.keys() | rendering_kwargs.keys()))
    if not panohead and init_kwargs.get("architecture") == "skip":
        del init_kwargs["architecture"]  # The only value that EG3D can have.
    children = [entries(module.state) for module in modules.values() if type(module) is Inert]
    axes = [child["plane_axes"] for child in children if "plane_axes" in child]  # The renderer's.
    rendering_kwargs = rendering_kwargs or entries(init_kwargs.get("rendering_kwargs"))
    own_axes = GRID_AXES if panohead else PLANE_AXES
    return {
        "format": "panohead-safetensors" if panohead else "eg3d-safetensors",
        "init_kwargs": init_kwargs,
        "rendering_kwargs": rendering_kwargs if panohead else with_foreground(rendering_kwargs),
        "neural_rendering_resolution": plain(state.get("neural_rendering_resolution", 64)),
        "plane_axes": plain(axes[0] if axes else own_axes),
    }


def with_foreground(rendering_kwargs: dict) -> dict:
    """Add where the foreground of faces and cats ends, which no file of EG3D's says."""
    of_faces = all(rendering_kwargs.get(name) == value for name, value in FACE_RAYS.items())
    if not of_faces or rendering_kwargs.get("white_back"):
        return rendering_kwargs
    return {"foreground_depth": FOREGROUND_DEPTH} | rendering_kwargs


def load_parts(G: Inert, most: int) -> dict[str, Tensor]:
    """Copy the tensors of a pickled module out of the file, one that several parts are for each.

    Args:
        G: The module.
        most: Numbers in all of them, since a small file can repeat a tensor without end.

    Raises:
        ValueError: they are damaged or too many.
    """
    tensors, storages = {}, {}
    for name, stored in dict(parts(G)).items():
        key = id(stored.storage)
        if key not in storages:  # To read it for each of its tensors would take long.
            known = type(stored.storage) is Storage
            storages[key] = stored.storage if known else read_storage(stored.storage)
        tensors[name] = stored._replace(storage=storages[key]).load().float()
        most -= tensors[name].numel()
        if most < 0:
            raise ValueError("it repeats its tensors too often for a file of its size")
    return tensors


def parts(G: Inert) -> Iterator[tuple[str, Stored]]:
    """Yield a pickled module's parameters and buffers by state-dict key, in a state dict's order.

    Raises:
        ValueError: there are more of them than a generator can have, or they are no tensors.
    """
    left, pending = MAX_PARTS, [("", G)]
    while pending:
        prefix, module = pending.pop()
        state = entries(module.state)
        parameters, buffers, modules = (entries(state.get(group)) for group in GROUPS)
        volatile = state.get("_non_persistent_buffers_set")
        volatile = volatile if type(volatile) is list else []
        # Counted before they are touched: a small file can nest and repeat them without end.
        left -= 1 + len(parameters) + len(buffers) + len(modules) + len(volatile)
        if left < 0 or len(prefix) > MAX_NAME:
            raise ValueError("it has more parts than a generator can have")
        # Comparing long names takes long.
        volatile = {name for name in volatile if type(name) is str and len(name) <= MAX_NAME}
        for name, value in (parameters | buffers).items():
            if value is None or name in volatile:
                continue
            if type(value) is not Stored or len(name) > MAX_NAME:
                raise ValueError(f"{prefix}{name[:MAX_NAME]} is no tensor")
            yield prefix + name, value
        children = [(f"{prefix}{name[: MAX_NAME + 1]}.", m) for name, m in modules.items()]
        pending += [(name, m) for name, m in reversed(children) if type(m) is Inert]


def entries(value: Any) -> dict[str, Any]:
    """Return a pickled dict, also one of EG3D's own class; anything else has no entries."""
    value = value.items if type(value) is Inert else value
    return value if type(value) is dict else {}


def plain(value: Any, count: Iterator[int] | None = None) -> Any:
    """Return a pickled setting as JSON knows it; small tensors become numbers or lists.

    Other objects become the names of their classes, which no check of a setting in use lets pass.

    Args:
        value: The setting, or a dict of them.
        count: Counts what is in it, since a small file can nest and repeat it without end.

    Raises:
        ValueError: there is too much in it.
    """
    count = count or itertools.count()
    if next(count) >= MAX_SETTINGS:
        raise ValueError("it has more settings than a generator can have")
    if type(value) is Stored and is_small(value):
        tensor = value.load()
        value = to_numbers((tensor.float() if tensor.dtype is torch.bfloat16 else tensor).numpy())
    if type(value) is Inert:
        value = value.items if value.name.endswith("Dict") else value.name
    if type(value) in (list, tuple):
        return [plain(entry, count) for entry in value]
    if type(value) is dict:
        return {name: plain(entry, count) for name, entry in value.items()}
    return value if type(value) in SCALARS else type(value).__name__


def is_small(tensor: Stored) -> bool:
    """Whether a tensor can be loaded in no time."""
    if type(tensor.storage) is Storage:
        return tensor.storage.count <= MAX_STORAGE // 8
    return type(tensor.storage) in (memoryview, str) and len(tensor.storage) <= MAX_STORAGE


def is_weight(value: Any) -> bool:
    """Whether an entry of a state dict is one: real numbers in the file."""
    storage = value.storage if type(value) is Stored else None
    dtype = storage.dtype if type(storage) is Storage else None
    return dtype is not None and dtype.is_floating_point


def released_arguments(img_resolution: int) -> dict[str, Any]:
    """Return the constructor arguments that the released networks share, and the image size."""
    return {
        "z_dim": 512,
        "c_dim": 25,
        "w_dim": 512,
        "img_resolution": img_resolution,
        "img_channels": 3,
        "mapping_kwargs": {"num_layers": 2},
        "sr_num_fp16_res": 4,
    }


def recognise(tensors: dict[str, Stored], names: tuple[str, ...]) -> str:
    """Return which of the released networks of these names has tensors of these shapes.

    Raises:
        ValueError: none; naming a difference to the most similar.
    """
    given = {name: list(tensor.shape()) for name, tensor in tensors.items()}
    differences = {}
    for name in names:
        img_resolution, _, rendering_kwargs = RELEASED[name]
        with torch.device("meta"):
            G = TriPlaneGenerator(
                **released_arguments(img_resolution), rendering_kwargs=rendering_kwargs
            )
        wanted = {key: list(tensor.shape) for key, tensor in G.state_dict().items()}
        found = {"dataset_label_std": [25]} | given  # Which only EG3D's training adds.
        keys = sorted(wanted.keys() | found.keys())
        differences[name] = [key for key in keys if wanted.get(key) != found.get(key)]
    name = min(differences, key=lambda name: len(differences[name]))
    if differences[name]:
        raise ValueError(
            f"its shapes are those of no released network; {len(differences[name])} differ from "
            f"{name}, such as {differences[name][0]}"
        )
    return name
