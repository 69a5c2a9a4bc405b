"""The experiments: their plan, and the tables that are made of their scores."""

import json
import re
import shlex
import shutil
from collections import Counter

import pytest

import config
import eval as evaluation
import train
from files.generators import load_generator
from harness.run_folder import REPOSITORY
from puppets import experiments, plan
from puppets.domains import HELD_OUT


def read_tables(path):
    """Return the rows of each Markdown table without a heading in the first column."""
    found, names = [], None
    for line in path.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" |")]
        if line.startswith("|  |"):
            names = cells
            found.append([])
        elif names and line.startswith("| ") and "---" not in line:
            found[-1].append(dict(zip(names, cells, strict=True)))
        elif not line.startswith("|"):
            names = None
    return found


@pytest.fixture
def docs(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "DOCS", tmp_path)
    for name in ("tuning", "costs"):
        shutil.copy(REPOSITORY / f"docs/{name}.json", tmp_path)
    return tmp_path


@pytest.fixture
def references(tmp_path, monkeypatch):
    """Pictures that only the experiments draw."""
    for module in (plan, experiments):
        monkeypatch.setattr(module, "RUNS", tmp_path / "experiments")
    for domain in plan.GROUPS["poses"].domains:
        for yaw in plan.YAWS.values():
            experiments.draw_reference(domain, yaw)


def test_runs_of_one_name_have_the_same_options():
    options = {}
    for group in plan.GROUPS.values():
        for label, row in group.rows.items():
            name, settled = plan.run_name(group, label, "x", 0), {"method": group.method} | row
            assert options.setdefault(name, settled) == settled


def test_plan_covers_every_held_out_domain_and_method(references):
    runs = experiments.plan()
    words, parts = experiments.GROUPS["words"], experiments.GROUPS["parts"]
    assert set(experiments.GROUPS["targets"].domains) == set(HELD_OUT)
    assert len(experiments.TABLE) >= 6 and len(set(HELD_OUT) & set(experiments.TABLE)) >= 4
    assert len(set(parts.domains) & set(HELD_OUT)) >= 2 and set(parts.domains) - set(HELD_OUT)
    told = {options["method"] for options in runs.values()}
    assert told == set(config.METHODS)
    assert set(words.domains) >= set(parts.domains)  # So that the first row is there already.
    for name, options in runs.items():
        assert name.endswith(f"-s{options['seed']}")
        config.check(train.Config(out=experiments.RUNS / name, **options))


def test_steps_at_equal_minutes_follow_from_what_a_step_costs():
    costs = json.loads((REPOSITORY / "docs/costs.json").read_text())
    # Steps of denoised targets cost unlike each other.
    assert costs.keys() == {method for method in config.METHODS if "denoised" not in method}
    for name in ("minutes", "minutes-pictures"):
        for options in experiments.GROUPS[name].rows.values():
            steps, cost = options.get("steps", 50), costs[options.get("method", "gca3d")]
            assert steps * cost == pytest.approx(50 * costs["gca3d"], rel=0.2)


def test_commands_in_the_tables_are_those_of_the_plan(references):
    for name, options in experiments.plan().items():
        argv = shlex.split(experiments.command(name, options))[2:]
        planned = train.Config(**{"out": experiments.RUNS / name} | options)
        assert config.parse(argv, "") == planned


def test_tables_of_no_scores_and_of_rows_with_different_names(docs):
    experiments.write_tables({})
    row = {"method": "gca3d", "target": "x", "samples": 8, "seed": 5, "trunc": 1.0}
    experiments.write_tables(
        {
            "gca-3d-bronze-s0": row | {"pose_deg": 5.25, "true_pose_deg": 4.0},
            "gca-3d-picture-devil-s0": row | {"diversity": 0.25},
        }
    )
    (bronze, devil), *_ = read_tables(docs / "results.md")
    assert (bronze[""], bronze["pose [deg] ↓"]) == ("gca-3d-bronze", "5.25 (4)")
    assert (devil[""], devil["pose [deg] ↓"]) == ("gca-3d-picture-devil (held out)", "")
    assert devil["diversity ↑"] == "0.25"


def test_tables_give_mean_over_domains_and_deviation_over_seeds(docs):
    row = {"method": "gca3d", "target": "x", "samples": 8}
    scores = {}
    for seed, shift in ((0, 0.1), (1, 0.3)):
        for number, name in enumerate(experiments.TABLE):
            scores[f"gca-3d-{name}-s{seed}"] = row | {"pose_deg": number + shift}
            scores[f"sds-{name}-s{seed}"] = row | {"pose_deg": 4 + shift}
    experiments.write_tables(scores)
    text = (docs / "results.md").read_text()
    held_out, every = text.split("## Methods, from a prompt: ")[1:3]
    assert held_out.startswith("means over marble, robot, devil, elf\n")
    ours = next(line for line in held_out.splitlines() if line.startswith("| GCA-3D"))
    assert "| 3.7 ± 0.14 |" in ours  # Of 2, 3, 4 and 5.
    assert "| GCA-3D |" in every and "| 2.7 ± 0.14 |" in every and "| 4.2 ± 0.14 |" in every
    assert "StyleGAN-Fusion |" not in text and "python train.py --method sds" in text


