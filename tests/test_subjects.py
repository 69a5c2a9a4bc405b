"""Subjects: people that every generator of one source shows, mixtures of runs, edits, files."""

import copy
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from test_rosinality import small_generator as flat_generator
from tiny_run import build_generator, change_settings, world

import subjects
from files.generators import load_generator, save_generator
from models.fingerprints import fingerprint_generator, fingerprint_mapping
from models.panohead import PanoHeadGenerator
from subjects import Person, add_weights, blend, load_mixture, load_person, save_person

CONV = "backbone.synthesis.b4.conv1.weight"  # Of shapes.
RGB = "decoder.net.2.bias"  # Of colours, and of density.


def offsets_of(G, *names, seed=0):
    draw = torch.Generator().manual_seed(seed)
    shapes = {name: G.get_parameter(name).shape for name in names}
    return {name: 0.1 * torch.randn(shape, generator=draw) for name, shape in shapes.items()}


def weights(G):
    return {name: weight.clone() for name, weight in G.state_dict().items()}


def assert_same(one, other, **bounds):
    """Compare two generators, all weights and buffers."""
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    for name, weight in one.items():
        torch.testing.assert_close(weight, other[name], msg=name, **bounds or {})


# Seeds, people and subjects.


def test_a_seed_is_the_same_person_in_every_generator_that_shares_the_mapping():
    G, adapted = build_generator(), build_generator()
    adapted.get_parameter(CONV).data += 1
    person = subjects.seed_to_person(G, 7, 0.5)
    assert (person.name, person.seed, person.c, person.offsets) == ("seed0007", 7, None, {})
    z = torch.from_numpy(np.random.RandomState(7).randn(1, G.z_dim)).float()
    assert torch.equal(person.ws, G.mapping(z, G.cameras.frontal(), truncation_psi=0.5))
    assert torch.equal(person.ws, subjects.seed_to_person(adapted, 7, 0.5).ws)
    subject = subjects.seed_to_subject(G, 7, 0.5)
    assert (subject.G, subject.seed, subject.planes) == (G, 7, None)
    assert torch.equal(subject.ws, person.ws)


def test_a_subject_looks_the_same_whenever_it_is_seen():
    G = build_generator()
    c = G.cameras.frontal()
    first = subjects.seed_to_subject(G, 3).see(c)
    torch.rand(5)
    again = subjects.seed_to_subject(G, 3).settled().see(c)
    assert all(torch.equal(first[name], again[name]) for name in first)
    other = subjects.Subject(G, subjects.seed_to_ws(G, 3), seed=4).see(c)
    assert not torch.equal(first["image_raw"], other["image_raw"])  # The jitter is another.


def test_settled_planes_are_made_once_and_only_where_there_are_any(monkeypatch):
    G, passes = build_generator(), []
    planes = G.planes
    monkeypatch.setattr(G, "planes", lambda ws, *a, **k: passes.append(1) or planes(ws, *a, **k))
    subject = subjects.seed_to_subject(G, 0).settled()
    for _ in range(3):
        subject.see(G.cameras.frontal())
    assert passes == [1] and torch.equal(subject.planes, planes(subject.ws))
    flat = subjects.seed_to_subject(flat_generator(), 0)
    assert flat.settled().planes is None
    c = flat.G.cameras.label(torch.zeros(2), torch.zeros(2))
    assert flat.settled().see(c)["image"].shape == (2, 3, 32, 32)


def test_a_person_is_shown_with_their_own_tuning():
    G = build_generator()
    plain = subjects.seed_to_person(G, 3)
    tuned = Person("me", plain.ws, 3, offsets=offsets_of(G, CONV, RGB))
    c = G.cameras.frontal()
    assert subjects.show(G, plain).G is G
    shown = subjects.show(G, tuned)
    for name in (CONV, RGB):
        wanted = G.get_parameter(name) + tuned.offsets[name]
        torch.testing.assert_close(shown.G.get_parameter(name), wanted)
    assert not torch.equal(shown.see(c)["image"], subjects.show(G, plain).see(c)["image"])


# Weights that are added.


def test_added_weights_leave_the_original_as_it_was():
    G = build_generator()
    before, offsets = weights(G), offsets_of(G, CONV, RGB)
    found = add_weights(G, offsets, -2.0)
    assert all(torch.equal(weight, before[name]) for name, weight in G.state_dict().items())
    for name, weight in found.state_dict().items():
        wanted = before[name] - 2 * offsets[name] if name in offsets else before[name]
        torch.testing.assert_close(weight, wanted)
        assert weight.numel() == 0 or weight.data_ptr() != G.state_dict()[name].data_ptr(), name
    assert found.init_kwargs == G.init_kwargs and found.rendering_kwargs == G.rendering_kwargs


