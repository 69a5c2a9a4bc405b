"""Tables of scores: which rows belong together, and what stands in a cell."""

from eval import read_rows
from harness import tables
from harness.run_folder import REPOSITORY

ROW = {"method": "gca3d", "target": "a clown", "diversity": 0.5}


def test_runs_that_differ_in_their_seed_alone_are_one_row():
    row = ROW | {"samples": 8, "seed": 5, "config": "a", "run_seed": 0}
    rows = {
        "runs/clown-s0": row | {"diversity": 0.4, "true_diversity": 0.9},
        "runs/robot": row | {"config": "b"},
        "runs/clown-s1": row | {"diversity": 0.6, "true_diversity": 0.9, "run_seed": 1},
        "runs/copy": row,
        "runs/more": row | {"samples": 16, "run_seed": 2},
        "old": ROW,
        "older": ROW | {"target": "a |\nb"},
    }
    assert {name: len(group) for name, group in tables.group_rows(rows).items()} == {
        **{"runs/clown-s{0,1}": 2, "runs/robot": 1, "runs/copy": 1, "runs/more": 1},
        **{"old": 1, "older": 1},
    }
    text = tables.markdown_table(rows)
    assert "| runs/clown-s{0,1} | gca3d | a clown | 0.5 ± 0.14 (0.9) |" in text
    assert "a \\| b" in text and len(text.splitlines()) == 8


def test_committed_scores_are_still_read():
    rows = read_rows(REPOSITORY / "docs/results.json")
    over_seeds = {name.rpartition("-s")[0] for name in rows}
    shown = len(tables.markdown_table(rows).splitlines()) - 2
    assert shown == len(tables.group_rows(rows))
    # Seeds share a row, but not with those from before an option was added.
    assert len(over_seeds) <= shown < len(rows)
