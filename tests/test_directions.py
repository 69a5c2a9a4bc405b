"""Directions of codes: from words, without the cameras' share, and from the codes alone."""

import json
import shutil

import pytest
import torch
from tiny_run import build_generator, world

import directions
import subjects
from directions import Config

FAR = {"samples": 100, "components": 3}


def options(tmp_path, **changes):
    given = {
        "ckpt": str(world() / "generator.safetensors"),
        "clip": str(world() / "clip"),
        "diffusion": str(world() / "diffusion"),
        "out": tmp_path / "d.safetensors",
        "device": "cpu",
        "words": ("red=red hair/black hair",),
        "apart": ("hair=long hair/short hair",),
    }
    return Config(**given | FAR | changes)


def test_a_file_has_the_words_and_the_widest_directions(tmp_path, capsys):
    apart = ("hair=long hair/short hair", "dark=black hair/blond hair")
    directions.main(options(tmp_path, apart=apart))
    found, _ = subjects.read_tensors(tmp_path / "d.safetensors", subjects.DIRECTIONS)
    assert found.keys() == {"red", "hair", "dark", "pc0", "pc1", "pc2"}
    w = subjects.draw_codes(build_generator(), 3000, seed=7)
    for name, direction in found.items():  # One unit is one standard deviation.
        unit = direction / direction.norm()
        assert (w @ unit).std() == pytest.approx(direction.norm().item(), rel=0.3), name
    codes = subjects.Codes.measure(build_generator(), directions.CODES, seed=0)
    ways = [codes.deviations(codes.mean + found[name])[:5] for name in ("dark", "hair")]
    assert torch.cosine_similarity(*ways, dim=0) == pytest.approx(0, abs=1e-3)
    widths = [found[f"pc{k}"].norm() for k in range(3)]
    assert widths == sorted(widths, reverse=True)
    axes = torch.stack([found[f"pc{k}"] / widths[k] for k in range(3)])
    torch.testing.assert_close(axes @ axes.T, torch.eye(3), atol=1e-4, rtol=0)
    first = (tmp_path / "d.safetensors").read_bytes()
    directions.main(options(tmp_path, apart=apart))
    assert (tmp_path / "d.safetensors").read_bytes() == first


class Rater:
    """Stands for CLIP: sees one number in a picture, by the place of its words."""

    def __init__(self, values):
        self.values, self.calls = values, 0

    def images(self, image):
        self.calls += len(image)
        return self.values[self.calls - len(image) : self.calls]

    def text(self, sentences):
        axis = {"long": 0, "short": 0, "dark": 1, "pale": 1}
        sign = {"long": 1.0, "short": -1.0, "dark": 1.0, "pale": -1.0}
        words = [sentence.split()[-2] for sentence in sentences]
        return torch.stack([sign[word] * torch.eye(2)[axis[word]] for word in words])


def test_directions_lead_to_what_is_rated_high_and_not_to_what_is_seen_more_clearly():
    G = build_generator()
    cfg = Config(samples=600, components=0, diffusion="")
    w = subjects.draw_codes(G, 600, cfg.seed)
    axes = torch.linalg.svd(w - w.mean(0), full_matrices=False).Vh
    numbers = (w - w.mean(0)) @ axes.T
    # What is meant to be one number of the codes is mostly another, as hair is dark to many a CLIP.
    dark, length = numbers[:, 0] / numbers[:, 0].std(), numbers[:, 1] / numbers[:, 1].std()
    rater = Rater(torch.stack([0.3 * length + 0.6 * dark, 2 * dark], dim=1))
    pairs = {"hair": ("long hair", "short hair"), "skin": ("dark skin", "pale skin")}
    codes = subjects.Codes.measure(G).wide()
    found = directions.from_words(G, rater, pairs, codes, cfg)
    scores = {name: (w - w.mean(0)) @ x for name, x in found.items()}

    def tells(name, truth):
        return torch.corrcoef(torch.stack([scores[name], truth]))[0, 1].abs().item()

    assert tells("skin", dark) > 0.8
    alone = directions.from_words(G, Rater(rater.values), {"hair": pairs["hair"]}, codes, cfg)
    scores["alone"] = (w - w.mean(0)) @ alone["hair"]
    assert tells("hair", dark) < 0.5 * tells("alone", dark)
    assert tells("hair", length) > tells("alone", length)


