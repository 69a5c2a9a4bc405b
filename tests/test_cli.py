"""The scripts as typed: every option is documented, bad input is one line and exit code 2."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pytest
import torch
import tyro
from PIL import Image
from tiny_run import arguments, build_generator, hurry, run, world

import avatar
import config
import convert
import directions
import eval as evaluation
import invert
import render
import terms
import train
from files.generators import save_generator
from harness.checkpoints import load_checkpoint
from harness.cli import exit_codes, merge_repeats, read_options, run_cli
from harness.run_folder import sole_writer
from subjects import load_run

REPOSITORY = Path(train.__file__).parent
SCRIPTS = [
    import_module(path.stem)
    for path in sorted(REPOSITORY.glob("*.py"))
    if re.search(r"run_cli\(Config|main\(CFG\)", path.read_text())
]


@pytest.fixture(autouse=True, scope="module")
def short_runs():
    with pytest.MonkeyPatch.context() as monkeypatch:
        hurry(monkeypatch)
        yield


@pytest.fixture
def call(monkeypatch, capsys):
    """Run a script as from the command line; return its exit code, stdout and stderr."""

    def call(script, argv):
        argv = list(map(str, argv))
        monkeypatch.setattr(sys, "argv", [script.__file__, *argv])
        capsys.readouterr()
        code = 0
        try:
            if hasattr(script, "parse"):  # Whose defaults are those of base and method.
                with exit_codes():
                    script.main(script.parse(argv, script.__doc__))
            else:
                additive = getattr(script, "ADDITIVE", ())
                run_cli(script.Config, script.main, script.__doc__, additive)
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return call


# What is documented works.


GROUPS = (("weights", config.Weights), ("targets", config.Targets), ("scores", config.Scores))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.__name__)
def test_help_explains_every_option(script, call):
    code, text, _ = call(script, ["--help"])
    assert code == 0
    assert f"python {script.__name__}.py" in text
    text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", text.split("--help", 1)[1]).split())
    options = [field.name for field in fields(script.Config)]
    if script is avatar:
        options.remove("run")  # train.py's own.
        options += [field.name for field in fields(config.Config)]
    flags = [f"--{name.replace('_', '-')}" for name in options]
    if script in (avatar, train):
        for name, group in GROUPS:
            flags.remove(f"--{name}")
            flags += [f"--{name}.{f.name.replace('_', '-')}" for f in fields(group)]
    assert len(fields(script.Config)) <= 48
    explained = set()
    for flag in flags:
        match = re.search(rf" {flag}(?:, --\S*no-\S+)? (.*?)(?= --[a-z.-]+,? |$)", text)
        words = re.sub(r"\{.*?\}|\(default.*|\(required\)|\b[A-Z]+\b|\|", "", match[1])
        assert len(words.split()) >= 3, flag
        explained.add(words)
    assert len(explained) == len(flags)  # No two options share a sentence.


PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *REPOSITORY.glob("docs/*.md")]


def readme_commands():
    """Return every `x.py ...` that python or a launcher starts in the sh blocks of all pages."""
    text = "\n".join(page.read_text() for page in PAGES if page.name != "results.md")
    blocks = re.findall(r"```(?:sh|bash)\n(.*?)```", text, re.DOTALL)
    lines = re.split(r"\n|&&", "\n".join(blocks).replace("\\\n", " "))
    commands = [shlex.split(line, comments=True) for line in lines if "done" not in line]
    names = {f"{script.__name__}.py" for script in SCRIPTS}
    starts = [next((i for i, word in enumerate(c) if word in names), None) for c in commands]
    found = [c[i:] for c, i in zip(commands, starts, strict=True) if i is not None]
    return [list(command) for command in dict.fromkeys(map(tuple, found))]


def test_readme_has_commands():
    assert len(readme_commands()) >= 20


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#:]+)\)", page.read_text())
    assert all((page.parent / link).exists() for link in links)


def test_the_recipe_for_a_loss_can_be_pasted(tmp_path):
    """In a copy of the repository, run with the term that CONTRIBUTING.md adds."""
    text = (REPOSITORY / "CONTRIBUTING.md").read_text()
    block = re.search(r"```python\n# losses.py\n(.*?)```", text, re.DOTALL)[1]
    loss, row, weight = re.split(r"# terms\.py.*|# config\.py.*", block)
    copy = tmp_path / "copy"
    ignored = shutil.ignore_patterns(".git", "docs", "tests", "runs", "puppets", ".pretrain")
    shutil.copytree(REPOSITORY, copy, ignore=ignored)
    for file, before, pasted in (
        ("losses.py", "def dsds_loss(", f"{loss.strip()}\n\n\n"),
        ("terms.py", '    "dsds": Term(', f"    {row.strip()}\n"),
        ("terms.py", "    dsds_loss,\n", "    tv_loss,\n"),  # The import.
        ("config.py", "    dsds: Weight = ", f"    {weight.strip()}\n"),
    ):
        content = (copy / file).read_text()
        assert content.count(before) >= 1
        (copy / file).write_text(content.replace(before, pasted + before, 1))
    argv = ["--weights.tv", "0.1", "--weights.dsds", "0", "--weights.hsc", "0"]
    command = [sys.executable, "train.py", *arguments(tmp_path / "run", steps=1), *argv]
    subprocess.run(command, cwd=copy, check=True)
    row = json.loads((tmp_path / "run/log.jsonl").read_text())
    assert row["tv"] > 0 and row["tv_grad"] > 0
    help_text = subprocess.run(
        [sys.executable, "train.py", "--help"], cwd=copy, check=True, capture_output=True, text=True
    ).stdout
    assert "Total variation." in help_text


@pytest.mark.parametrize("argv", readme_commands(), ids=" ".join)
def test_readme_command_parses(argv):
    script = import_module(Path(argv[0]).stem)
    cfg = read(script, argv[1:])
    pictures = getattr(cfg.run if script is avatar else cfg, "image", ())
    pictures = pictures if isinstance(pictures, tuple) else (pictures,)
    assert all((REPOSITORY / picture).is_file() for picture in pictures)


def read(script, argv):
    """Return the options of a command line, whether or not its files are here."""
    if not hasattr(script, "parse"):
        return tyro.cli(script.Config, args=argv)
    with pytest.MonkeyPatch.context() as monkeypatch:
        for module in (config, avatar):
            monkeypatch.setattr(module, "check", lambda cfg: None)
        return script.parse(argv, "")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.__name__)
def test_docstring_commands_parse(script):
    for line in re.findall(rf"python {script.__name__}\.py (.*)", script.__doc__):
        read(script, shlex.split(line))


def test_the_commands_a_run_prints_work(tmp_path, call):
    out = tmp_path / "a run"
    code, text, _ = call(train, arguments(out, steps=1))
    assert code == 0
    command = shlex.split(re.search(r"python (render\.py .*)", text)[1])
    command[command.index("0-7")] = "0"
    assert call(render, [*command[1:], "--device", "cpu"])[0] == 0
    assert (out / "renders" / "grid.png").exists()
    again = call(train, arguments(out, steps=1))
    assert (again[0], again[1]) == (0, text)


def test_models_exports_its_names_and_imports_only_what_is_asked_for():
    code = """
