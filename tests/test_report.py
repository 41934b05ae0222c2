"""Tables and figures, from results alone: the committed ones, copied, and small ones made by hand."""
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import report
from report import read_result

ROOT = Path(report.__file__).parent
COMMITTED = ROOT / "results"
SETTINGS = dict(dataset="digits", model="resnet19", width=16, T=4, n_train=1437, n_test=360, epochs=16, seeds=2, seed=0,
                target=0, poison_ratio=0.05, n_poison=7, v_thr_t=1.5, tau_t=0.5, q=8.0, beta=None, seconds=120.0,
                threads=1, amp="off", clean_ca=99.0, base_ca=98.0, chosen=1.1, margin=4.0)


def row(v_thr, ca, asr_p, **others):
    return dict(dict(v_thr=v_thr, tau=0.5, ca=ca, target_rate=1.0, asr_p=asr_p, asr_o=None, asr_p_clean_model=0.5,
                     asr_p_renormalized=asr_p, asr_p_renormalized_clean_model=None), **others)


def attack_result(**changes):
    """attack.json of two seeds, means included."""
    runs = [dict(seed=0, rows=[row(1.0, 98.0, 0.0), row(1.1, 96.0, 60.0)]),
            dict(seed=1, rows=[row(1.0, 98.0, 2.0), row(1.1, 92.0, 91.0)])]
    return dict(SETTINGS, runs=runs, rows=[row(1.0, 98.0, 1.0), row(1.1, 94.0, 75.5)], **changes)


def write(path, result):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(result if isinstance(result, str) else json.dumps(result))
    return path


def small(results, **changes):
    return write(results / "digits/attack.json", attack_result(**changes))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """The committed results and both pages with empty tables, published once into a folder of their own."""
    folder = tmp_path_factory.mktemp("report")
    shutil.copytree(COMMITTED, folder / "results", ignore=shutil.ignore_patterns("*.png", "*.md"))
    markers = "".join(f"<!-- {name} -->old<!-- /{name} -->" for name in ("table1", "runs", "table2", "benchmark"))
    for page in (folder / "README.md", folder / "results/README.md"):
        page.write_text(f"before {markers} <!-- other -->kept<!-- /other --> after")
    report.report(folder / "results", publish=True)
    return folder


def committed_tables():
    found = {path.parent.name: read_result(path) for path in COMMITTED.glob("*/attack.json")}
    return {"table1": report.table1(found), "runs": report.table_runs(found), "table2": report.table2(COMMITTED),
            "benchmark": report.benchmark_table(read_result(COMMITTED / "benchmark.json"))}


@pytest.mark.parametrize("name", ["table1", "runs", "table2", "benchmark"])
def test_published_tables_are_what_the_results_say(name):
    """A committed page has the tables that `report --publish` makes; each stands in at least one page."""
    pages = [page.read_text() for page in (ROOT / "README.md", COMMITTED / "README.md") if page.exists()]
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    published = [page.split(begin)[1].split(end)[0].strip() for page in pages if begin in page]
    assert published and set(published) == {committed_tables()[name]}


# ---------------------------------------------------------------------------------------------------------
# Figures

def test_every_committed_result_is_drawn(drawn):
    results = [path for path in (drawn / "results").glob("*/*.json") if path.stem in report.FIGURES]
    assert {path.stem for path in results} == set(report.FIGURES), "there is a committed result of every kind"
    for path in [*results, *(drawn / "results").glob("*/triggers.npz")]:
        assert path.with_suffix(".png").stat().st_size > 10_000, path
    assert not list(drawn.rglob("*.tmp"))


def test_a_curve_goes_through_the_means_and_shows_every_seed():
    from matplotlib.figure import Figure
    axis = Figure().subplots()
    rows = [dict(q=2, ca=90.0), dict(q=4, ca=50.0), dict(q=2, ca=80.0), dict(q=4, ca=60.0)]
    report.curve(axis, rows, "q", "ca")
    seeds, mean = axis.lines
    assert mean.get_xydata().tolist() == [[2, 85], [4, 55]]
    assert sorted(map(tuple, seeds.get_xydata())) == [(2, 80), (2, 90), (4, 50), (4, 60)] and seeds.get_alpha() < 0.5
    report.curve(axis, rows[:2], "q", "ca")
    assert len(axis.lines) == 3, "one seed: no pale points"
    report.curve(axis, [dict(q=2, asr_o=None)], "q", "asr_o")
    assert len(axis.lines) == 3, "nothing was measured, nothing is drawn"


