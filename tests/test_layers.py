"""Imports go down only, and the names that docs/layers.md promises are there."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = {
    **dict.fromkeys(("harness", "presets"), 0),
    **dict.fromkeys(("config", "models"), 1),
    **dict.fromkeys(("files", "losses", "metrics"), 2),
    **dict.fromkeys(("guides", "terms", "samples", "subjects", "render", "refine"), 3),
    **dict.fromkeys(("train", "eval", "convert", "directions", "invert", "view"), 4),
    **dict.fromkeys(("avatar", "bench"), 5),
    "puppets": 6,
}


def modules():
    """Return every module of ours by its dotted name."""
    paths = [path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0] != "tests"]
    paths = [p for p in paths if not any(x.startswith(".") for x in p.relative_to(ROOT).parts)]
    names = (".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths)
    return {n.removesuffix(".__init__"): p for n, p in zip(names, paths, strict=True)}


def imports(path, known):
    """Return the modules of ours that a file imports; annotations alone do not count."""
    tree = ast.parse(path.read_text())
    only_hints = {
        id(node)
        for test in ast.walk(tree)
        if isinstance(test, ast.If) and "TYPE_CHECKING" in ast.unparse(test.test)
        for node in ast.walk(test)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in only_hints:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found & known.keys()


def test_every_room_has_a_floor():
    rooms = {name.partition(".")[0] for name in modules()}
    assert rooms == FLOORS.keys()
    drawn = (ROOT / "docs/layers.md").read_text()
    assert all(f"`{room}/`" in drawn or f"`{room}.py`" in drawn for room in rooms)


def test_no_import_goes_up():
    known = modules()
    for name, path in known.items():
        floor = FLOORS[name.partition(".")[0]]
        for other in imports(path, known):
            room = other.partition(".")[0]
            assert FLOORS[room] <= floor, f"{name} imports {other}"
            same_room = room == name.partition(".")[0]
            assert FLOORS[room] < floor or same_room or floor in (2, 3, 4), f"{name} <- {other}"


def test_no_import_goes_in_a_circle():
    known = modules()
    below = {name: imports(path, known) - {name} for name, path in known.items()}

    def visit(name, path):
        assert name not in path, f"circle: {' -> '.join([*path, name])}"
        for other in below[name]:
            if name not in done:
                visit(other, [*path, name])
        done.add(name)

    done: set[str] = set()
    for name in known:
        visit(name, [])


@pytest.mark.parametrize(("file", "most"), [("train.py", 350), ("README.md", 200)])
def test_what_is_read_first_stays_short(file, most):
    assert len((ROOT / file).read_text().splitlines()) <= most


def test_no_python_file_is_too_long():
    long = {
        str(path.relative_to(ROOT)): lines
        for path in modules().values()
        if (lines := len(path.read_text().splitlines())) > 600
    }
    assert not long