import sys, models, models.cameras
assert not {"diffusers", "transformers"} & sys.modules.keys()
from models import ClipFeatures, DiffusionPrior, TokenFeatures, TriPlaneGenerator, load_generator
assert set(models.__all__) <= set(dir())
"""
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)


# Refusals.


def foreign_generator(path):
    (path / "g.safetensors").write_bytes(b"noise" * 100)
    return {"generator": path / "g.safetensors"}


def no_pipeline(path):
    (path / "folder").mkdir()
    return {"diffusion": path / "folder"}


def swapped_networks(path):
    return {"features": world() / "clip"}


def unreadable_picture(path):
    (path / "x.png").write_bytes(b"not a picture")
    return {"image": path / "x.png"}


def blocked_folder(path):
    (path / "file").write_text("a file")
    return {"out": path / "file" / "run"}


def file_for_folder(path):
    (path / "file").write_text("a file")
    return {"out": path / "file"}


def coarse_features(path):
    shutil.copytree(world() / "dino", path / "dino")
    (path / "dino/preprocessor_config.json").write_text('{"crop_size": 16}')  # 4 x 4 tokens.
    return {"features": path / "dino"}


def strange_cameras(path):
    G = build_generator()
    G.rendering_kwargs["camera_distribution"] = "foo"
    save_generator(G, path / "g.safetensors")
    return {"generator": path / "g.safetensors"}


BAD = {
    "no target": (lambda _: {"prompt": None}, "--prompt"),
    "blank prompt": (lambda _: {"prompt": "  "}, "--prompt"),
    "missing generator": (lambda _: {"generator": "nowhere.safetensors"}, "nowhere.safetensors"),
    "foreign generator": (foreign_generator, "g.safetensors"),
    "eg3d pickle": (lambda _: {"generator": "ffhq.pkl"}, "ffhq.pkl"),
    "no pipeline": (no_pipeline, "folder"),
    "swapped networks": (swapped_networks, "clip"),
    "unreadable picture": (unreadable_picture, "x.png"),
    "missing picture": (lambda _: {"image": "nowhere.png"}, "nowhere.png"),
    "folder below a file": (blocked_folder, "--out"),
    "file for a folder": (file_for_folder, "--out"),
    "folder in proc": (lambda _: {"out": "/proc/run"}, "--out"),
    "overlong folder": (lambda _: {"out": "x" * 300}, "--out"),
    "no such device": (lambda _: {"device": "abacus"}, "--device"),
    "device without data": (lambda _: {"device": "meta"}, "--device"),
    "prompt in Latin-1": (lambda _: {"prompt": "caf\udce9"}, "--prompt"),
    "folder in Latin-1": (lambda path: {"out": path / "caf\udce9"}, "--out"),
    **{
        f"overlong {name}": (lambda _, name=name: {name: "x" * 300}, "x" * 300)
        for name in ("generator", "diffusion", "vae", "features", "clip", "image")
    },
    "coarse features": (coarse_features, "--features"),
    "strange cameras": (strange_cameras, "foo"),
    "shapes of pictures": (
        lambda _: {"base": "puppets2d", "weights": {"silhouette": 1.0}},
        "--weights.silhouette needs depth and masks, and --base puppets2d has none",
    ),
    "a batch of one for distances": (
        lambda _: {"method": "diffusiongan3d", "batch": 1},
        "--weights.distance needs a --batch of at least 2, got 1",
    ),
    "no weight": (
        lambda _: {"method": "nada", "weights": {"clip_direction": 0}},
        "nothing to learn",
    ),
    "edit beside a prompt": (
        lambda _: {"method": "diffusiongan3d", "edit": "a robot"},
        "--edit takes the place of --prompt",
    ),
    "picture to keep outside of": (
        lambda _: {"prompt": None, "image": "x.png", "weights": {"keep": 1}},
        "--weights.keep needs words",
    ),
    **{
        f"{name} {value}": (lambda _, name=name, value=value: {name: value}, f"--{flag}")
        for name, value, flag in [
            ("steps", 0, "steps"),
            ("steps", -5, "steps"),
            ("batch", 0, "batch"),
            ("save_every", 0, "save-every"),
            ("grid_every", -1, "grid-every"),
            ("seed", -1, "seed"),
            ("lr", 0, "lr"),
            ("lr", "nan", "lr"),
            ("guidance", "inf", "guidance"),
            ("weights", {"hsc": -1}, "weights.hsc"),
            ("learns", "backbone.*", "learns"),
            ("learns", "nothing", "learns"),
            ("learns", "(", "learns"),
            ("weights", {"distance": "nan"}, "weights.distance"),
            ("weights", {"hcs": 0}, "weights.hcs"),
            ("weights", {"target": 1}, "weights.target needs the picture"),
            ("edit", "a robot", "edit needs --method diffusiongan3d, got gca3d"),
            ("hsc_temperature", 0, "hsc-temperature"),
            ("trunc", "nan", "trunc"),
            ("trunc", "1e30", "trunc"),
            ("lr", "1e39", "lr"),
            ("guidance", "1e38", "guidance"),
        ]
    },
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, call, case):
    make, reason = BAD[case]
    changes = make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    code, _, err = call(train, arguments(**{"out": tmp_path / "run"} | changes))
    assert code == 2
    assert len(err.splitlines()) == 1, err
    assert err.startswith("error: ")
    assert reason in err
    assert sorted(tmp_path.rglob("*")) == before


TIMES = ["0.5 0.2", "-0.1 0.5", "0.1 1.5", "0.3 0.9 --t-end 0.2", "0.5 0.5"]


@pytest.mark.parametrize("t_range", TIMES)
def test_bad_t_range_is_one_line(tmp_path, call, t_range):
    argv = [*arguments(tmp_path / "run"), "--t-range", *t_range.split()]
    code, _, err = call(train, argv)
    assert (code, len(err.splitlines())) == (2, 1)
    assert "--t-range" in err


@pytest.mark.parametrize(
    "levels", ["0 0 0 1 2 3", "1 1 1 1 1 -1", "nan 1 1 1 1 1", "1 1 1 inf 1 1"]
)
def test_bad_hsc_levels_are_one_line(tmp_path, call, levels):
    argv = [*arguments(tmp_path / "run"), "--hsc-levels", *levels.split()]
    code, _, err = call(train, argv)
    assert (code, len(err.splitlines())) == (2, 1)
    assert "--hsc-levels" in err


@pytest.mark.parametrize("weight", ["nan", "inf"])
def test_bad_weight_of_a_lora_is_one_line(tmp_path, call, weight):
    argv = [*arguments(tmp_path / "run"), "--lora", "style.bin", weight]
    code, _, err = call(train, argv)
    assert (code, len(err.splitlines())) == (2, 1)
    assert "--lora" in err


@pytest.mark.parametrize("argv", [["--steps", "many"], ["--method", "magic"], ["--nonsense", "1"]])
def test_words_that_do_not_parse_are_one_line(tmp_path, call, argv):
    code, _, err = call(train, [*arguments(tmp_path / "run"), *argv])
    assert (code, len(err.splitlines())) == (2, 1)
    assert argv[0] in err
    assert not (tmp_path / "run").exists()


def test_base_without_a_generator_asks_for_one(tmp_path, call):
    code, _, err = call(train, ["--base", "ffhq", "--prompt", "x", "--out", tmp_path / "run"])
    assert (code, len(err.splitlines())) == (2, 1)
    assert "--generator" in err and "ffhqrebalanced512-128.pkl" in err


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("steps", 9), ("seed", 1), ("prompt", "a robot"), ("image", "x.png"), ("method", "sds")),
        *(("method", "nada"), ("weights", {"hsc": 2}), ("mapping_camera", "render")),
        *(("source_prompt", "a robot"), ("weights", {"keep": 1})),
    ],
)
def test_run_with_other_settings_is_refused_by_name(tmp_path, call, name, value):
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    run(tmp_path / "run", steps=1)
    before = {p: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    value = tmp_path / value if name == "image" else value
    code, _, err = call(train, arguments(tmp_path / "run", **{"steps": 1, name: value}))
    assert (code, len(err.splitlines())) == (2, 1)
    assert name in err and str(tmp_path / "run") in err
    assert {p: p.read_bytes() for p in (tmp_path / "run").iterdir()} == before


def test_changed_picture_is_refused(tmp_path, call):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "x.png")
    run(tmp_path / "run", steps=1, image=tmp_path / "x.png")
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "x.png")
    code, _, err = call(train, arguments(tmp_path / "run", steps=1, image=tmp_path / "x.png"))
    assert code == 2
    assert "image" in err


@pytest.mark.parametrize("part", ["generator", "diffusion", "features", "clip"])
def test_changed_network_is_refused(tmp_path, call, part):
    run(tmp_path / "run", steps=1)
    config = json.loads((tmp_path / "run/config.json").read_text())
    config[f"{part}_weights"] = "crc32 00000000"
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    (tmp_path / "run/generator.safetensors").unlink()  # So that the run is not finished.
    code, _, err = call(train, arguments(tmp_path / "run", steps=1))
    assert code == 2
    assert f"{part}_weights" in err


def test_sds_needs_no_vit(tmp_path):
    run(tmp_path, steps=1, method="sds", features="no-user/no-vit")


@pytest.mark.parametrize(
    "content", ["", "{}", "[1]", '{"generator": 3}', '{"generator": "x", "method": "sds"}', "\x00"]
)
def test_foreign_config_is_refused_and_kept(tmp_path, call, content):
    (tmp_path / "config.json").write_text(content)
    code, _, err = call(train, arguments(tmp_path))
    assert (code, len(err.splitlines())) == (2, 1)
    assert (tmp_path / "config.json").read_text() == content


@pytest.mark.parametrize("name", ["ckpt-000002.pt", "generator.safetensors", "log.jsonl"])
def test_files_of_others_in_the_run_folder_are_kept(tmp_path, call, name):
    (tmp_path / name).write_bytes(b"mine")
    code, _, err = call(train, arguments(tmp_path))
    assert (code, len(err.splitlines())) == (2, 1)
    assert name in err and [p.name for p in tmp_path.iterdir()] == [name]


def test_a_folder_has_one_writer(tmp_path, call):
    with sole_writer(tmp_path / "run"):
        code, _, err = call(train, arguments(tmp_path / "run"))
    assert (code, len(err.splitlines())) == (2, 1)
    assert "another process" in err and not (tmp_path / "run").exists()
    with sole_writer(tmp_path / "run"):
        pass


def test_a_source_that_changed_since_is_no_source(tmp_path, call, capsys):
    path = tmp_path / "source.safetensors"
    save_generator(build_generator(), path)
    run(tmp_path / "run", steps=1, generator=str(path))
    save_generator(build_generator(seed=1), path)
    assert load_run(tmp_path / "run")[1] is None
    assert "has changed" in capsys.readouterr().err
    code, _, err = call(evaluation, ["--ckpt", tmp_path / "run", "--out", tmp_path / "x.json"])
    assert code == 2 and "source generator" in err.splitlines()[-1]
    assert not (tmp_path / "x.json").exists()


def test_what_does_not_shape_the_result_may_change(tmp_path):
    run(tmp_path / "a", steps=1)
    (tmp_path / "a").rename(tmp_path / "b")
    run(tmp_path / "b", steps=1, save_every=7, grid_every=7)


def test_failed_write_is_one_line_and_exit_code_1(tmp_path, call, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train, "save_checkpoint", full)
    code, _, err = call(train, arguments(tmp_path / "run", steps=1))
    assert code == 1
    assert err.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in err


def test_bug_inside_the_loop_is_no_bad_option(tmp_path, call, monkeypatch):
    def fail(*_, **__):
        raise ValueError("shapes do not match")

    monkeypatch.setattr(train, "update_averages", fail)
    with pytest.raises(RuntimeError):  # So Python prints a traceback and exits with 1.
        call(train, arguments(tmp_path / "run", steps=1))


def test_bad_number_is_one_line_and_exit_code_1(tmp_path, call, monkeypatch):
    def infinite(images, now):
        return (images * float("inf")).flatten(1).sum(1)

    monkeypatch.setitem(terms.TERMS, "hsc", terms.Term("image", infinite))
    code, _, err = call(train, arguments(tmp_path / "run", steps=1))
    assert code == 1
    assert "step 1" in err.splitlines()[-1]
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "message",
    [
        None,
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 1.00 GiB",
        "[enforce fail at alloc_cpu.cpp:73] data. DefaultCPUAllocator: not enough memory: you",
        "unable to mmap 8 bytes from file </dev/shm/x>: Cannot allocate memory (12)",
    ],
)
def test_too_little_memory_is_one_line_and_exit_code_1(tmp_path, call, monkeypatch, message):
    def greedy(*_):
        if message:
            raise RuntimeError(message)
        return torch.empty(2**58)

    monkeypatch.setattr(train, "take_step", greedy)
    code, _, err = call(train, arguments(tmp_path / "run", steps=1))
    assert code == 1 and "Traceback" not in err
    assert err.splitlines()[-1].startswith("error: out of memory")


@pytest.mark.parametrize("seeds", ["7-3", "a", ""])
def test_render_refuses_in_one_line(tmp_path, call, seeds):
    argv = ["--ckpt", world() / "generator.safetensors", "--seeds", seeds, "--out", tmp_path / "o"]
    code, _, err = call(render, argv)
    assert (code, len(err.splitlines())) == (2, 1)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        ("--samples 7", "--samples"),
        (f"--samples {10**25}", "--samples"),
        (f"--ckpt {'x' * 300}", "too long"),
        ("--seed -1", "--seed"),
        ("--real nowhere", "--real nowhere: no such folder"),
        ("--real .", "0 pictures"),
        ("--ckpt nowhere", "nowhere"),
        ("--ckpt .", "config.json"),
        ("--device abacus", "--device"),
    ],
)
def test_eval_refuses_in_one_line_and_leaves_nothing(tmp_path, call, monkeypatch, argv, reason):
    run(tmp_path / "run", steps=1)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    before = sorted(tmp_path.rglob("*"))
    out = ["--ckpt", tmp_path / "run", "--out", tmp_path / "new/x.json"]
    code, _, err = call(evaluation, [*out, *argv.split()])
    assert (code, len(err.splitlines())) == (2, 1)
    assert reason in err
    assert sorted(tmp_path.rglob("*")) == before


def test_convert_refuses_in_one_line_and_leaves_nothing(tmp_path, call):
    (tmp_path / "g.pkl").write_bytes(b"noise")
    argv = ["--generator", tmp_path / "g.pkl", "--out", tmp_path / "new/g.safetensors"]
    code, _, err = call(convert, argv)
    assert (code, len(err.splitlines())) == (2, 1)
    assert "g.pkl holds no usable generator: it is neither a .safetensors" in err
    assert [path.name for path in tmp_path.iterdir()] == ["g.pkl"]


def test_a_fresh_process_refuses_in_one_line_from_any_folder(tmp_path):
    """The libraries' own warnings would show here."""
    (tmp_path / "empty").mkdir()
    argv = arguments(tmp_path / "run", diffusion="empty")
    command = [sys.executable, train.__file__, *argv]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["empty"]