def test_weights_of_other_names_and_shapes_are_left_out():
    G = build_generator()
    shape = G.get_parameter(CONV).shape
    strange = {
        "backbone.synthesis.b9999.weight": torch.ones(3),
        CONV: torch.ones(shape[1:]),  # It would fit by broadcasting.
        RGB: torch.ones(1),
        "backbone.mapping.w_avg": torch.ones(G.w_dim),  # A buffer.
    }
    assert add_weights(G, strange) is G
    found = add_weights(G, strange | {CONV: torch.ones(shape)})
    changed = {n for n, w in found.state_dict().items() if not torch.equal(w, G.state_dict()[n])}
    assert changed == {CONV}


# Blends.


def test_a_blend_is_linear_in_codes_and_tuning():
    G = build_generator()
    a, b = (subjects.seed_to_person(G, seed) for seed in (1, 2))
    a = Person("a", a.ws, 1, offsets=offsets_of(G, CONV, RGB, seed=1))
    b = Person("b", b.ws, 2, offsets=offsets_of(G, CONV, seed=2))
    mean = blend([a, b], [0.25, 1.5])
    torch.testing.assert_close(mean.ws, 0.25 * a.ws + 1.5 * b.ws)
    assert mean.offsets.keys() == {CONV, RGB}
    torch.testing.assert_close(mean.offsets[CONV], 0.25 * a.offsets[CONV] + 1.5 * b.offsets[CONV])
    torch.testing.assert_close(mean.offsets[RGB], 0.25 * a.offsets[RGB])
    shown = subjects.show(G, mean).G.get_parameter(RGB)
    torch.testing.assert_close(shown, G.get_parameter(RGB) + 0.25 * a.offsets[RGB])


def test_a_blend_of_one_person_is_that_person():
    G = build_generator()
    a = Person("a", subjects.seed_to_ws(G, 1), 1, offsets=offsets_of(G, CONV))
    b = subjects.seed_to_person(G, 2)
    for found in (blend([a], [1.0]), blend([a, b], [1.0, 0.0]), blend([a, a], [0.5, 0.5])):
        torch.testing.assert_close(found.ws, a.ws)
        torch.testing.assert_close(found.offsets[CONV], a.offsets[CONV])


def test_every_person_of_a_blend_has_a_share():
    person = subjects.seed_to_person(build_generator(), 1)
    with pytest.raises(ValueError):
        blend([person, person], [1.0])


# Mixtures of runs.


@pytest.fixture(scope="module")
def runs(finished, tmp_path_factory):
    """Two runs from one source that changed much: every weight, and the fine ones twice."""
    folder = tmp_path_factory.mktemp("runs")
    for seed, name in enumerate("ab"):
        shutil.copytree(finished, folder / name)
        G = load_generator(world() / "generator.safetensors")
        torch.manual_seed(seed)
        for parameter in G.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        save_generator(G, folder / name / "generator.safetensors")
    return folder


@pytest.fixture(scope="module")
def source():
    return load_generator(world() / "generator.safetensors")


def test_a_mixture_of_one_run_is_that_run(runs, source):
    G = load_generator(runs / "a")
    assert not torch.equal(G.get_parameter(CONV), source.get_parameter(CONV))
    G_mix, G_src = load_mixture([(str(runs / "a"), 1.0, "all")])
    assert_same(G_mix, G, rtol=1e-5, atol=1e-6)
    assert_same(G_src, source, rtol=0, atol=0)
    halves, _ = load_mixture([(str(runs / "a"), 0.5, "all")] * 2)
    assert_same(halves, G, rtol=1e-5, atol=1e-6)


def test_a_mixture_without_a_share_is_the_source(runs, source):
    for mix in ([(str(runs / "a"), 0.0, "all")], [(str(runs / "b"), 0.0, "shape")] * 2):
        assert_same(load_mixture(mix)[0], source, rtol=0, atol=0)


def test_a_mixture_adds_what_each_run_changed(runs, source):
    a, b = (load_generator(runs / name) for name in "ab")
    G_mix, _ = load_mixture([(str(runs / "a"), 0.25, "all"), (str(runs / "b"), -2.0, "all")])
    for name, weight in source.named_parameters():
        wanted = weight + 0.25 * (a.get_parameter(name) - weight)
        wanted -= 2 * (b.get_parameter(name) - weight)
        torch.testing.assert_close(G_mix.get_parameter(name), wanted, rtol=1e-5, atol=1e-5)


