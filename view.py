"""Play with heads in the browser: turn, mix, edit them, and take pictures, videos and meshes away.

    python view.py --ckpt runs/a-clown
    python view.py --ckpt runs/a-clown runs/a-devil --latents me.safetensors

Opens a page on this machine alone (http://localhost:8080), unless --host says otherwise. Every
visitor has a head of their own. Several runs of one source are mixed by sliders; the directions of
directions.py are sliders, too, where the file is there. Needs viser: pip install viser.
"""

from __future__ import annotations

import importlib.util
import socket
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from harness.cli import exit_codes, read_options
from harness.run_folder import AVATAR, check_source

DIRECTIONS_FILE = Path("directions.safetensors")


@dataclass
class Config:
    """Options of view.py."""

    ckpt: tuple[str, ...]  # Runs of one source, or a generator file, hub id or URL.
    latents: tuple[Path, ...] = ()  # People that invert.py found.
    directions: Path = DIRECTIONS_FILE  # File of directions.py, if it is there.
    host: str = "127.0.0.1"  # Address to listen on; 0.0.0.0 lets other machines in.
    port: int = 8080  # Port to listen on; where it is taken, one of the next.
    voxels: int = 128  # Of a mesh, per side.
    frames: int = 90  # Of a video.
    device: str | None = None  # Such as cpu or cuda; None: a GPU where there is one.


def check(cfg: Config) -> None:
    """Refuse options that cannot be used.

    Raises:
        ValueError: naming the flag, the rule and the value.
    """
    if importlib.util.find_spec("viser") is None:
        raise ValueError("view.py needs viser: pip install viser")
    for flag, value, low, high in (
        ("--port", cfg.port, 1, 65_535),
        ("--voxels", cfg.voxels, 16, 512),
        ("--frames", cfg.frames, 2, 360),
    ):
        if not low <= value <= high:
            raise ValueError(f"{flag} must be {low} to {high}, got {value}")
    if not cfg.ckpt:
        raise ValueError("--ckpt needs a run")
    for ckpt in cfg.ckpt:
        check_source("--ckpt", ckpt)
        if len(cfg.ckpt) > 1 and not Path(ckpt).is_dir():
            raise ValueError(f"--ckpt {ckpt}: several are mixed, which needs run folders")
    check_files(cfg)
    try:
        address = socket.getaddrinfo(cfg.host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(address[0], socket.SOCK_STREAM) as probe:
            probe.bind(address[4])
    except OSError as error:
        raise ValueError(f"--host {cfg.host} is no address of this machine ({error})") from error


def check_files(cfg: Config) -> None:
    """Refuse people and directions that are not there, and two people of one name.

    Raises:
        ValueError: naming the flag and the file.
    """
    for path in cfg.latents:
        if not path.is_file():
            raise ValueError(f"--latents {path} is no file")
    names = ["seed", *(path.stem for path in cfg.latents)]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"--latents: two heads would be called {twice[0]}: rename a file")
    if cfg.directions != DIRECTIONS_FILE and not cfg.directions.is_file():
        raise ValueError(f"--directions {cfg.directions} is no file: directions.py makes one")


if __name__ == "__main__":
    CFG = read_options(Config, __doc__, check)

import io
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from math import atan2, pi
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from harness.devices import pick_device
from harness.pictures import to_uint8
from harness.video import ending, save_video
from models.cameras import BEYOND
from models.generator import Generator
from models.mesh import extract_mesh, save_mesh
from render import depth_images, frames_of
from subjects import (
    DIRECTIONS,
    Codes,
    Subject,
    add_weights,
    edit,
    load_person,
    load_run,
    read_tensors,
    seed_to_person,
    show,
    warn_of_others,
    wide_codes,
)

if TYPE_CHECKING:
    import viser

SETTLED = 0.3  # Seconds without a change after which the whole picture is made.
FAR = 2.7  # Where the page's camera is at first; nearer is larger.
MOST_ZOOM = 3.0
RENDERING = threading.Lock()  # One picture at a time: torch's random numbers are one stream.