# Repeated options, and the ~ of paths.


@pytest.mark.parametrize(
    ("argv", "merged"),
    [
        ("--ckpt a --out x --ckpt b c", "--ckpt a b c --out x"),
        ("--ckpt=a --ckpt=b", "--ckpt a b"),
        ("--lora_files a 0.8 --out x --lora-files b -0.5", "--lora-files a 0.8 b -0.5 --out x"),
        ("--trunc -1.5 --weights.hsc -.5e-3 --mask", "--trunc -1.5 --weights.hsc -.5e-3 --mask"),
        ("--prompt=-x --out=y=z", "--prompt=-x --out=y=z"),
        ("first --ckpt a", "first --ckpt a"),
        ("", ""),
    ],
)
def test_values_of_a_repeated_option_add_up(argv, merged):
    assert merge_repeats(argv.split(), {"ckpt", "lora_files"}) == merged.split()


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        ("--seed 1 --seed 2", "--seed is given twice: 1 and 2"),
        ("--seed=1 --out x --seed -2", "--seed is given twice: 1 and -2"),
        ("--t_range 0 1 --t-range=0.5 1", "--t-range is given twice: 0 1 and 0.5 1"),
        ("--weights.hsc 1 --weights.hsc=1", "--weights.hsc is given twice: 1 and 1"),
        ("--mask --mask", "--mask is given twice"),
    ],
)
def test_any_other_option_given_twice_is_refused_with_both_values(argv, reason):
    with pytest.raises(ValueError) as refusal:
        merge_repeats(argv.split(), {"ckpt"})
    assert str(refusal.value) == reason


