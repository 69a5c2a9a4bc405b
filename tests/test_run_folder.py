"""Run folders: whose they are, who may write, what is read back."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from harness import run_folder
from harness.run_folder import (
    REPOSITORY,
    check_run,
    claim_run,
    read_log,
    read_settings,
    remove_leftovers,
    sole_writer,
    trim_log,
)

SETTINGS = {"prompt": "a clown", "image": [], "method": "gca3d", "generator": "g", "clip": "c"}
SETTINGS |= {"diffusion": "d", "steps": 2, "seed": 0, "trunc": 1.0}


def test_leftovers_of_a_kill_are_removed_and_nothing_else(tmp_path):
    ours = (".config.json.tmp", ".grid-000003.png.tmp", ".ckpt-000001.pt.tmp", ".log.jsonl.tmp")
    others = {"mine.tmp", ".notes.tmp", ".vimrc.tmp", "ckpt-000001.pt"}
    for name in (*ours, *others):
        (tmp_path / name).write_bytes(b"")
    remove_leftovers(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == others


@pytest.mark.parametrize("name", ["holiday.jpg", "renders/seed0000.png", "notes"])
def test_a_folder_of_other_things_is_refused_by_name(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match=f"--out {tmp_path} is no run.*{Path(name).parts[0]}"):
        check_run(tmp_path, SETTINGS)


@pytest.mark.parametrize("names", [[], [".DS_Store"], [".config.json.tmp", ".DS_Store"]])
def test_an_empty_folder_is_taken_and_hidden_files_do_not_count(tmp_path, names):
    for name in names:
        (tmp_path / name).touch()
    claim_run(tmp_path, SETTINGS)
    assert read_settings(tmp_path) == SETTINGS
    check_run(tmp_path, SETTINGS)


def test_the_root_home_and_the_working_folder_are_refused(tmp_path, monkeypatch):
    home, work = tmp_path / "home", tmp_path / "work"
    for folder in (home, work):
        folder.mkdir()
        (folder / ".hidden").touch()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(work)
    for out in (Path("/"), home, Path(), work, tmp_path):
        with pytest.raises(ValueError, match="is no run and not empty"):
            check_run(out, SETTINGS)


def test_other_settings_are_refused_but_those_that_are_free_to_change(tmp_path):
    claim_run(tmp_path, SETTINGS)
    check_run(tmp_path, SETTINGS | dict.fromkeys(run_folder.FREE_TO_CHANGE, "other"))
    with pytest.raises(ValueError, match="another seed \\(0, now 1\\)"):
        check_run(tmp_path, SETTINGS | {"seed": 1})


def test_options_that_came_later_do_not_part_a_run_from_its_folder(tmp_path):
    claim_run(tmp_path, SETTINGS | {"weights": {"dsds": 1.0}})
    now = SETTINGS | {"weights": {"dsds": 1.0, "late": 0.0}, "select_layers": 0}
    usual = {"weights": {"dsds": 0.5, "late": 0.0}, "select_layers": 0}
    check_run(tmp_path, now, usual)
    for changed in ({"select_layers": 3}, {"weights": {"dsds": 1.0, "late": 1.0}}):
        with pytest.raises(ValueError, match=f"another {next(iter(changed))}"):
            check_run(tmp_path, now | changed, usual)


@pytest.mark.parametrize(
    ("stored", "read"), [(None, []), ("a.png", ["a.png"]), (["a.png", "b"], ["a.png", "b"])]
)
def test_pictures_of_old_and_new_runs_are_read_alike(tmp_path, stored, read):
    (tmp_path / "config.json").write_text(json.dumps(SETTINGS | {"image": stored}))
    assert read_settings(tmp_path)["image"] == read


@pytest.mark.parametrize("name", [*run_folder.SETTINGS_READ])
def test_a_setting_that_is_missing_or_of_another_type_is_named(tmp_path, name):
    for settings in (
        {k: v for k, v in SETTINGS.items() if k != name},
        SETTINGS | {name: {"a": 1}},
    ):
        (tmp_path / "config.json").write_text(json.dumps(settings))
        with pytest.raises(ValueError, match=f"no usable '{name}'"):
            read_settings(tmp_path)


def test_log_is_read_without_the_row_that_a_kill_cut_off_and_trimmed_to_a_step(tmp_path):
    assert read_log(tmp_path) == []
    rows = [{"step": step, "seconds": 0.1, "dsds": 1 / 3} for step in (1, 2, 3)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "log.jsonl").write_text(text + '{"step": 4, "sec')
    assert read_log(tmp_path) == rows
    trim_log(tmp_path, 2)
    assert (tmp_path / "log.jsonl").read_text() == "".join(text.splitlines(True)[:2])


HOLD = """
import sys
from pathlib import Path
from harness.run_folder import sole_writer
with sole_writer(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_another_process_is_kept_out_until_the_first_ends_or_is_killed(tmp_path):
    command = [sys.executable, "-c", HOLD, tmp_path / "run"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=REPOSITORY, **pipes) as holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match="another process is training there"):
            with sole_writer(tmp_path / "run"):
                pass
        with sole_writer(tmp_path / "other"):
            pass
        holder.kill()
    with sole_writer(tmp_path / "run"):
        pass