@dataclass(frozen=True)
class Stage:
    """What all visitors share."""

    cfg: Config
    source: Generator | None  # Before adaptation, if it is known.
    base: Generator  # What is shown without any mixing.
    names: tuple[str, ...]  # Of the runs that can be mixed.
    changes: tuple[dict[str, Tensor], ...]  # What each of them changed of the source.
    directions: tuple[str, ...]
    codes: Codes | None  # How the codes of heads vary, where there are directions.
    mesh: bytes  # With its texture, of a folder of avatar.py; else nothing.

    @classmethod
    def load(cls, cfg: Config) -> Stage:
        """Load generators and what runs changed.

        Raises:
            ValueError: one cannot be loaded, or runs have different sources.
        """
        device = pick_device(cfg.device)
        runs = [load_run(ckpt, device) for ckpt in cfg.ckpt]
        base, source, settings = runs[0]
        names, changes = [], []
        if len(runs) > 1 and source is None:
            raise ValueError(f"--ckpt {cfg.ckpt[0]}: without its source it cannot be mixed")
        for ckpt, (G, G_src, own) in zip(cfg.ckpt, runs, strict=True):
            if source is None:
                break
            if G_src is None or own["generator_weights"] != settings["generator_weights"]:
                raise ValueError(f"--ckpt {ckpt} started from another generator than {cfg.ckpt[0]}")
            before = dict(G_src.named_parameters())
            names.append(Path(ckpt).resolve().name)
            changes.append({n: p - before[n] for n, p in G.named_parameters()})
        directions: tuple[str, ...] = ()
        codes = None
        if cfg.directions.is_file():
            codes = wide_codes(base)
            moves = {name: 0.0 for name in read_tensors(cfg.directions, DIRECTIONS)[0]}
            # Refused now if it cannot.
            edit([seed_to_person(base, 0)], cfg.directions, moves, codes)
            directions = tuple(moves)
        warn_of_others([*cfg.latents, *([cfg.directions] if directions else [])], base)
        for path in cfg.latents:
            load_person(path, base)  # Refused now, not when somebody asks for it.
        first = Path(cfg.ckpt[0])
        glb = (first.parent if first.name == AVATAR else first) / "avatar.glb"
        mesh = glb.read_bytes() if glb.is_file() else b""
        return cls(cfg, source, base, tuple(names), tuple(changes), directions, codes, mesh)