def test_shape_and_colour_of_a_run_are_all_of_it(runs):
    both = [(str(runs / "a"), 1.0, part) for part in ("colour", "shape")]
    assert_same(load_mixture(both)[0], load_generator(runs / "a"), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("part", ["shape", "colour"])
def test_a_part_of_a_run_leaves_the_other_part_to_the_source(runs, source, part):
    G = load_generator(runs / "a")
    G_mix, _ = load_mixture([(str(runs / "a"), 1.0, part)])
    taken = set()
    for name, weight in G_mix.named_parameters():
        if torch.equal(weight, source.get_parameter(name)):
            assert not torch.equal(weight, G.get_parameter(name)), name
        else:
            torch.testing.assert_close(weight, G.get_parameter(name), rtol=1e-5, atol=1e-6)
            taken.add(name)
    assert (CONV in taken) == (part == "shape") and (RGB in taken) == (part == "colour")


def test_every_weight_of_every_base_is_of_one_part():
    keys = json.loads((Path(__file__).parent / "data/keys_panohead_tiny.json").read_text())
    for G in (build_generator(), flat_generator(), PanoHeadGenerator(**keys["init_kwargs"])):
        for name, _ in G.named_parameters():
            shape, colour = (bool(re.match(subjects.PARTS[p], name)) for p in ("shape", "colour"))
            assert shape != colour and re.match(subjects.PARTS["all"], name), name
            size = re.search(r"synthesis\.b(\d+)\.", name)
            assert shape == bool(size and int(size[1]) <= 32), name


def refusal(function, *arguments):
    """Return what a call is refused with, one line."""
    with pytest.raises(ValueError) as refused:
        function(*arguments)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_runs_of_other_sources_are_refused(runs, tmp_path):
    other = build_generator(seed=1)
    save_generator(other, tmp_path / "g.safetensors")
    shutil.copytree(runs / "b", tmp_path / "run")
    changes = {"generator": str(tmp_path / "g.safetensors")}
    change_settings(tmp_path / "run", **changes, generator_weights=fingerprint_generator(other))
    mix = [(str(runs / "a"), 0.5, "all"), (str(tmp_path / "run"), 0.5, "all")]
    reason = refusal(load_mixture, mix)
    assert f"--mix {tmp_path / 'run'} started from another generator than {runs / 'a'}" in reason
    load_mixture(mix[1:])  # Alone it can be shown.


@pytest.mark.parametrize("case", ["gone", "changed", "file"])
def test_what_has_no_source_cannot_be_mixed(runs, tmp_path, case, capsys):
    shutil.copytree(runs / "b", tmp_path / "run")
    path = tmp_path / "run"
    if case == "gone":
        change_settings(path, generator=str(tmp_path / "nowhere.safetensors"))
    if case == "changed":
        change_settings(path, generator_weights="crc32 00000000")
    if case == "file":
        path = world() / "generator.safetensors"
    reason = refusal(load_mixture, [(str(runs / "a"), 1.0, "all"), (str(path), 1.0, "all")])
    assert f"--mix {path} is no run of train.py, or its source is gone" in reason
    assert ("warning: no source" in capsys.readouterr().err) == (case != "file")


# Files of people.


@pytest.fixture
def me():
    G = build_generator()
    ws = subjects.seed_to_ws(G, 5) + 0.1 * torch.randn(1, G.backbone.num_ws, G.w_dim)
    c = G.cameras.label(torch.tensor([0.3]), torch.tensor([-0.1]))
    return Person("me", ws, 0, c, offsets_of(G, CONV, RGB))


def test_a_person_that_was_saved_is_brought_back_whole(tmp_path, me):
    G = build_generator()
    save_person(me, tmp_path / "photo.me.safetensors", source="generator.safetensors")
    found = load_person(tmp_path / "photo.me.safetensors", G)
    assert (found.name, found.seed) == ("photo.me", 0)
    assert torch.equal(found.ws, me.ws) and torch.equal(found.c, me.c)
    assert found.offsets.keys() == me.offsets.keys()
    for name, offset in found.offsets.items():
        assert offset.dtype == torch.float32
        torch.testing.assert_close(
            offset, me.offsets[name], rtol=1e-3, atol=1e-6
        )  # Stored in half.
    tensors, header = subjects.read_tensors(tmp_path / "photo.me.safetensors", subjects.LATENTS)
    assert header["source"] == "generator.safetensors"
    assert {x.dtype for name, x in tensors.items() if name.startswith("offsets.")} == {torch.half}


def test_a_person_of_no_photo_has_no_camera_and_no_tuning(tmp_path):
    G = flat_generator()
    person = subjects.seed_to_person(G, 5)
    save_person(person, tmp_path / "x.safetensors")
    found = load_person(tmp_path / "x.safetensors", G)
    assert torch.equal(found.ws, person.ws) and found.c is None and found.offsets == {}


def spoil(path, case, me):
    """Write a file that is no person of the tiny generator."""
    save_person(me, path)
    content = path.read_bytes()
    ws = me.ws
    given = {
        "text": b"no tensors",
        "empty": b"",
        "cut": content[: len(content) // 2],
        "header": content[:40],
        "no format": safetensors.torch.save({"ws": ws}),
        "other format": safetensors.torch.save({"ws": ws}, {"format": subjects.DIRECTIONS}),
        "generator": (world() / "generator.safetensors").read_bytes(),
        "no codes": safetensors.torch.save({"c": ws}, {"format": subjects.LATENTS}),
        "nan": safetensors.torch.save({"ws": ws * torch.nan}, {"format": subjects.LATENTS}),
        "more codes": safetensors.torch.save(
            {"ws": ws.repeat(1, 2, 1)}, {"format": subjects.LATENTS}
        ),
        "wider": safetensors.torch.save({"ws": ws.repeat(1, 1, 2)}, {"format": subjects.LATENTS}),
        "two": safetensors.torch.save({"ws": ws.repeat(2, 1, 1)}, {"format": subjects.LATENTS}),
        "flat": safetensors.torch.save({"ws": ws[0]}, {"format": subjects.LATENTS}),
    }
    path.write_bytes(given[case])


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        *((case, "cannot be read") for case in ("text", "empty", "cut", "header")),
        *((case, "holds no latents") for case in ("no format", "other format", "generator")),
        ("nan", "is damaged: its numbers are not finite"),
        ("no codes", r"has codes None, this generator \[1, "),
        ("more codes", r"has codes \[1, \d+, 16\], this generator \[1, \d+, 16\]"),
        ("wider", r"has codes \[1, \d+, 32\], this generator \[1, \d+, 16\]"),
        ("two", r"has codes \[2, "),
        ("flat", r"has codes \[\d+, 16\]"),
    ],
)
def test_what_is_no_person_is_refused_in_one_line(tmp_path, me, case, reason):
    path = tmp_path / "me.safetensors"
    spoil(path, case, me)
    assert re.search(f"{path} {reason}", refusal(load_person, path, build_generator()))


