"""The page: what its controls change, what its buttons deliver, and that visitors are apart."""

import io
import shutil
import socket
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_rosinality import small_generator as flat_generator
from tiny_run import build_generator, hurry, run, world

import subjects
import view
from files.generators import load_generator, save_generator
from harness.pictures import to_uint8
from view import Config


class Control:
    """Stands for a slider, a box or a button."""

    def __init__(self, value=None):
        self.value, self.change = value, None

    def on_update(self, change):
        self.change = change

    on_click = on_update

    def set(self, value):
        self.value = value
        self.change(None)


class Gui:
    """Stands for the controls of one page, by their label."""

    def __init__(self):
        self.of = {}

    def add(self, label, *values, **_):
        return self.of.setdefault(label, Control(values[-1] if values else None))

    add_slider = add_checkbox = add_button = add

    def add_dropdown(self, label, options):
        self.options = options
        return self.add(label, options[0])

    @contextmanager
    def add_folder(self, label, **_):
        yield


class Client:
    """Stands for one page."""

    def __init__(self):
        self.gui, self.shown, self.files = Gui(), [], []
        self.camera = SimpleNamespace(
            position=np.array([0.0, 0.0, view.FAR]),
            look_at=np.zeros(3),
            aspect=1.5,
            on_update=lambda change: None,
        )
        self.scene = SimpleNamespace(set_background_image=self.show)

    def show(self, image, format):
        self.shown.append(image)

    def add_notification(self, *_, **__):
        return SimpleNamespace(remove=lambda: None)

    def send_file_download(self, name, content, **_):
        self.files.append((name, content))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as monkeypatch:
        hurry(monkeypatch)
        for name, seed in (("a", 0), ("b", 1)):
            run(folder / name, steps=2, lr=0.05, seed=seed)
    return folder


@pytest.fixture
def visit(monkeypatch):
    """Return a function that opens a page without the thread that draws."""
    monkeypatch.setattr(view.Visitor, "draw_on", lambda self: None)

    def opened(**options):
        stage = view.Stage.load(Config(**{"device": "cpu"} | options))
        return view.Visitor(stage, Client())

    return opened


def pixels(visitor):
    return np.asarray(visitor.picture(rough=False)).astype(int)


def seen(G, seed, yaw=0.0, pitch=0.0):
    c = G.cameras.label(torch.tensor([yaw]), torch.tensor([pitch]))
    return to_uint8(subjects.seed_to_subject(G, seed).see(c)["image"])[0].astype(int)


def test_the_page_shows_the_run_and_the_wipe_its_source(visit, runs):
    visitor = visit(ckpt=(str(runs / "a"),))
    G, G_src = load_generator(runs / "a"), build_generator()
    assert np.abs(pixels(visitor) - seen(G, 0)).max() <= 1
    visitor.client.gui.of["source | adapted"].set(1.0)
    assert visitor.changed.is_set() and np.abs(pixels(visitor) - seen(G_src, 0)).max() <= 1
    visitor.client.gui.of["source | adapted"].set(0.5)
    both = pixels(visitor)
    assert np.abs(both[:, :16] - seen(G_src, 0)[:, :16]).max() <= 1
    assert np.abs(both[:, 16:] - seen(G, 0)[:, 16:]).max() <= 1
    visitor.client.gui.of["seed"].set(7)
    visitor.client.gui.of["source | adapted"].set(0.0)
    assert np.abs(pixels(visitor) - seen(G, 7)).max() <= 1


def test_the_head_turns_with_the_pages_camera(visit, runs):
    visitor = visit(ckpt=(str(runs / "a"),))
    camera, G = visitor.client.camera, load_generator(runs / "a")
    eye = G.cameras.label(torch.tensor([0.2]), torch.tensor([-0.1]))[0, 3:12:4]
    camera.position = eye.double().numpy() / eye.norm().item() * view.FAR
    assert np.abs(pixels(visitor) - seen(G, 0, 0.2, -0.1)).max() <= 2
    before = visitor.label()
    camera.position = camera.position / 2
    assert visitor.label()[0, 16] == pytest.approx(2 * before[0, 16].item(), rel=1e-3)
    camera.position = np.array([-view.FAR, 0.0, -0.1])  # From where nothing was learnt.
    assert np.arctan2(*visitor.label()[0, 3:12:8].tolist()) > -1.0