REQUIRED = {
    "avatar": ["--prompt", "x"],
    "bench": [],
    "directions": [],
    "invert": ["--image", "a.png", "--out", "a.safetensors"],
    "convert": ["--generator", "g.pkl", "--out", "g.safetensors"],
    "eval": ["--ckpt", "a"],
    "render": ["--ckpt", "a"],
    "train": ["--prompt", "x"],
    "view": ["--ckpt", "a"],
}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.__name__)
def test_every_script_refuses_a_repeated_option(script, call):
    twice = ["--device", "cpu", "--device", "cuda"]
    reason = "--device is given twice: cpu and cuda"
    if script is convert:
        twice, reason = ["--half", "--half"], "--half is given twice"
    code, _, err = call(script, [*REQUIRED[script.__name__], *twice])
    assert (code, err) == (2, f"error: {reason}\n")


def test_ckpts_and_pictures_given_twice_both_count(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["eval.py", "--ckpt", "a", "--seed", "3", "--ckpt", "b", "c"])
    cfg = read_options(evaluation.Config, "", lambda _: None, evaluation.ADDITIVE)
    assert (cfg.ckpt, cfg.seed) == ((Path("a"), Path("b"), Path("c")), 3)
    argv = "--image a.png --lora x 0.8 --image b.png --lora y -0.5 --embedding e --embedding f"
    cfg = read(train, argv.split())
    assert cfg.image == (Path("a.png"), Path("b.png")) and cfg.lora == (("x", 0.8), ("y", -0.5))
    assert cfg.embedding == ("e", "f")