def test_a_person_who_is_nowhere_is_refused_in_one_line(tmp_path):
    for path in (tmp_path / "nowhere.safetensors", tmp_path):
        assert f"{path} cannot be read" in refusal(load_person, path, build_generator())


# Edits.


@pytest.fixture
def directions(tmp_path):
    G = build_generator()
    torch.manual_seed(0)
    made = {"hair": torch.randn(G.w_dim), "fine": torch.randn(G.backbone.num_ws, G.w_dim)}
    subjects.save_directions(made, tmp_path / "d.safetensors", generator="g")
    return tmp_path / "d.safetensors", made


def test_edits_add_multiples_of_directions(directions, me):
    path, made = directions
    other = subjects.seed_to_person(build_generator(), 8)
    edits = {"hair": 2.5, "fine": -1.0}
    found = subjects.edit([me, other], path, edits, None)
    for before, after in zip([me, other], found, strict=True):
        torch.testing.assert_close(after.ws, before.ws + 2.5 * made["hair"] - made["fine"])
        assert (after.name, after.seed) == (before.name, before.seed)
        assert after.c is before.c and after.offsets is before.offsets
    (alone,) = subjects.edit([other], path, {"hair": -3.0}, None)
    torch.testing.assert_close(alone.ws - other.ws, -3 * made["hair"].expand_as(other.ws))
    (same,) = subjects.edit([other], path, {"hair": 0.0}, None)
    assert torch.equal(same.ws, other.ws)


