"""Two processes train as one: the same weights and log, one voice, and one end whatever happens."""

import io
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout

import pytest
import torch
from tiny_run import arguments, contents, hurry, run

import guides
import train
from config import parse
from harness import ranks
from harness.checkpoints import load_checkpoint
from harness.cli import exit_codes
from harness.run_folder import sole_writer

SHORT = {"steps": 3, "batch": 4, "save_every": 1, "grid_every": 2}
LIMIT = 300  # Seconds until a launch counts as hanging; it takes a few, on an idle machine.


class Launcher:
    """Two processes that run command lines of train.py together, as torchrun would start them.

    They live on from one command to the next, since most of a short run is importing libraries.
    """

    def __init__(self):
        context = multiprocessing.get_context("spawn")
        self.pools = [ProcessPoolExecutor(1, context, set_up, (rank,)) for rank in (0, 1)]
        self.pids = [job.result(LIMIT) for job in [p.submit(os.getpid) for p in self.pools]]

    def __call__(self, argv, faults=(None, None)):
        """Return [(exit code, stdout, stderr)]; a rank's fault is a function of a MonkeyPatch."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        pairs = zip(self.pools, faults, strict=True)
        jobs = [pool.submit(call, argv, port, fault) for pool, fault in pairs]
        return [job.result(LIMIT) for job in jobs]

    def kill(self):
        for pid in self.pids:
            os.kill(pid, signal.SIGKILL)


def set_up(rank):
    """Make this process the rank of a launch."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    torch.set_num_threads(1)
    hurry(pytest.MonkeyPatch())


def call(argv, port, fault):
    """Run a command line in this process."""
    os.environ["MASTER_PORT"] = str(port)
    sys.argv = [train.__file__, *map(str, argv)]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as monkeypatch, redirect_stdout(out), redirect_stderr(err):
        if fault:
            fault(monkeypatch)
        try:
            with exit_codes(alike=True):
                cfg = parse(sys.argv[1:], train.__doc__)
            with exit_codes():
                train.main(cfg)
        except SystemExit as stop:
            code = stop.code
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def launch():
    launcher = Launcher()
    yield launcher
    launcher.kill()


@pytest.fixture(autouse=True, scope="module")
def short_runs():
    with pytest.MonkeyPatch.context() as monkeypatch:
        hurry(monkeypatch)
        yield