def test_what_the_others_tell_least_is_turned_least():
    ways = {"own": torch.tensor([1.0, 0, 0]), "mixed": torch.tensor([1.0, 1, 0])}
    alike = directions.apart(ways, {"own": 1.0, "mixed": 1.0})
    assert alike["own"] @ ways["own"] == pytest.approx(alike["mixed"] @ ways["mixed"] / 2**0.5)
    for share in (0.1, 1e-4):
        found = directions.apart(ways, {"mixed": share, "own": 1.0})
        assert torch.stack(list(found.values())) @ found["own"] == pytest.approx([1, 0], abs=1e-5)
        assert found["own"] @ ways["own"] > alike["own"] @ ways["own"]
    torch.testing.assert_close(found["own"], ways["own"], atol=1e-3, rtol=0)
    torch.testing.assert_close(found["mixed"], torch.tensor([0.0, 1, 0]), atol=1e-3, rtol=0)


def test_a_direction_is_turned_away_from_others_unless_it_is_mostly_theirs(capsys):
    axes = torch.eye(4)
    stay = {"dark": axes[0], "skin": axes[1]}
    old = directions.away("old", axes[0] + axes[1] + 3 * axes[2], stay)
    torch.testing.assert_close(old, axes[2])
    assert not capsys.readouterr().err
    red = directions.away("red", 3 * axes[0] + axes[2], stay)
    torch.testing.assert_close(red, (3 * axes[0] + axes[2]) / 10**0.5)
    reason = "warning: red is mostly what dark, skin say, and stays so\n"
    assert capsys.readouterr().err == reason


def test_words_that_the_prior_never_saw_are_warned_of(tmp_path, capsys):
    known = sorted({"a", "photo", "of", "person", "with", "red", "black", "hair"})
    folder = shutil.copytree(world() / "diffusion", tmp_path / "diffusion")
    (folder / "vocabulary.json").write_text(json.dumps({"words": known}))
    pairs = directions.parse_words(("red=red hair/black hair", "old=an old face/a young face"))
    cfg = options(tmp_path, diffusion=str(folder))
    capsys.readouterr()
    directions.warn_of_words(pairs, cfg)
    warning = "the prior has never seen the words an, old, face, young; old may mean something else"
    assert capsys.readouterr().err == f"warning: {warning}\n"
    (folder / "vocabulary.json").unlink()
    for prior in ("", str(folder)):  # None, and one that declares nothing.
        directions.warn_of_words(pairs, options(tmp_path, diffusion=prior))
    assert not capsys.readouterr().err


def test_words_that_are_given_leave_the_others_as_they_are(tmp_path):
    found = []
    pairs = ("hair=long hair/short hair", "dark=black hair/blond hair")
    for words in ((), ("red=red hair/black hair", "length=long hair/short hair", pairs[1])):
        directions.main(options(tmp_path, words=words, apart=pairs))
        found.append(subjects.read_tensors(tmp_path / "d.safetensors", subjects.DIRECTIONS)[0])
    assert found[1].keys() - found[0].keys() == {"red", "length"}
    for name, direction in found[0].items():
        assert torch.equal(direction, found[1][name]), name
    assert torch.equal(found[1]["length"], found[1]["hair"])  # The same words.


def test_without_others_the_words_that_are_given_are_told_apart(tmp_path):
    pairs = ("hair=long hair/short hair", "dark=black hair/blond hair")
    found = []
    for change in ({"words": (), "apart": pairs}, {"words": pairs, "apart": ()}):
        directions.main(options(tmp_path, **change))
        found.append(subjects.read_tensors(tmp_path / "d.safetensors", subjects.DIRECTIONS)[0])
    assert all(torch.equal(x, found[1][name]) for name, x in found[0].items())