def test_mean_in_the_committed_figure_is_the_mean_in_the_table():
    """The figure averages the seeds itself, the table reads what `attack` averaged."""
    for path in COMMITTED.glob("*/attack.json"):
        r = read_result(path)
        for i, mean in enumerate(r["rows"]):
            for key in ("ca", "target_rate", "asr_p", "asr_p_clean_model"):
                assert np.mean([run["rows"][i][key] for run in r["runs"]]) == pytest.approx(mean[key], abs=0.006)


@pytest.mark.parametrize("name", ["digits", "cifar10", "gtsrb", "nmnist"])
def test_story_and_overview(tmp_path, name):
    report.figure_story(read_result(COMMITTED / name / "attack.json"), tmp_path / "story.png")
    report.figure_story(attack_result(), tmp_path / "small.png", trigger="asr_p")
    report.figure_story(attack_result(chosen=None), tmp_path / "none.png")
    report.figure_overview(tmp_path / "overview.png")
    sizes = [path.stat().st_size for path in tmp_path.glob("*.png")]
    assert len(sizes) == 4 and min(sizes) > 10_000


def test_story_asks_for_the_clean_model(tmp_path):
    """No trigger is shown without its control."""
    path = write(tmp_path / "own/attack.json", attack_result())
    with pytest.raises(ValueError, match="own/attack.json: not a readable result .no 'asr_o_clean_model'"):
        report.figure_story(read_result(path), tmp_path / "story.png", trigger="asr_o")
    assert not (tmp_path / "story.png").exists()


def test_a_failing_figure_leaves_the_old_one(tmp_path):
    with pytest.raises(ZeroDivisionError), report.drawing(tmp_path / "figure.png", (1, 1), None):
        1 / 0
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------
# Tables

def test_table1_by_hand(tmp_path):
    lines = report.table1({"digits": read_result(small(tmp_path))}).splitlines()
    assert lines[2:] == ["| **digits** | 1.000 | 98.0 | 1.0 | 1.0 | 0.5 | 1.0 | - | - | - |  |",
                         "|  | **1.100** chosen | 94.0 | 1.0 | 75.5 | 0.5 | 75.5 | - | - | - |  |"]
    with_paper = report.table1({"gtsrb": attack_result()}).splitlines()[-1]
    assert with_paper.endswith("| 92.6 / 39.8 / 75.6 |"), "the paper's numbers at the same V_a"


def test_table1_against_the_committed_seeds():
    """digits at the chosen V_a: the mean of three seeds, computed here."""
    r = json.loads((COMMITTED / "digits/attack.json").read_text())
    rows = [row for run in r["runs"] for row in run["rows"] if row["v_thr"] == r["chosen"]]
    line = next(line for line in report.table1({"digits": r}).splitlines() if "chosen" in line)
    cells = [cell.strip() for cell in line.split("|")]
    for cell, key in zip(cells[3:6], ("ca", "target_rate", "asr_p")):
        assert float(cell) == pytest.approx(sum(row[key] for row in rows) / len(rows), abs=0.051)


def test_events_have_their_own_control():
    """T_s beside the clip alone; beta instead of q; no T_o."""
    rows = [dict(row(1.0, 90.0, 20.0), asr_clip_only=15.0, asr_clip_only_clean_model=40.0)]
    r = attack_result() | dict(q=None, beta=0.03, rows=rows, chosen=None)
    line = report.table1({"nmnist": r}).splitlines()[-1]
    assert line == "| **nmnist** | 1.000 | 90.0 | 1.0 | 20.0 | 0.5 | 15.0 | 40.0 | - | - |  |"
    assert "beta 0.03 |" in report.table_runs({"nmnist": r})


