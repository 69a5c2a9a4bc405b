"""The options of train.py: one table of defaults, bounds beside the fields, no torch."""

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from tiny_run import world

import config
import train
from config import Config, Weights, parse, preset
from harness.run_folder import locate

METHODS = get_args(get_type_hints(Config)["method"])
BASES = get_args(get_type_hints(Config)["base"])


def test_choices_are_the_presets():
    assert set(METHODS) == config.METHODS.keys()
    assert set(BASES) == config.BASES.keys() == config.NUMBERS.keys()
    assert all(rows.keys() == config.METHODS.keys() for rows in config.NUMBERS.values())
    assert config.EDITS.keys() <= config.METHODS.keys()


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", METHODS)
def test_presets_settle_every_option_and_no_table_undoes_another(base, method):
    cfg = preset(base, method)
    assert {field.name for field in fields(Config)} == vars(cfg).keys()
    assert None not in vars(cfg).values()
    methods = config.METHODS_2D if base in config.FLAT else config.METHODS
    tables = config.BASES[base], methods[method], config.NUMBERS[base][method]
    rows = [row for table in tables for row in table.items() if not isinstance(row[1], dict)]
    names = [name for name, _ in rows]
    for group in ("targets", "scores"):
        parts = [row for table in tables for row in table.get(group, {}).items()]
        assert all(getattr(getattr(cfg, group), name) == value for name, value in parts)
        names += [f"{group}.{name}" for name, _ in parts]
    assert len(set(names)) == len(names)
    known = {field.name for cls in (Config, Weights) for field in fields(cls)}
    assert {name for table in tables for name in table} <= known
    assert all(getattr(cfg, name) == value for name, value in rows if name in vars(cfg))


def test_weights_of_the_papers_are_the_presets():
    """Of StyleGAN-Fusion's gradients, summed over 64 x 64 cells: 0.5, LPIPS 2000 / 100; DoRM's."""
    fusion = preset("ffhq", "stylegan-fusion", prompt="x").weights.on()
    adapter = preset("afhq", "3d-adapter", image="x.png").weights.on()
    assert fusion == {"fusion": 1, "score_direction": 0.5, "perceptual": 20 / 4096}
    assert adapter == {"clip_direction": 0.5, "target": 1} | dict.fromkeys(
        ("structure", "feature_structure"), 10
    )


def test_new_depth_of_pictures_is_refused():
    cfg = Config(prompt="x", base="puppets2d", targets={"adapted_depth": True})
    with pytest.raises(ValueError, match="--targets.adapted-depth needs depth and masks"):
        config.check(cfg)


def test_edit_is_the_prompt_and_brings_its_presets():
    options = {"method": "diffusiongan3d", "edit": "a person with green hair"}
    cfg = Config(**options)
    assert (cfg.prompt, cfg.out) == (cfg.edit, Path("runs/a-person-with-green-hair"))
    method = Config(prompt="x", method="diffusiongan3d")
    assert cfg.weights.on() == method.weights.on() | {"keep": 20}
    assert cfg.learns != method.learns
    changed = Config(**options, weights={"keep": 2.0, "distance": 0.0})
    assert changed.weights.on() == {"dsds": method.weights.dsds, "keep": 2}


def test_what_is_given_wins_over_the_preset():
    cfg = Config(prompt="x", base="ffhq", lr=4e-3, weights={"keep": 4})
    assert (cfg.lr, cfg.steps) == (4e-3, config.BASES["ffhq"]["steps"])
    assert cfg.weights.on() == {"denoised": 1, "denoised_tokens": 0.3, "hsc": 0.3, "keep": 4}
    whole = Config(prompt="x", weights=Weights(hsc=0.5))
    assert whole.weights.on() == {"hsc": 0.5}


def test_a_picture_without_words_starts_from_noise():
    words, picture = Config(prompt="a clown"), Config(image="a.png")
    assert words.targets.inverted and not picture.targets.inverted
    assert picture.targets.level > words.targets.level
    assert Config(prompt="a clown", image="a.png").targets == words.targets
    changed = Config(image="a.png", targets={"level": 0.5})
    assert (changed.targets.level, changed.targets.inverted) == (0.5, False)


def test_none_is_not_given_and_other_names_are_refused():
    assert Config(prompt="x", image=None, device=None, lr=None) == Config(prompt="x")
    with pytest.raises(TypeError, match="no such option: adapters"):
        Config(prompt="x", adapters=("a", "b"))
    with pytest.raises(ValueError, match="--method must be one of denoised, .*got 'magic'"):
        Config(prompt="x", method="magic")


def test_blank_prompt_with_a_picture_counts_as_none():
    cfg = Config(prompt="  ", edit=" ", image=Path("grey.png"))
    assert (cfg.prompt, cfg.image_scale, cfg.out) == ("", 1.0, Path("runs/grey"))
    assert Config(prompt="x", image=[Path("a.png"), "b.png"]).image_scale == 0.6


