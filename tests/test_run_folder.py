"""Run folders: whose they are, who may write, what is read back."""

from harness.run_folder import remove_leftovers


def test_leftovers_of_a_kill_are_removed_and_nothing_else(tmp_path):
    ours = (".config.json.tmp", ".grid-000003.png.tmp", ".ckpt-000001.pt.tmp", ".log.jsonl.tmp")
    others = {"mine.tmp", ".notes.tmp", ".vimrc.tmp", "ckpt-000001.pt"}
    for name in (*ours, *others):
        (tmp_path / name).write_bytes(b"")
    remove_leftovers(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == others