def test_runs_say_how_they_were_made():
    line = report.table_runs({"digits": attack_result()}).splitlines()[-1]
    assert line == ("| **digits** | 99.0 | 98.0 |  | resnet19, width 16, T 4 | 1,437 + 360 | 16 | 2 "
                    "| target 0, P 5 % (7), S_t (1.5, 0.5), q 8 | 2 min, 1 thread, float32 |")
    assert "2 threads, bfloat16" in report.table_runs({"digits": attack_result() | dict(threads=2, amp="on")})


def test_unknown_sets_come_last_and_variants_behind_their_set():
    names = "zebra ndigits nmnist-binary cifar10_10k apple cifar10 nmnist digits cifar100_32rows cifar100".split()
    assert report.in_order(names) == ("digits cifar10 cifar10_10k cifar100 cifar100_32rows nmnist nmnist-binary "
                                      "ndigits apple zebra").split()
    table = report.table1({name: attack_result() for name in names})
    assert [line.split("**")[1] for line in table.splitlines() if "| **" in line[:4]] == report.in_order(names)


def defense_row(attack, defense, **changes):
    trigger = "T_o" if attack == "badsnn" else attack
    return dict(dict(attack=attack, defense=defense, trigger=trigger, v_thr=1.1, ca=90.0, asr=80.0, asr_p=70.0,
                     target_rate=2.0, destroyed=False), **changes)


def test_table2_by_hand(tmp_path):
    """BadSNN has a line for each trigger; what a defence destroyed is marked; what was not run is '-'; the paper's
    cells stand under theirs, whatever the order and number of ours; a variant of a set has the set's."""
    rows = [defense_row("badsnn", "nad"), defense_row("badsnn", "none", ca=30.0, destroyed=True),
            defense_row("wanet", "none"), defense_row("own", "none"), defense_row("wanet", "mine")]
    triggers = [("badsnn", "T_o"), ("badsnn", "T_p"), ("wanet", "wanet"), ("own", "own")]
    result = dict(SETTINGS, rows=rows, detectors=[dict(attack=attack, trigger=trigger) for attack, trigger in triggers],
                  n_defender=100, v_thr_d=1.1)
    write(tmp_path / "gtsrb_small/defend.json", result)
    assert report.table2(tmp_path).splitlines() == [
        "| data, attack | nad | none | mine |", "|---|---|---|---|",
        "| **gtsrb_small**, seed 0, 100 images for the defender, clean model 99.0, 2 min | | | |",
        "| badsnn (T_o), V_a 1.1 | 90.0 / 80.0 / 2.0 | 30.0 / 80.0 / 2.0 † | - |",
        "| badsnn (T_p), V_a 1.1 | 90.0 / 70.0 / 2.0 | 30.0 / 70.0 / 2.0 † | - |",
        "| *paper* | *70.1 / 9.9* | *87.4 / 85.0* | |",
        "| wanet | - | 90.0 / 80.0 / 2.0 | 90.0 / 80.0 / 2.0 |", "| *paper* | *31.9 / 2.9* | *96.0 / 99.8* | |",
        "| own | - | 90.0 / 80.0 / 2.0 | - |"]


def test_defend_draws_the_attacks_that_were_run(tmp_path):
    """One attack alone, and as many as there can be: names and number come from the rows."""
    for attacks in (["badnets"], ["badsnn", "badnets", "blend", "wanet", "clean_label", "own"]):
        rows = [defense_row(a, d, destroyed=d == "anp") for a in attacks for d in ("none", "anp")]
        detectors = [dict(attack=a, trigger=a, strip_auroc=0.5, spikes_auroc=0.9) for a in attacks]
        report.figure_defend(dict(SETTINGS, rows=rows, detectors=detectors), tmp_path / f"{len(attacks)}.png")
    assert all(path.stat().st_size > 10_000 for path in tmp_path.iterdir()) and len(list(tmp_path.iterdir())) == 2


# ---------------------------------------------------------------------------------------------------------
# report: what is printed, what is rewritten, what is refused

def test_tables_are_replaced_only_between_markers(drawn):
    for page in (drawn / "README.md", drawn / "results/README.md"):
        text = page.read_text()
        assert text.startswith("before <!-- table1 -->\n| data |") and "old" not in text
        assert text.endswith("<!-- other -->kept<!-- /other --> after")
        assert all(f"\n{table}\n<!-- /{name} -->" in text for name, table in committed_tables().items())