@pytest.mark.parametrize(
    ("script", "argv", "expected"),
    [
        (convert, "--generator ~/g.pkl --out=~/x.safetensors", {"out": "x.safetensors"}),
        (convert, "--generator=~/g.pkl --out x", {"generator": "g.pkl"}),
        (evaluation, "--ckpt ~/a b --real=~/r --out ~/o.json", {"out": "o.json", "real": "r"}),
        (directions, "--ckpt ~/a --out=~/d.safetensors", {"ckpt": "a", "out": "d.safetensors"}),
        (invert, "--image ~/a.png --out=~/x.safetensors", {"image": "a.png"}),
        (render, "--ckpt=~/a --out ~/o", {"ckpt": "a", "out": "o"}),
        (render, "--ckpt a --directions ~/d.safetensors", {"directions": "d.safetensors"}),
    ],
)
def test_the_tilde_of_paths_is_the_home_folder(tmp_path, monkeypatch, script, argv, expected):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "argv", [script.__file__, *argv.split()])
    cfg = read_options(script.Config, "", lambda _: None, getattr(script, "ADDITIVE", ()))
    for name, value in expected.items():
        assert str(getattr(cfg, name)) == str(tmp_path / value)
    if script is evaluation:
        assert cfg.ckpt == (tmp_path / "a", Path("b"))