class Visitor:
    """One page: its controls, and a thread that draws what they say."""

    def __init__(self, stage: Stage, client: viser.ClientHandle) -> None:
        """Add the controls to the page and begin to draw."""
        self.stage, self.client = stage, client
        self.changed, self.gone = threading.Event(), threading.Event()
        self.cast: tuple[tuple, list[Subject]] | None = None  # What was shown last, and its key.
        gui = client.gui
        self.who = gui.add_dropdown("head", ("seed", *(path.stem for path in stage.cfg.latents)))
        several = stage.base.z_dim > 0  # Else there is one head alone.
        self.seed = gui.add_slider("seed", 0, 999, 1, 0, visible=several)
        self.trunc = gui.add_slider("truncation", 0.0, 1.0, 0.05, 1.0, visible=several)
        self.shares = [
            gui.add_slider(name, 0.0, 1.5, 0.05, 1.0 if i == 0 else 0.0)
            for i, name in enumerate(stage.names)
        ]
        self.edits = {}
        for folder, opened in (("edit", True), ("components", False)):
            names = [x for x in stage.directions if (folder == "edit") != x.startswith("pc")]
            if names:
                with gui.add_folder(folder, expand_by_default=opened):
                    for name in names:
                        self.edits[name] = gui.add_slider(name, -3.0, 3.0, 0.1, 0.0)
        self.wipe = (
            gui.add_slider("source | adapted", 0.0, 1.0, 0.01, 0.0) if stage.source else None
        )
        self.turns = "image_depth" in stage.base.gives
        self.depth = gui.add_checkbox("depth", False) if self.turns else None
        self.solid = gui.add_checkbox("textured mesh", False) if stage.mesh else None
        if stage.mesh:
            self.solid.on_update(lambda _: self.show_mesh())
        for control in self.controls:
            control.on_update(lambda _: self.changed.set())
        client.camera.on_update(lambda _: self.changed.set())
        gui.add_button("still").on_click(lambda _: self.deliver(self.still))
        if self.turns:
            gui.add_button("video").on_click(lambda _: self.deliver(self.video))
            if importlib.util.find_spec("skimage"):
                gui.add_button("mesh").on_click(lambda _: self.deliver(self.mesh))
        self.changed.set()
        threading.Thread(target=self.draw_on, daemon=True).start()

    @property
    def controls(self) -> list[Any]:
        """What changes the picture."""
        always = [self.who, self.seed, self.trunc, *self.shares, *self.edits.values()]
        return always + [x for x in (self.wipe, self.depth, self.solid) if x is not None]

    def subjects(self) -> list[Subject]:
        """Return the head in the source, if there is one, and as it is mixed, ready to be seen."""
        outer = (self.wipe, self.depth, self.solid)  # They change no head.
        key = tuple(x.value for x in self.controls if x not in outer)
        if self.cast is None or self.cast[0] != key:
            self.cast = key, self.prepare()
        return self.cast[1]

    def prepare(self) -> list[Subject]:
        """Mix the runs, and find, edit and prepare the head."""
        stage, G = self.stage, self.stage.base
        shares = [x.value for x in self.shares]
        if shares and shares != [1.0, *[0.0] * (len(shares) - 1)]:
            G = stage.source
            for share, change in zip(shares, stage.changes, strict=True):
                G = add_weights(G, change, share) if share else G
        files = {path.stem: path for path in stage.cfg.latents}
        if self.who.value in files:
            person = load_person(files[self.who.value], G)
        else:
            person = seed_to_person(G, int(self.seed.value), self.trunc.value)
        moves = {name: x.value for name, x in self.edits.items() if x.value}
        if moves:
            (person,) = edit([person], stage.cfg.directions, moves, stage.codes)
        networks = [G] if stage.source is None else [stage.source, G]
        return [show(network, person).settled() for network in networks]

    def label(self) -> Tensor:
        """Return the label [1, 25] of the page's camera: as far to the side, as near."""
        G, camera = self.stage.base, self.client.camera
        x, y, z = np.asarray(camera.position) - np.asarray(camera.look_at)
        distance = max(float(np.linalg.norm([x, y, z])), 1e-3)
        yaw, pitch = atan2(x, z), -pi / 2 * float(y) / distance
        if not G.cameras.all_round:  # Nothing was learnt further away.
            yaw = np.clip(yaw, -BEYOND * G.cameras.yaw_range, BEYOND * G.cameras.yaw_range)
        pitch = np.clip(pitch, -BEYOND * G.cameras.pitch_range, BEYOND * G.cameras.pitch_range)
        c = G.cameras.label(torch.tensor([float(yaw)]), torch.tensor([float(pitch)]))
        if c.shape[1]:
            c[:, [16, 20]] *= min(max(FAR / distance, 1.0), MOST_ZOOM)
        return c

    def draw_on(self) -> None:
        """Draw whenever something changes: a rough picture at once, the whole one at rest."""
        rough = False
        while not self.gone.is_set():
            if self.changed.wait(SETTLED if rough else 1.0):
                self.changed.clear()
                rough = True
            elif not rough:
                continue
            else:
                rough = False
            with self.errors_shown():
                if self.solid and self.solid.value:  # The browser draws the mesh.
                    picture = Image.new("RGB", (64, 64), "white")
                else:
                    with RENDERING:
                        picture = self.picture(rough)
                self.client.scene.set_background_image(self.framed(picture), format="jpeg")

    def picture(self, rough: bool) -> Image.Image:
        """Return what the page shows: source and adapted on their sides of the wipe, or depth."""
        c, images = self.label(), []
        subjects = self.subjects()
        size = self.stage.base.img_resolution
        split = round(self.wipe.value * size) if self.wipe else 0
        for subject, needed in zip(reversed(subjects), (split < size, split > 0), strict=False):
            if not needed:
                images.append(torch.zeros(1, 3, size, size))
                continue
            options = {"superresolve": False} if rough and self.turns else {}
            seen = subject.see(c, **options)
            image = seen["image"] if "image" in seen else seen["image_raw"]
            if self.depth and self.depth.value:
                image = depth_images(seen["image_depth"], seen["mask"])
            images.append(F.interpolate(image, (size, size), mode="bilinear").cpu())
        adapted, *source = images
        if source:
            adapted = torch.cat([source[0][..., :split], adapted[..., split:]], dim=-1)
        return Image.fromarray(to_uint8(adapted)[0])

    def show_mesh(self) -> None:
        """Put the mesh of avatar.py into the page, or take it out again."""
        if self.solid.value:
            self.client.scene.add_glb("/mesh", self.stage.mesh)
        else:
            self.client.scene.remove_by_name("/mesh")

    def framed(self, picture: Image.Image) -> np.ndarray:
        """Put a square picture in the middle of a page as wide as the visitor's."""
        aspect = max(self.client.camera.aspect, 1.0)
        page = Image.new("RGB", (round(picture.height * aspect), picture.height), "white")
        page.paste(picture, ((page.width - picture.width) // 2, 0))
        return np.asarray(page)

    def deliver(self, make: Any) -> None:
        """Make a file and let the page download it."""
        note = self.client.add_notification("Wait", "The file is made.", loading=True)
        try:
            with self.errors_shown(), RENDERING:
                name, content = make()
                self.client.send_file_download(name, content, save_immediately=True)
        finally:
            note.remove()

    @contextmanager
    def errors_shown(self) -> Iterator[None]:
        """Tell the visitor of an error instead of ending their thread; the page goes on."""
        try:
            yield
        except ConnectionError:
            pass
        except Exception as error:
            with suppress(ConnectionError):
                self.client.add_notification("This did not work", str(error), color="red")

    def name(self) -> str:
        """Return how a file of this head begins."""
        return self.who.value if self.who.value != "seed" else f"seed{int(self.seed.value):04d}"

    def still(self) -> tuple[str, bytes]:
        """Return the whole picture as a PNG."""
        content = io.BytesIO()
        self.picture(rough=False).save(content, "PNG")
        return f"{self.name()}.png", content.getvalue()

    def video(self) -> tuple[str, bytes]:
        """Return a video of the head turning; of a run source and adapted side by side."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{self.name()}{ending()}"
            save_video(frames_of([self.subjects()], self.stage.cfg.frames), path)
            return path.name, path.read_bytes()

    def mesh(self) -> tuple[str, bytes]:
        """Return the mesh as .glb, or as .ply where trimesh is missing.

        Raises:
            ValueError: nothing is seen of the head.
        """
        subject = self.subjects()[-1]
        mesh = extract_mesh(subject.G, subject.ws, self.stage.cfg.voxels, subject.planes)
        if mesh is None:
            raise ValueError("there is nothing to see")
        kind = "glb" if importlib.util.find_spec("trimesh") else "ply"
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{self.name()}.{kind}"
            save_mesh(mesh, path)
            return path.name, path.read_bytes()


def serve(cfg: Config) -> viser.ViserServer:
    """Open the page and return its server, which serves until it is stopped.

    Raises:
        ValueError: an option cannot be used.
    """
    check(cfg)
    import viser

    stage = Stage.load(cfg)
    with redirect_stdout(io.StringIO()):  # Which the address alone is enough for.
        server = viser.ViserServer(host=cfg.host, port=cfg.port, label="GCA-3D", verbose=False)
    server.gui.configure_theme(show_logo=False, show_share_button=False)
    server.gui.main_panel.dock_right()
    server.scene.set_up_direction("+y")
    server.initial_camera.up = (0.0, 1.0, 0.0)
    server.initial_camera.look_at = (0.0, 0.0, 0.0)
    server.initial_camera.position = (0.0, 0.0, FAR)
    if stage.mesh:  # Which then has the size of the generator's picture.
        server.initial_camera.fov = 2 * atan2(0.5, stage.base.cameras.focal)
    visitors: dict[int, Visitor] = {}

    @server.on_client_connect
    def _(client: viser.ClientHandle) -> None:
        visitors[client.client_id] = Visitor(stage, client)

    @server.on_client_disconnect
    def _(client: viser.ClientHandle) -> None:
        visitors.pop(client.client_id).gone.set()

    return server


def main(cfg: Config) -> None:
    """Serve the page until Ctrl+C.

    Raises:
        ValueError: an option cannot be used.
    """
    server = serve(cfg)
    print(f"http://{cfg.host}:{server.get_port()}  (Ctrl+C ends it)", flush=True)
    while True:
        time.sleep(1)


if __name__ == "__main__":
    with exit_codes():
        main(CFG)