def test_an_edit_leaves_heads_as_near_to_the_mean_as_they_were(directions, me):
    G, (path, _) = build_generator(), directions
    codes = subjects.wide_codes(G)
    w = subjects.draw_codes(G, 4000, 0)
    torch.testing.assert_close(
        codes.deviations(w).std(0), torch.ones(len(codes.axes)), rtol=2e-3, atol=0
    )
    widest = codes.axes.norm(dim=1)
    assert widest.min() > subjects.NARROW * widest[0] and len(codes.axes) > 1

    def near(person):
        return codes.deviations(person.ws).norm(dim=-1)  # [1, num_ws]

    usual = len(codes.axes) ** 0.5
    people = [subjects.seed_to_person(G, seed) for seed in range(4)]
    for amount in (5.0, -5.0):
        edits = {"hair": amount}
        for before, moved, plain in zip(
            people,
            subjects.edit(people, path, edits, codes),
            subjects.edit(people, path, edits, None),
            strict=True,
        ):
            limit = near(before).clamp_min(usual)
            torch.testing.assert_close(near(moved), torch.minimum(near(plain), limit))
            along = torch.cosine_similarity(
                *(codes.deviations(x.ws) for x in (moved, plain)), dim=-1
            )
            torch.testing.assert_close(along, torch.ones_like(along))
            across = [x.ws - codes.deviations(x.ws) @ codes.axes for x in (moved, plain)]
            torch.testing.assert_close(*across, atol=1e-5, rtol=1e-5)
    mean = replace(people[0], ws=codes.mean.expand_as(people[0].ws))
    small = {
        "hair": 0.2 * usual / codes.deviations(codes.mean + directions[1]["hair"]).norm().item()
    }
    moved, plain = (subjects.edit([mean], path, small, x)[0].ws for x in (codes, None))
    torch.testing.assert_close(moved, plain)  # Not undone.
    (same,) = subjects.edit([me], path, {"hair": 0.0}, codes)
    assert torch.equal(same.ws, me.ws)


def test_an_unknown_direction_is_refused_and_the_known_ones_are_named(directions, me):
    path, _ = directions
    assert refusal(subjects.edit, [me], path, {"hair": 1.0, "nose": 1.0}, None) == (
        f"--edit nose: {path} has fine, hair"
    )


def test_directions_of_another_generator_are_refused(tmp_path, me):
    count, width = me.ws.shape[1:]
    wrong = {
        "narrow": torch.ones(width - 1),
        "one": torch.ones(1),
        "number": torch.tensor(1.0),
        "few": torch.ones(count - 1, width),
        "turned": torch.ones(width, count),
        "batch": torch.ones(1, count, width),
    }
    path = tmp_path / "d.safetensors"
    subjects.save_directions(wrong | {"right": torch.ones(width)}, path)
    for name in wrong:
        reason = f"--directions {path} fits another generator"
        assert refusal(subjects.edit, [me], path, {name: 1.0}, None).startswith(reason), name
        both = {"right": 1.0, name: 1.0}
        assert refusal(subjects.edit, [me], path, both, None).startswith(reason), name
    subjects.edit([me], path, {"right": 1.0}, None)


def test_people_and_directions_of_another_generator_bring_a_warning(finished, tmp_path, me, capsys):
    G, other = build_generator(), build_generator(seed=4)
    own = fingerprint_mapping(G)
    assert own != fingerprint_mapping(other)
    rounded = copy.deepcopy(G).half().float()  # As convert.py --half writes it.
    adapted = load_generator(finished)
    assert own == fingerprint_mapping(rounded) == fingerprint_mapping(adapted)
    assert fingerprint_generator(G) != fingerprint_generator(adapted)
    paths = [tmp_path / name for name in ("me.safetensors", "d.safetensors", "old.safetensors")]
    subjects.save_person(me, paths[0], mapping_weights=own)
    subjects.save_directions({"hair": torch.ones(16)}, paths[1], mapping_weights=own)
    subjects.save_person(me, paths[2])  # Of a version that did not note it.
    subjects.warn_of_others(paths, adapted)
    assert not capsys.readouterr().err
    subjects.warn_of_others(paths, other)
    assert capsys.readouterr().err.splitlines() == [
        f"warning: {path} was made with another generator" for path in paths[:2]
    ]


def test_networks_of_the_puppets_are_warned_of_elsewhere(capsys):
    G = build_generator()
    subjects.warn_of_puppets("--clip", G)
    assert not capsys.readouterr().err
    G.img_resolution = 512
    subjects.warn_of_puppets("--clip", G)
    assert capsys.readouterr().err.startswith("warning: --clip is the one of the puppets")


@pytest.mark.parametrize("case", ["person", "text", "nowhere"])
def test_what_holds_no_directions_is_refused_in_one_line(tmp_path, me, case):
    path = tmp_path / "d.safetensors"
    if case == "person":
        save_person(me, path)
    if case == "text":
        path.write_text("no tensors")
    reason = "holds no directions" if case == "person" else "cannot be read"
    assert f"{path} {reason}" in refusal(subjects.edit, [me], path, {"hair": 1.0}, None)