def test_shares_are_what_a_regression_on_the_others_leaves():
    torch.manual_seed(0)
    own, both, noise = torch.randn(3, 4000).unbind()
    scores = {"own": own, "mixed": both + own, "more": both + 0.1 * noise}
    for name, share in directions.own_shares(scores).items():
        others = torch.stack([x - x.mean() for n, x in scores.items() if n != name], dim=1)
        y = scores[name] - scores[name].mean()
        left = y - others @ torch.linalg.lstsq(others, y).solution
        assert share == pytest.approx((left.var() / y.var()).item(), abs=0.01)
    assert directions.own_shares({"own": own}) == pytest.approx({"own": 1}, abs=0.01)
    twice = directions.own_shares({"own": own, "again": own, "mixed": both + own})
    assert 0 < twice["again"] < 0.01 and twice["mixed"] > 0.4


def test_every_noise_level_counts_alike(monkeypatch):
    G = build_generator()
    cfg = Config(samples=100, diffusion=str(world() / "diffusion"))
    w, c = subjects.draw_codes(G, 100, 0), directions.draw_cameras(G, cfg)
    seen = iter(torch.randn(100, directions.TIMES) * torch.logspace(0, 3, directions.TIMES))
    errors = []

    def noise_errors(prior, latents, condition, times, noise):
        if len(errors) % 2 == 0:  # "These" explain nothing, "those" differ from head to head.
            errors.append(torch.zeros(len(times), len(latents)))
        else:
            errors.append(torch.stack([next(seen) for _ in latents], dim=1))
        return errors[-1]

    monkeypatch.setattr(directions, "noise_errors", noise_errors)
    scores = directions.ask_prior(G, w, c, ("long hair", "short hair"), cfg)
    levels = torch.cat(errors[1::2], dim=1)
    for level in levels:
        together = torch.corrcoef(torch.stack([scores, level]))[0, 1]
        assert together == pytest.approx(directions.TIMES**-0.5, abs=0.25)


def test_what_cameras_tell_of_a_score_is_taken_out():
    G = build_generator()
    torch.manual_seed(0)
    c = G.cameras.sample(200)
    own = torch.randn(200)
    left = directions.without_cameras(own + 5 * c[:, 3] - 3 * c[:, 7].square(), c)
    assert torch.corrcoef(torch.stack([left, own]))[0, 1] > 0.95
    assert abs(torch.corrcoef(torch.stack([left, c[:, 3]]))[0, 1]) < 1e-3
    flat = directions.without_cameras(own, c[:, :0])  # Of pictures without cameras.
    torch.testing.assert_close(flat, own - own.mean())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"words": ("hair",)}, "--words must look like"),
        ({"words": ("hair=long",)}, "--words must look like"),
        ({"words": ("pc1=a/b",)}, "--words must look like"),
        ({"words": ("a b=c/d",)}, "--words must look like"),
        ({"words": ("twice=red hair/red  hair",)}, "--words twice: red hair and red  hair are the"),
        ({"template": "a head"}, "--template must hold"),
        ({"samples": 9}, "--samples must be at least 100"),
        ({"components": -1}, "--components must be at least 1"),
        ({"words": (), "apart": (), "components": 0}, "--components must be at least 1"),
        ({"ckpt": "nowhere.pkl"}, "nowhere.pkl"),
        ({"clip": "./nowhere"}, "nowhere"),
    ],
)
def test_bad_options_are_refused_and_nothing_is_written(change, reason, tmp_path):
    with pytest.raises(ValueError, match=reason):
        directions.main(options(tmp_path, **change))
    assert not list(tmp_path.iterdir())


def test_the_first_words_of_a_name_count():
    pairs = directions.parse_words(("skin=green skin/red skin", "skin=dark skin/pale skin"))
    assert pairs == {"skin": ("green skin", "red skin")}