def test_the_tilde_of_heads_and_of_mixtures_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    argv = "render.py --mix ~/a=0.5 ~/b=1:shape --latents ~/me.safetensors x.safetensors"
    monkeypatch.setattr(sys, "argv", argv.split())
    cfg = read_options(render.Config, "", lambda _: None)
    assert cfg.latents == (tmp_path / "me.safetensors", Path("x.safetensors"))
    wanted = [(f"{tmp_path}/a", 0.5, "all"), (f"{tmp_path}/b", 1.0, "shape")]
    assert render.parse_mix(cfg.mix) == wanted


def test_train_expands_paths_and_leaves_texts_as_they_are(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    argv = ["--out=~/run", "--image", "~/a.png", "--generator", "~/g.pkl", "--prompt", "~/a tilde"]
    cfg = read(train, [*argv, "--lora", "~/l", "--embedding", "~/e"])
    paths = (cfg.out, *cfg.image, cfg.generator, cfg.lora[0][0], *cfg.embedding)
    names = ("run", "a.png", "g.pkl", "l", "e")
    assert [str(path) for path in paths] == [str(tmp_path / name) for name in names]
    assert cfg.prompt == "~/a tilde"


# Messages, consoles and terminals.


MISTAKES = {
    "render.py --sed 1 --ckpt a": "Unrecognized options: --sed",
    "render.py --ckpt": "Missing value for argument '--ckpt'. Expected 1 values",
    "render.py --trunc x --ckpt a": "Error parsing --trunc: could not convert string to float: 'x'",
    "convert.py": "Missing from convert.py: --generator STR Official .pkl, .pth, .pt or another",
}


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])  # By which tyro decides how to draw.
@pytest.mark.parametrize("argv", MISTAKES)
def test_a_mistake_is_explained_in_one_line(argv, encoding):
    env = os.environ | {"PYTHONIOENCODING": encoding}
    command = [sys.executable, *argv.split()]
    done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert done.stderr.startswith(f"error: {MISTAKES[argv]}")
    assert ("perhaps --seeds" in done.stderr) == ("--sed" in argv)
    assert "--help" in done.stderr and "---" not in done.stderr