def test_runs_are_mixed_by_their_sliders(visit, runs):
    visitor = visit(ckpt=(str(runs / "a"), str(runs / "b")))
    controls, b = visitor.client.gui.of, load_generator(runs / "b")
    assert np.abs(pixels(visitor) - seen(load_generator(runs / "a"), 0)).max() <= 1
    controls["a"].set(0.0)
    assert np.abs(pixels(visitor) - seen(build_generator(), 0)).max() <= 1
    controls["b"].set(1.0)
    assert np.abs(pixels(visitor) - seen(b, 0)).max() <= 1


def test_runs_of_other_sources_are_refused(visit, runs, tmp_path):
    save_generator(build_generator(seed=3), tmp_path / "other.safetensors")
    with pytest.MonkeyPatch.context() as monkeypatch:
        hurry(monkeypatch)
        run(tmp_path / "c", steps=1, generator=str(tmp_path / "other.safetensors"))
    with pytest.raises(ValueError, match="started from another generator"):
        visit(ckpt=(str(runs / "a"), str(tmp_path / "c")))
    with pytest.raises(ValueError, match="several are mixed, which needs run folders"):
        view.check(Config(ckpt=(str(runs / "a"), str(world() / "generator.safetensors"))))


def test_people_and_edits_are_offered(visit, runs, tmp_path):
    G = load_generator(runs / "a")
    person = subjects.seed_to_person(G, 11)
    subjects.save_person(person, tmp_path / "me.safetensors")
    direction = torch.randn(16)
    subjects.save_directions({"hair": direction}, tmp_path / "d.safetensors")
    visitor = visit(
        ckpt=(str(runs / "a"),),
        latents=(tmp_path / "me.safetensors",),
        directions=tmp_path / "d.safetensors",
    )
    gui = visitor.client.gui
    assert gui.options == ("seed", "me")
    gui.of["head"].set("me")
    c = G.cameras.frontal()
    torch.manual_seed(0)
    expected = to_uint8(G.synthesis(person.ws, c)["image"])[0].astype(int)
    assert np.abs(pixels(visitor) - expected).max() <= 1
    gui.of["hair"].set(2.0)
    moved = subjects.wide_codes(G).draw_near(person.ws + 2 * direction, person.ws)
    torch.manual_seed(0)
    expected = to_uint8(G.synthesis(moved, c)["image"])[0].astype(int)
    assert np.abs(pixels(visitor) - expected).max() <= 1


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"ckpt": ()}, "--ckpt needs a run"),
        ({"latents": ("a/me.safetensors", "b/me.safetensors")}, "two heads would be called me"),
        ({"latents": ("a/seed.safetensors",)}, "two heads would be called seed"),
        ({"directions": "nowhere.safetensors"}, "nowhere.safetensors is no file: directions.py"),
        ({"host": "192.0.2.7"}, "--host 192.0.2.7 is no address of this machine"),
        ({"host": "no such host"}, "--host no such host is no address of this machine"),
    ],
)
def test_what_the_page_cannot_do_is_refused(runs, tmp_path, options, reason):
    options = {"ckpt": (str(runs / "a"),), **options}
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for name in ("me", "seed"):
            (tmp_path / folder / f"{name}.safetensors").touch()
    for name in ("latents", "directions"):
        given = options.get(name, ())
        paths = [tmp_path / path for path in ([given] if isinstance(given, str) else given)]
        if paths:
            options[name] = paths[0] if name == "directions" else tuple(paths)
    with pytest.raises(ValueError, match=reason):
        view.check(Config(**options))


def test_directions_of_another_generator_are_refused_before_the_page_opens(visit, runs, tmp_path):
    subjects.save_directions({"hair": torch.ones(9)}, tmp_path / "d.safetensors")
    with pytest.raises(ValueError, match="fits another generator"):
        visit(ckpt=(str(runs / "a"),), directions=tmp_path / "d.safetensors")


def test_an_error_is_shown_and_the_page_goes_on(visit, runs, monkeypatch):
    visitor = visit(ckpt=(str(runs / "a"),))
    notes = []
    monkeypatch.setattr(visitor.client, "add_notification", notes_into(notes))
    with pytest.MonkeyPatch.context() as broken:
        broken.setattr(visitor, "still", lambda: 1 / 0)
        visitor.deliver(visitor.still)
    assert notes[-1] == ("This did not work", "division by zero") and not visitor.client.files
    with visitor.errors_shown():
        raise ConnectionError("gone")
    assert len(notes) == 2
    visitor.deliver(visitor.still)
    assert len(visitor.client.files) == 1