def test_leads_are_means_of_differences_between_runs_of_a_domain_and_seed(docs):
    scores = {}
    for label, shift in ((plan.OURS, 0.0), (plan.GCA3D, 0.5), ("SDS", None)):
        for number, domain in enumerate(HELD_OUT[:4]):
            name = plan.run_name(plan.GROUPS["words"], label, domain, 0)
            value = number * 10 + (number if shift is None else shift)
            scores[name] = dict.fromkeys(experiments.LED, value)
    scores[name] = {"oracle_l1": 1.0}  # Scored before there were all of them.
    table = experiments.table_of_leads(plan.GROUPS["words"], scores)
    assert table[2].startswith("| GCA-3D | 4 | -0.5 (-0.5 to -0.5) |")
    assert table[3].startswith("| SDS | 3 | -1 (-2 to 0) |") and len(table) == 4


def test_experiments_score_again_what_has_changed(docs, monkeypatch, tmp_path):
    scored = []

    def score_run(ckpt, cfg, device, sources):
        scored.append((ckpt.name, cfg.samples))
        row = {"method": "gca3d", "target": "x", "samples": cfg.samples}
        return row | {"inputs": evaluation.fingerprint_inputs(ckpt, cfg)}

    monkeypatch.setattr(experiments, "RUNS", tmp_path)
    (tmp_path / "sds-bronze-s0").mkdir()
    monkeypatch.setattr(experiments.train, "main", lambda cfg: None)
    monkeypatch.setattr(experiments.evaluation, "score_run", score_run)
    monkeypatch.setattr(experiments.oracle, "load_oracle", lambda: None)
    monkeypatch.setattr(experiments.oracle, "score_run", lambda *_: {"oracle_l1": 0.1})
    monkeypatch.setattr(experiments, "draw_reference", lambda *_: None)
    for name in ("draw_figures", "draw_orbit"):
        monkeypatch.setattr(experiments, name, lambda: None)
    for samples, trained in ((8, "a"), (8, "a"), (16, "a"), (16, "b")):
        (tmp_path / "sds-bronze-s0/config.json").write_text(trained)
        experiments.main(experiments.Config(only="^sds-bronze-s0", samples=samples))
    assert scored == [("sds-bronze-s0", 8), ("sds-bronze-s0", 16), ("sds-bronze-s0", 16)]
    row = json.loads((docs / "results.json").read_text())["sds-bronze-s0"]
    assert row["samples"] == 16 and row["oracle_l1"] == 0.1


def test_true_heads_are_seen_as_the_adapted_ones_are():
    """Of the source's own domain they are what the source generator draws."""
    true = experiments.show_truth("person")
    drawn = experiments.show(load_generator(REPOSITORY / experiments.SOURCE))
    error = (true - drawn).abs().mean((1, 2, 3))
    assert true.shape == drawn.shape and error.max() < 0.15
    assert (true.roll(2, 0) - drawn).abs().mean() > 2 * error.mean()


def test_numbers_of_the_findings_are_those_that_the_experiments_wrote():
    names = ("docs/findings.md", "docs/results.md")
    shown, written = (read_tables(REPOSITORY / name) for name in names)
    assert [len(table) for table in shown] == [8, 3, 6, 3, 1, 5, 7, 2, 2, 6, 10]
    for table in shown:
        assert any(
            all(any(row.items() <= other.items() for other in rows) for row in table)
            for rows in written
        ), table


def test_numbers_of_the_readme_are_the_means_of_the_findings():
    shown, found = (read_tables(REPOSITORY / name)[0] for name in ("README.md", "docs/findings.md"))
    assert [len(row) for row in shown] == [6] * 6
    of_method = {row[""]: row for row in found}
    for row in shown:
        for name, cell in row.items():
            assert cell == re.sub(r" ± \S+", "", of_method[row[""]][name]), (row[""], name)


def test_findings_count_the_trials():
    trials = evaluation.read_rows(REPOSITORY / "docs/tuning.json")
    findings = " ".join((REPOSITORY / "docs/findings.md").read_text().split())
    names = {"gca3d": "GCA-3D", "sds": "SDS", "nada": "NADA", "3d-adapter": "3D-Adapter"}
    names |= {"stylegan-fusion": "StyleGAN-Fusion", "diffusiongan3d": "DiffusionGAN3D"}
    names |= {"denoised": "denoised targets"}
    counts = Counter(row["method"] for row in trials.values())
    assert counts.keys() == names.keys()
    for method, count in counts.items():
        assert re.search(rf"\b{count} (runs )?of {names[method]}\b", findings), method


def test_results_are_those_of_the_committed_scores(docs):
    scores = json.loads((REPOSITORY / "docs/results.json").read_text())
    experiments.write_tables(scores)
    written = (docs / "results.md").read_text().replace(str(docs), "docs")
    assert written == (REPOSITORY / "docs/results.md").read_text()