def test_a_home_folder_may_be_a_tilde(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "g.safetensors").touch()
    cfg = parse_only("--prompt", "~/x", "--out", "~/run", "--image=~/a.png", "--vae=~/v")
    cfg = Config(**vars(cfg) | {"generator": "~/g.safetensors", "lora": (("~/l", 0.5),)})
    assert (cfg.prompt, cfg.out, cfg.vae) == ("~/x", tmp_path / "run", str(tmp_path / "v"))
    assert cfg.generator == str(tmp_path / "g.safetensors")
    assert (cfg.image, cfg.lora) == ((tmp_path / "a.png",), ((str(tmp_path / "l"), 0.5),))


def test_local_files_are_found_from_any_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(world())
    cfg = Config(prompt="a bronze statue", generator="generator.safetensors")
    monkeypatch.chdir(tmp_path)
    assert Path(locate(cfg.generator)).samefile(world() / "generator.safetensors")
    assert locate("losses.py") == str(Path(train.__file__).parent / "losses.py")
    for name in ("user/model", "user/repo/sub/g.pkl", "https://host/a/g.pkl?dl=1", "x" * 300):
        assert Config(prompt="x", generator=name).generator == name
        assert locate(name) == name


def parse_only(*argv):
    """Return the options of a command line, whatever they are."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(config, "check", lambda cfg: None)
        return parse(argv, "")


def test_a_command_line_has_the_defaults_of_its_own_base_and_method():
    argv = ["--method", "stylegan-fusion", "--base", "ffhq", "--prompt", "x"]
    assert parse_only(*argv) == preset("ffhq", "stylegan-fusion", prompt="x")
    edit = parse_only("--edit", "green hair", "--method", "diffusiongan3d", "--weights.dsds", "0.5")
    assert edit.weights.on() == {"dsds": 0.5, "distance": 1, "keep": 20}
    assert parse_only("--image", "a.png", "b.png", "--prompt", "x").image_scale == 0.6


def test_loras_have_weights_and_add_up():
    argv = ["--lora", "a.bin", "0.3", "--prompt", "x", "--lora", "b.bin", "--lora=c", "-0.5"]
    assert parse_only(*argv).lora == (("a.bin", 0.3), ("b.bin", 1.0), ("c", -0.5))


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["--seed", "1", "--prompt", "x", "--seed=2"], "--seed is given twice"),
        (["--weights.hsc", "1", "--weights.hsc", "2"], "--weights.hsc is given twice"),
        (["--t_range", "0", "1", "--t-range", "0", "1"], "--t-range is given twice"),
    ],
)
def test_an_option_given_twice_is_refused_by_name(argv, reason):
    with pytest.raises(ValueError, match=reason):
        parse_only(*argv)


@pytest.mark.parametrize("method", METHODS)
def test_help_shows_the_numbers_of_the_run(method, capsys):
    with pytest.raises(SystemExit):
        parse(["--method", method, "--help"], train.__doc__)
    text = re.sub(r"[│\s]+", " ", capsys.readouterr().out)
    cfg = preset("puppets", method)
    assert f"Adam's learning rate. (default: {cfg.lr})" in text
    assert f"(default: {cfg.weights.hsc})" in text
    assert "None" not in text


def test_reading_options_needs_no_torch():
    code = "import sys, config; assert not {'torch', 'diffusers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], cwd=Path(train.__file__).parent, check=True)


def test_a_dry_run_prints_its_settings_and_writes_nothing(tmp_path, capsys):
    train.main(Config(prompt="x", out=tmp_path / "run", dry_run=True))
    assert '"momentum": 0.9' in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", ["nada", "3d-adapter"])
def test_a_target_that_is_the_source_is_refused(method, tmp_path):
    cfg = Config(prompt=" A photo of a Person", method=method, out=tmp_path / "run")
    with pytest.raises(ValueError, match="is the --source-prompt"):
        config.check(cfg)


@pytest.mark.parametrize("name", ["guided", "held"])
@pytest.mark.parametrize("times", [(0.7, 0.6), (-0.1, 1.0), (0.0, 1.1), (float("nan"), 1.0)])
def test_times_of_targets_must_rise_within_0_to_1(name, times):
    config.check(Config(prompt="x", targets={name: (0.7, 0.7)}))
    with pytest.raises(ValueError, match=f"--targets.{name} must"):
        config.check(Config(prompt="x", targets={name: times}))


def test_edits_start_from_the_source_and_not_from_noise():
    config.check(Config(prompt="x", method="denoised", targets={"draws": 2}))
    cfg = Config(prompt="x", method="denoised", targets={"draws": 2, "inverted": False})
    with pytest.raises(ValueError, match="--targets.draws edits .* needs --targets.inverted"):
        config.check(cfg)