def test_pages_are_left_alone_without_publish(tmp_path, capsys):
    results = tmp_path / "results"
    small(results)
    page = write(tmp_path / "README.md", "<!-- table1 -->old<!-- /table1 -->")
    report.report(results)
    assert page.read_text() == "<!-- table1 -->old<!-- /table1 -->"
    assert (results / "digits/attack.png").stat().st_size > 10_000
    out = capsys.readouterr().out
    assert "1.100 chosen  94.0  1.0" in out and "|" not in out and "paper" not in out, "as text, no empty columns"
    report.report(results, publish=True)
    assert "**digits**" in page.read_text() and not (results / "README.md").exists()


def test_a_study_alone_is_reported(tmp_path, capsys):
    rows = [row(1.1, 95.0, 50.0, poison_ratio=ratio) for ratio in (0.01, 0.02)]
    write(tmp_path / "digits/poison.json", dict(SETTINGS, rows=rows))
    report.report(tmp_path)
    assert (tmp_path / "digits/poison.png").exists() and "poison.png" in capsys.readouterr().out


def test_print_attack(capsys):
    """Every V_a, how the run was made, and a warning where the clean model answers the trigger as well."""
    rows = [row(1.0, 98.0, 1.0), row(1.05, 97.0, 30.0), row(1.1, 94.0, 75.5)]
    report.print_attack(attack_result() | dict(rows=rows))
    out = capsys.readouterr().out
    assert all(word in out for word in ("1.050", "1.100 chosen", "resnet19, width 16", "clean model, same trigger"))
    assert "NOTE" not in out
    report.print_attack(attack_result() | dict(rows=[row(1.1, 94.0, 75.5, asr_p_clean_model=60.0)]))
    assert "60.0 % on the CLEAN model" in capsys.readouterr().out


def test_as_text():
    table = "| data | a very long title | empty |\n|---|---|---|\n| **x** | 1.0 |  |\n|  | 10.0 |  |"
    assert report.as_text(table).splitlines() == ["data  a very long", "      title", "x     1.0", "      10.0"]
    assert report.as_text(table, turned=True).splitlines() == ["data               x", "a very long title  1.0  10.0"]


@pytest.mark.parametrize("content, reason", [('{"rows": [', "Expecting value"), ("\0", "Expecting value"),
                                             ("[]", "no rows"), ('{"rows": []}', "no rows"), ("{}", "no 'rows'")])
def test_a_damaged_result_is_named(tmp_path, content, reason):
    small(tmp_path)
    write(tmp_path / "gtsrb/attack.json", content)
    with pytest.raises(ValueError, match=f"gtsrb/attack.json: not a readable result .{reason}.*; run the command"):
        report.report(tmp_path)
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize("key", ["runs", "q", "model", "seeds", "ca", "asr_p"])
def test_a_result_that_lacks_a_key_is_named(tmp_path, key):
    result = attack_result()
    for part in result["rows"] if key in ("ca", "asr_p") else [result]:
        del part[key]
    write(tmp_path / "digits/attack.json", result)
    with pytest.raises(ValueError, match=f"digits/attack.json: not a readable result .no '{key}' in it"):
        report.report(tmp_path)


@pytest.mark.parametrize("name", ["defend", "threshold", "heatmap", "poison", "magnitude", "power", "trigger", "plif"])
def test_every_figure_names_a_damaged_file(tmp_path, name):
    write(tmp_path / f"digits/{name}.json", dict(rows=[dict(ca=1.0)]))
    with pytest.raises(ValueError, match=f"digits/{name}.json: not a readable result"):
        report.report(tmp_path)


def test_damaged_images_are_named(tmp_path):
    small(tmp_path)
    write(tmp_path / "digits/triggers.npz", "half a fi")
    with pytest.raises(ValueError, match="digits/triggers.npz: not a readable result"):
        report.report(tmp_path)


def test_no_results(tmp_path):
    with pytest.raises(ValueError, match="no attack.json below"):
        report.report(tmp_path)