@pytest.fixture(scope="module")
def by_one(short_runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("one") / "run"
    run(out, **SHORT)
    return out


@pytest.fixture(scope="module")
def by_two(launch, tmp_path_factory):
    """Return the run folder of two processes, and what each of them printed."""
    out = tmp_path_factory.mktemp("two") / "run"
    printed = launch(arguments(out, **SHORT))
    assert [code for code, *_ in printed] == [0, 0], printed
    return out, printed


def assert_same_run(out, wanted):
    """Compare all that a run computes, to rounding."""
    got, wanted_state = load_checkpoint(out), load_checkpoint(wanted)
    for name in ("weights", "averages"):
        for key, value in wanted_state[name].items():
            torch.testing.assert_close(got[name][key], value, rtol=1e-4, atol=2e-5, msg=key)
    for row, wanted_row in zip(rows(out), rows(wanted), strict=True):
        assert row == pytest.approx(wanted_row, rel=1e-3)


def rows(out):
    return contents(out)["log.jsonl"]


def lines(printed):
    """Return the lines on stderr of all processes."""
    return [line for _, _, err in printed for line in err.splitlines()]


# The same run.


def test_two_processes_equal_one_at_the_same_batch(by_one, by_two):
    assert_same_run(by_two[0], by_one)
    assert {p.name for p in by_two[0].iterdir()} == {p.name for p in by_one.iterdir()}


def test_only_the_first_process_speaks(by_two):
    (_, out, err), (_, *second) = by_two[1]
    assert "render.py --ckpt" in out and "3/3" in err
    assert second == ["", ""]


def test_two_processes_in_micro_batches_equal_one_at_once(launch, tmp_path, by_one):
    launch(arguments(tmp_path / "run", **SHORT, micro_batch=1))
    assert_same_run(tmp_path / "run", by_one)


def test_micro_batches_add_up_to_the_batch(tmp_path, by_one):
    run(tmp_path / "run", **SHORT, micro_batch=3)  # Three heads, then one.
    assert_same_run(tmp_path / "run", by_one)


@pytest.fixture(scope="module")
def distances_by_one(short_runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("distances") / "run"
    run(out, **SHORT, method="diffusiongan3d")
    return out


# Where shapes may change, pictures are edited; steps 2 and 3 see the depth of what was made before.
@pytest.mark.parametrize(("method", "reuse"), [("denoised", 2), ("denoised-shapes", 1)])
def test_targets_are_the_same_in_processes_and_micro_batches(launch, tmp_path, method, reuse):
    targets = {"steps": 2, "pool": 1, "reuse": reuse}
    targets |= {"adapted_depth": True} if method == "denoised-shapes" else {}
    painted = SHORT | {"method": method, "targets": targets}
    run(tmp_path / "one", **painted)
    printed = launch(arguments(tmp_path / "two", **painted))
    assert [code for code, *_ in printed] == [0, 0], printed
    assert_same_run(tmp_path / "two", tmp_path / "one")
    run(tmp_path / "parts", **painted, micro_batch=1)
    assert_same_run(tmp_path / "parts", tmp_path / "one")


def test_distances_of_a_batch_are_the_same_in_micro_batches(tmp_path, distances_by_one):
    run(tmp_path / "run", **SHORT, method="diffusiongan3d", micro_batch=3)
    assert_same_run(tmp_path / "run", distances_by_one)


def test_distances_of_a_batch_reach_across_processes(launch, tmp_path, distances_by_one):
    argv = arguments(tmp_path / "run", **SHORT, method="diffusiongan3d", micro_batch=1)
    assert [code for code, *_ in launch(argv)] == [0, 0]
    assert_same_run(tmp_path / "run", distances_by_one)


def signal_after_two_updates(monkeypatch):
    update, done = train.update_averages, []

    def update_and_signal(*args, **kwargs):
        update(*args, **kwargs)
        done.append(1)
        if len(done) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train, "update_averages", update_and_signal)


@pytest.fixture(scope="module")
def stopped(launch, tmp_path_factory):
    """Return the run folder of two processes whose second one got a signal, and what they said."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    argv = arguments(out, **SHORT | {"save_every": 9})
    return out, launch(argv, (None, signal_after_two_updates))


def test_signal_to_one_process_saves_and_stops_both(stopped):
    assert [code for code, *_ in stopped[1]] == [143, 143]
    assert load_checkpoint(stopped[0])["step"] == 2
    assert "stopped after step 2" in stopped[1][0][1] and stopped[1][1][1:] == ("", "")


def test_two_processes_resume_what_two_began(launch, stopped, by_two, tmp_path):
    shutil.copytree(stopped[0], tmp_path / "run")
    assert [code for code, *_ in launch(arguments(tmp_path / "run", **SHORT))] == [0, 0]
    assert contents(tmp_path / "run") == contents(by_two[0])


def test_one_process_resumes_what_two_began(stopped, by_one, tmp_path):
    shutil.copytree(stopped[0], tmp_path / "run")
    run(tmp_path / "run", **SHORT)
    assert_same_run(tmp_path / "run", by_one)


# One end.


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"batch": 3}, "--batch must divide among 2 processes, got 3"),
        ({"device": "cuda:1"}, "--device of several processes must be cpu or cuda, got cuda:1"),
        ({"generator": "nowhere.safetensors"}, "nowhere.safetensors"),
    ],
)
def test_bad_option_is_one_line_of_two_processes(launch, tmp_path, changes, reason):
    printed = launch(arguments(tmp_path / "run", **SHORT | changes))
    assert [code for code, *_ in printed] == [2, 2]
    assert len(lines(printed)) == 1 and reason in lines(printed)[0]
    assert list(tmp_path.iterdir()) == []


def test_words_that_do_not_parse_are_explained_once(launch, tmp_path):
    first, second = launch([*arguments(tmp_path / "run"), "--steps", "many"])
    assert (first[0], second) == (2, (2, "", ""))
    assert "--steps" in first[2]


def test_folder_of_another_launch_is_refused_in_one_line(launch, tmp_path):
    with sole_writer(tmp_path / "run"):
        printed = launch(arguments(tmp_path / "run", **SHORT))
    assert [code for code, *_ in printed] == [2, 2]
    assert len(lines(printed)) == 1 and "another process" in lines(printed)[0]


def refuse_to_load(monkeypatch):
    def load(*_):
        raise ValueError("no such ViT here")

    monkeypatch.setattr(guides, "load_vit", load)


def test_refusal_by_one_process_is_one_line_and_leaves_nothing(launch, tmp_path):
    printed = launch(arguments(tmp_path / "run", **SHORT), (None, refuse_to_load))
    assert printed == [(2, "", ""), (2, "", "error: no such ViT here\n")]
    assert list(tmp_path.iterdir()) == []


def spoil_the_third_step(monkeypatch):
    find, done = train.pull_back, []

    def spoil(*args):
        gradients, row = find(*args)
        done.append(1)
        if len(done) == 3:
            gradients["image"] *= float("nan")
        return gradients, row

    monkeypatch.setattr(train, "pull_back", spoil)


def fill_the_disk(monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train, "save_checkpoint", full)


@pytest.mark.parametrize(
    ("faults", "reason", "steps"),
    [((None, spoil_the_third_step), "step 3", 2), ((fill_the_disk, None), "No space", 1)],
    ids=["bad number in the second", "full disk of the first"],
)
def test_failure_of_one_process_ends_both_with_one_line(launch, tmp_path, faults, reason, steps):
    printed = launch(arguments(tmp_path / "run", **SHORT), faults)
    assert [code for code, *_ in printed] == [1, 1]
    errors = [line for line in lines(printed) if line.startswith("error")]
    assert len(errors) == 1 and reason in errors[0]
    assert len(rows(tmp_path / "run")) == steps


# The parts.


@pytest.mark.parametrize(
    ("rank", "most", "wanted"),
    [(0, None, [(0, 6)]), (1, None, [(6, 12)]), (1, 4, [(6, 10), (10, 12)]), (0, 9, [(0, 6)])],
)
def test_slices_of_all_processes_make_the_batch(rank, most, wanted, monkeypatch):
    monkeypatch.setattr(ranks.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(ranks.dist, "get_rank", lambda: rank)
    monkeypatch.setattr(ranks.dist, "get_world_size", lambda: 2)
    assert ranks.slices(12, most) == [slice(*ends) for ends in wanted]


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        "torch.distributed.run --nproc-per-node",
        "accelerate.commands.launch --multi_gpu --num_processes",
    ],
    ids=["torchrun", "accelerate"],
)
def test_launcher_starts_two_processes_that_stop_and_go_on(launcher, tmp_path, by_one):
    module, *flags = launcher.split()
    argv = [sys.executable, "-m", module, *flags, "2", train.__file__]
    argv += arguments(tmp_path / "run", **SHORT)
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        try:
            give_up = time.monotonic() + LIMIT
            while not (tmp_path / "run/ckpt-000001.pt").exists() and process.poll() is None:
                assert time.monotonic() < give_up
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            assert "stopped after step" in process.communicate(timeout=LIMIT)[0]
        finally:
            process.terminate()  # The launcher ends its processes, at the latest after 30 s.
    assert subprocess.run(argv, timeout=LIMIT).returncode == 0
    assert_same_run(tmp_path / "run", by_one)