@pytest.mark.parametrize("argv", ["", "--ckpt a --mix b=1", "--seeds 0"])
def test_a_render_of_nothing_is_refused_in_one_line(argv):
    command = [sys.executable, "render.py", *argv.split()]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    reason = "error: either --ckpt or --mix is needed\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", reason)


@pytest.mark.parametrize(
    "script", ["avatar", "convert", "directions", "eval", "invert", "render", "train", "view"]
)
@pytest.mark.parametrize("argv", [["--help"], ["--nonsense", "1"]])
def test_help_and_mistakes_come_before_torch_is_imported(script, argv):
    code = f"""
import runpy, sys
sys.argv = ["{script}.py", *{argv}]
try:
    runpy.run_path("{script}.py", run_name="__main__")
finally:
    assert not {{"torch", "diffusers", "transformers"}} & sys.modules.keys()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True)
    assert done.returncode == (0 if argv == ["--help"] else 2), done.stderr


SAY = """
import sys
from harness.cli import exit_codes
with exit_codes():
    print("caf" + chr(0xE9), chr(0x6F22))
    print("warning", chr(0x6F22), file=sys.stderr)
    for _ in range(2000):
        print("more and more lines")
"""


def say(encoding="utf-8", **options):
    """Run a script that prints a lot, on a console of this encoding."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    env = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUNBUFFERED": ""}
    return subprocess.run([sys.executable, "-c", SAY], cwd=REPOSITORY, env=env, **options)