def notes_into(notes):
    """Return what stands for `add_notification`."""

    def add(title, body, **_):
        notes.append((title, body))
        return SimpleNamespace(remove=lambda: None)

    return add


def test_buttons_deliver_files(visit, runs):
    visitor = visit(ckpt=(str(runs / "a"),), frames=3, voxels=24)
    for button in ("still", "video", "mesh"):
        visitor.client.gui.of[button].change(None)
    (still, picture), (video, _), (mesh, content) = visitor.client.files
    assert (still, video.partition(".")[0]) == ("seed0000.png", "seed0000")
    with Image.open(io.BytesIO(picture)) as image:
        assert np.array_equal(np.asarray(image), pixels(visitor))
    assert mesh.startswith("seed0000.") and len(content) > 100


def test_a_head_is_prepared_once_however_it_is_turned(visit, runs, monkeypatch):
    visitor = visit(ckpt=(str(runs / "a"),))
    prepared = []
    prepare = visitor.prepare
    monkeypatch.setattr(visitor, "prepare", lambda: prepared.append(1) or prepare())
    for x in (0.0, 0.3, 0.6):
        visitor.client.camera.position = np.array([x, 0.0, view.FAR])
        visitor.picture(rough=True)
    visitor.client.gui.of["depth"].set(True)
    visitor.picture(rough=False)
    assert len(prepared) == 1


def test_visitors_do_not_disturb_each_other(runs):
    G = load_generator(runs / "a")
    expected = [seen(G, seed) for seed in (0, 5)]
    stage = view.Stage.load(Config(ckpt=(str(runs / "a"),), device="cpu"))
    visitors = [view.Visitor(stage, Client()) for _ in range(2)]
    visitors[1].client.gui.of["seed"].set(5)
    until = time.time() + 20
    while time.time() < until and not all(
        visitor.client.shown and matches(visitor.client.shown[-1], picture)
        for visitor, picture in zip(visitors, expected, strict=True)
    ):
        time.sleep(0.1)
    for visitor, picture in zip(visitors, expected, strict=True):
        assert matches(visitor.client.shown[-1], picture)
        assert visitor.client.shown[-1].shape == (32, 48, 3)  # As wide as the page.
        visitor.gone.set()
    assert threading.active_count() < 50


def matches(page, picture):
    """Return whether a picture stands in the middle of a page."""
    return np.abs(page[:, 8:40].astype(int) - picture).max() <= 1


def test_pictures_without_cameras_have_a_page(visit, tmp_path):
    save_generator(flat_generator(), tmp_path / "flat.safetensors")
    visitor = visit(ckpt=(str(tmp_path / "flat.safetensors"),))
    assert {"video", "mesh", "depth"}.isdisjoint(visitor.client.gui.of)
    first = pixels(visitor)
    visitor.client.gui.of["seed"].set(3)
    assert np.abs(pixels(visitor) - first).max() > 3


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium")
def test_the_page_works_in_a_browser(runs, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api")
    pytest.importorskip("viser")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = view.serve(Config(ckpt=(str(runs / "a"),), port=port, device="cpu"))
    flags = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
    try:
        with playwright.sync_playwright() as tools:
            browser = tools.chromium.launch(executable_path=shutil.which("chromium"), args=flags)
            page = browser.new_page(viewport={"width": 1000, "height": 600})
            page.goto(f"http://127.0.0.1:{port}")
            page.get_by_text("still").wait_for(timeout=60_000)
            page.wait_for_timeout(4000)
            before = canvas(page)
            field = page.locator("input[type=text]").nth(0)  # The seed, beside its slider.
            field.fill("7")
            field.press("Enter")
            page.wait_for_timeout(3000)
            assert np.abs(canvas(page) - before).mean() > 2
            with page.expect_download(timeout=30_000) as download:
                page.get_by_text("still").click()
            assert download.value.suggested_filename == "seed0007.png"
            download.value.save_as(tmp_path / "still.png")
            browser.close()
    finally:
        server.stop()
    with Image.open(tmp_path / "still.png") as still:
        assert np.abs(np.asarray(still).astype(int) - seen(load_generator(runs / "a"), 7)).max() < 2


def canvas(page):
    """Return what stands left of the controls."""
    with Image.open(io.BytesIO(page.screenshot())) as image:
        return np.asarray(image.convert("RGB").crop((0, 150, 650, 600))).astype(int)