@pytest.mark.parametrize(
    ("encoding", "line"),
    [
        ("ascii", b"caf\\xe9 \\u6f22"),
        ("cp1252", b"caf\xe9 \\u6f22"),
        ("utf-8", b"caf\xc3\xa9 \xe6\xbc\xa2"),
    ],
)
def test_a_character_that_the_console_lacks_ends_no_run(encoding, line):
    done = say(encoding)
    assert done.returncode == 0 and len(done.stderr.splitlines()) == 1
    assert done.stdout.splitlines()[0] == line


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_output_that_nobody_reads_ends_no_run(stream):
    read, write = os.pipe()
    os.close(read)
    done = say(**{stream: write})
    os.close(write)
    assert done.returncode == 0
    if stream == "stdout":
        assert done.stderr == "warning \u6f22\n".encode()


@pytest.mark.parametrize("number", [1, 2])
def test_a_stream_that_was_closed_before_the_start_ends_no_run(number):
    done = say(preexec_fn=lambda: os.close(number))
    assert done.returncode == 0


def test_a_terminal_that_is_gone_ends_a_run_with_a_checkpoint_and_exit_code_129(tmp_path):
    fcntl, pty, termios = map(pytest.importorskip, ("fcntl", "pty", "termios"))
    argv = arguments(tmp_path / "run", steps=100_000)
    terminal, child = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, train.__file__, *argv],
        **{"stdin": child, "stdout": child, "stderr": child},
        env=os.environ | {"PYTHONUNBUFFERED": ""},
        preexec_fn=lambda: (os.setsid(), fcntl.ioctl(0, termios.TIOCSCTTY, 0)),
    )
    os.close(child)
    log = tmp_path / "run/log.jsonl"
    while not (log.exists() and log.stat().st_size):
        assert process.poll() is None
        os.set_blocking(terminal, False)
        with suppress(BlockingIOError):
            os.read(terminal, 10_000)
        time.sleep(0.05)
    os.close(terminal)  # As when an ssh session ends.
    assert process.wait(60) == 129
    (checkpoint,) = (tmp_path / "run").glob("ckpt-*.pt")
    assert load_checkpoint(tmp_path / "run")["step"] == len(log.read_text().splitlines())
