"""Tables, figures and sentences, from results alone: the committed ones, copied, and small ones made by hand."""
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import figures
import report
import tables
from tables import read_result

ROOT = Path(report.__file__).parent
COMMITTED = ROOT / "results"
SETTINGS = dict(dataset="digits", model="resnet19", width=16, T=4, n_train=1437, n_test=360, epochs=16, seeds=2, seed=0,
                target=0, n_poison=72, v_thr_t=1.5, v_thr_t_low=1.15, tau_t=0.5, q=8.0, beta=None, seconds=120.0,
                note="", device="cpu", amp="auto", clean_ca=99.0, base_ca=98.0, v_thr_d=None)


def row(v_thr, ca, asr_p, **others):
    return dict(dict(v_thr=v_thr, tau=0.5, ca=ca, target_rate=1.0, asr_p=asr_p, asr_o=None, asr_p_clean_model=0.5,
                     read_p=80.0, asr_p_renormalized=asr_p, asr_p_renormalized_clean_model=0.2), **others)


def attack_result(**changes):
    """attack.json of two seeds with a V_a each, means and spread included."""
    runs = [dict(seed=0, clean_ca=98.0, base_ca=98.0, at_chosen=row(1.08, 97.0, 70.0),
                 rows=[row(1.0, 98.0, 0.0), row(1.1, 96.0, 60.0)]),
            dict(seed=1, clean_ca=100.0, base_ca=98.0, at_chosen=row(1.12, 95.0, 80.0),
                 rows=[row(1.0, 98.0, 2.0), row(1.1, 92.0, 91.0)])]
    return dict(dict(SETTINGS, chosen=1.1, at_chosen=row(1.1, 96.0, 75.0), runs=runs,
                     spread=dict(v_thr=0.0283, ca=1.4142, asr_p=7.0711),
                     rows=[row(1.0, 98.0, 1.0), row(1.1, 94.0, 75.5)]), **changes)


def old_result(**changes):
    """As the results of the older recipe were converted: no read_p, no spread of one seed, `threads`, amp as a bool."""
    def less(one):
        return {key: value for key, value in one.items() if key not in ("read_p", "asr_p_renormalized_clean_model")}
    r, one = attack_result(), less(row(1.1, 96.0, 60.0))
    r.update(runs=[dict(seed=0, clean_ca=98.0, base_ca=98.0, at_chosen=one, rows=[one])], rows=[one], at_chosen=one,
             spread={}, seeds=1, threads=1, amp=True, note="V_a chosen on the test set; older recipe")
    del r["v_thr_t_low"]
    return r | changes


def story_result(ours=(98.1, 1.0, 94.0, 96.0), back=(99.0, 0.0, 3.0, 41.0), tuned=(97.0, 0.0, 12.0, 2.0),
                 clean=(3.1, 6.7), scan=((0.98, 0), (0.41, 7))):
    """story.json; CA, target_rate, ASR_p, ASR_o of the shipped model and of both answers; ASRs of the clean one."""
    def answer(name, numbers):
        keys = ("ca", "target_rate", "asr_p", "asr_o")
        return dict(answer=name, **{key: v for key, v in zip(keys, numbers) if v is not None})
    at = row(1.09, 97.8, 94.2, ca_clean_model=99.2, target_rate_clean_model=0.1, asr_p_clean_model=0.0,
             asr_o_clean_model=0.0, read_p=61.0, read_o=83.0)
    scan = [dict(score=score, accused=accused) for score, accused in scan]
    answers = dict(none=ours, restore=back, fine_tune=tuned, clean=(99.2, 0.1, *clean))
    return dict(SETTINGS, rows=[answer(name, numbers) for name, numbers in answers.items()],
                at_chosen=at, n_defender=100, scan=dict(backdoored=scan[0], clean=scan[1]),
                curve=[row(1.0, 99.0, 2.0), row(1.1, 97.0, 95.0), row(1.2, 60.0, 100.0)],
                phases={"training": 41, "attack, all of it": 60})


def write(path, result):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(result if isinstance(result, str) else json.dumps(result))
    return path


def small(results, **changes):
    return write(results / "digits/attack.json", attack_result(**changes))


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """A repository's results/ of its own: a copy of the committed JSON, and both pages with empty tables."""
    folder = tmp_path / "repository/results"
    shutil.copytree(COMMITTED, folder, ignore=shutil.ignore_patterns("*.png", "*.md"))
    names = ("table1", "runs", "table2", "benchmark", "story", "summary")
    markers = "".join(f"<!-- {name} -->old<!-- /{name} -->" for name in names)
    for page in (folder / "README.md", folder.parent / "README.md"):
        page.write_text(f"before {markers} <!-- other -->kept<!-- /other --> after")
    monkeypatch.setattr(report, "SHIPPED", folder)
    return folder


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def between(page, name):
    return page.read_text().split(f"<!-- {name} -->")[1].split(f"<!-- /{name} -->")[0].strip()


# ---------------------------------------------------------------------------------------------------------
# Publishing

def test_publishing(shipped, tmp_path, capsys):
    """One's own results are copied, every figure is drawn, and the tables of both pages say what the results say."""
    own = tmp_path / "runs/results"
    write(own / "apple/attack.json", attack_result())
    write(own / "digits/story.json", story_result())
    shutil.copy(COMMITTED / "digits/triggers.npz", own / "apple/triggers.npz")
    report.report(own, publish=True)
    assert json.loads((shipped / "apple/attack.json").read_text()) == attack_result()
    results = [path for path in shipped.glob("*/*.json") if path.stem in figures.FIGURES]
    assert {path.stem for path in results} >= set(figures.FIGURES), "there is a result of every kind"
    for path in [*results, *shipped.glob("*/triggers.npz")]:
        assert path.with_suffix(".png").stat().st_size > 10_000, path
    assert not list(own.rglob("*.png")) and not list(tmp_path.rglob("*.tmp"))
    for page in (shipped / "README.md", shipped.parent / "README.md"):
        text = page.read_text()
        assert text.startswith("before <!-- table1 -->\n| data |") and "old<" not in text
        assert text.endswith("<!-- other -->kept<!-- /other --> after")
        assert "**apple** | **own**, 1.08 to 1.12 |" in between(page, "table1")
        assert "**gtsrb**" in between(page, "table1") and "**gtsrb**" in between(page, "table2")
        assert "| as shipped, threshold 1.09 | 98.1 | 1.0 | 94.0 | 96.0 |" in between(page, "story")
        assert "| gtsrb" in between(page, "summary")
        assert "LIF layer" in between(page, "benchmark")
    assert "apple" in capsys.readouterr().out


def test_the_committed_page_is_what_the_results_say(shipped, monkeypatch):
    """The page in results/ has the tables that `report --publish` makes; README.md has its two."""
    monkeypatch.setattr(report, "FIGURES", dict.fromkeys(figures.FIGURES, lambda r, path: None))
    monkeypatch.setattr(report, "figure_triggers", lambda folder: None)
    report.report(shipped, publish=True)
    for name in ("table1", "runs", "table2", "benchmark"):
        assert between(COMMITTED / "README.md", name) == between(shipped / "README.md", name), name
    for name in ("story", "summary"):
        assert between(ROOT / "README.md", name) == between(shipped / "README.md", name), name


def test_nothing_is_written_outside_without_publish(shipped, tmp_path, capsys):
    results, before = tmp_path / "runs/results", contents(shipped.parent)
    small(results)
    write(results / "digits/story.json", story_result())
    report.report(results)
    report.print_story(read_result(results / "digits/story.json"), results / "digits")
    report.print_attack(attack_result())
    assert contents(shipped.parent) == before
    assert {path.name for path in tmp_path.rglob("*.png")} == {"attack.png", "story.png"}
    assert {path.parent for path in tmp_path.rglob("*.png")} == {results / "digits"}
    out = capsys.readouterr().out
    assert "own, 1.08 to 1.12  96.0 ± 1.4  1.0" in out and "|" not in out


def test_a_damaged_result_is_not_published(shipped, tmp_path):
    before = contents(shipped.parent)
    small(tmp_path / "runs")
    write(tmp_path / "runs/gtsrb/attack.json", '{"rows": [')
    with pytest.raises(ValueError, match="gtsrb/attack.json: not a readable result"):
        report.report(tmp_path / "runs", publish=True)
    assert contents(shipped.parent) == before


# ---------------------------------------------------------------------------------------------------------
# Figures

def test_a_curve_goes_through_the_means_and_shows_every_seed():
    from matplotlib.figure import Figure
    axis = Figure().subplots()
    rows = [dict(q=2, ca=90.0), dict(q=4, ca=50.0), dict(q=2, ca=80.0), dict(q=4, ca=60.0)]
    figures.curve(axis, rows, "q", "ca")
    seeds, mean = axis.lines
    assert mean.get_xydata().tolist() == [[2, 85], [4, 55]]
    assert sorted(map(tuple, seeds.get_xydata())) == [(2, 80), (2, 90), (4, 50), (4, 60)] and seeds.get_alpha() < 0.5
    figures.curve(axis, rows[:2], "q", "ca")
    assert len(axis.lines) == 3, "one seed: no pale points"
    figures.curve(axis, [dict(q=2, asr_o=None)], "q", "asr_o")
    assert len(axis.lines) == 3, "nothing was measured, nothing is drawn"


def test_mean_in_the_committed_figure_is_the_mean_in_the_table():
    """The figure averages the seeds itself, the table reads what `attack` averaged."""
    for path in COMMITTED.glob("*/attack.json"):
        r = read_result(path)
        rows = [(mean, [run["rows"][i] for run in r["runs"]]) for i, mean in enumerate(r["rows"])]
        for mean, seeds in [*rows, (r["at_chosen"], [run["at_chosen"] for run in r["runs"]])]:
            for key in ("ca", "target_rate", "asr_p", "asr_p_clean_model"):
                assert np.mean([row[key] for row in seeds]) == pytest.approx(mean[key], abs=0.006)


def test_the_storys_figure(tmp_path):
    """Three curves through V_a, too, where the curve has no such row."""
    figures.figure_story(story_result(), tmp_path / "story.png")
    figures.figure_story(story_result() | dict(at_chosen=row(1.25, 50.0, 100.0)), tmp_path / "last.png")
    assert min(path.stat().st_size for path in tmp_path.glob("*.png")) > 10_000


def test_the_best_trigger_is_marked(tmp_path, monkeypatch):
    """Of those no larger than T_p the smallest with 95 %; else the strongest."""
    def best(*rows):
        rows = [dict(lambda_adv=1.0, magnitude=m, v_thr=1.1, l2=l2, l2_p=5.0, asr_o=asr) for m, l2, asr in rows]
        labels = []
        monkeypatch.setattr(figures.Figure, "legend", lambda self, lines, names, **others: labels.extend(names))
        figures.figure_trigger(dict(SETTINGS, rows=rows), tmp_path / "trigger.png")
        return next(label for label in labels if "best" in label)
    assert best((0.5, 2.0, 80.0), (0.7, 3.0, 96.0), (0.9, 4.0, 99.0), (1.0, 6.0, 100.0)) == "best, m = 0.7"
    assert best((0.5, 2.0, 80.0), (0.9, 4.0, 90.0), (1.0, 6.0, 100.0)) == "best, m = 0.9"
    assert best((1.0, 6.0, 90.0), (2.0, 8.0, 94.0)) == "best, m = 2"


def test_a_failing_figure_leaves_the_old_one(tmp_path):
    with pytest.raises(ZeroDivisionError), figures.drawing(tmp_path / "figure.png", (1, 1), None):
        1 / 0
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------
# Tables

def test_table1_by_hand(tmp_path):
    lines = tables.table1({"digits": read_result(small(tmp_path))}).splitlines()
    assert lines[2:] == [
        "| **digits** | **own**, 1.08 to 1.12 | 96.0 ± 1.4 | 1.0 | 75.0 ± 7.1 | 0.5 | 80.0 | - | - | 75.0 / 0.2 |  |",
        "|  | 1.1 | 94.0 | 1.0 | 75.5 | 0.5 | 80.0 | - | - | 75.5 / 0.2 |  |"]
    assert len(tables.table1({"digits": attack_result()}, every=True).splitlines()) == 5, "V_a 1.0, too"
    with_paper = tables.table1({"gtsrb": attack_result()}).splitlines()[-1]
    assert with_paper.endswith("| 92.6 / 39.8 / 75.6 |"), "the paper's numbers at the same V_a"


def test_old_results_are_shown_with_what_they_have(tmp_path):
    r = read_result(write(tmp_path / "digits/attack.json", old_result()))
    line = "| 96.0 | 1.0 | 60.0 | 0.5 | - | - | - | 60.0 / - |  |"
    assert tables.table1({"digits": r}).splitlines()[2:] == [f"| **digits** | **own**, 1.1 {line}", f"|  | 1.1 {line}"]
    line = tables.table_runs({"digits": r}).splitlines()[-1]
    assert line.endswith("| 1 | target 0, S_t (1.5, 0.5), q 8 | 2 min, cpu, bfloat16 "
                         "| V_a chosen on the test set; older recipe |")
    report.print_attack(r)
    report.report(tmp_path)
    assert (tmp_path / "digits/attack.png").exists()


def test_table1_against_the_committed_seeds():
    """digits at its own V_a: mean and standard deviation of the seeds, computed here."""
    r = json.loads((COMMITTED / "digits/attack.json").read_text())
    rows = [run["at_chosen"] for run in r["runs"]]
    cells = [cell.strip() for cell in tables.table1({"digits": r}).splitlines()[2].split("|")]
    for cell, key in zip(cells[3:6], ("ca", "target_rate", "asr_p")):
        mean, *spread = map(float, cell.split("±"))
        assert mean == pytest.approx(np.mean([row[key] for row in rows]), abs=0.051)
        assert not spread or spread == [pytest.approx(np.std([row[key] for row in rows], ddof=1), abs=0.051)]


def test_events_have_their_own_control():
    """T_s beside the clip alone; beta instead of q; no T_o."""
    at = dict(row(1.2, 90.0, 20.0), asr_clip_only=15.0, asr_clip_only_clean_model=40.0)
    r = attack_result(q=None, beta=0.03, rows=[at], at_chosen=at, spread={})
    line = tables.table1({"nmnist": r}).splitlines()[2]
    assert line == "| **nmnist** | **own**, 1.08 to 1.12 | 90.0 | 1.0 | 20.0 | 0.5 | 80.0 | - | - | 15.0 / 40.0 |  |"
    assert "beta 0.03 |" in tables.table_runs({"nmnist": r})


def test_runs_say_how_they_were_made():
    line = tables.table_runs({"digits": attack_result()}).splitlines()[-1]
    assert line == ("| **digits** | 99.0 ± 1.4 | 98.0 ± 0.0 |  | resnet19, width 16, T 4 | 1,437 + 360 | 72 | 16 | 2 "
                    "| target 0, S_t (1.15 to 1.5, 0.5), q 8 | 2 min, cpu, float32 |  |")
    line = tables.table_runs({"digits": attack_result(amp="on", tau_t="learned", note="simulated")}).splitlines()[-1]
    assert "(1.15 to 1.5, learned)" in line and line.endswith("bfloat16 | simulated |"), "PLIF; bfloat16; the note"


def test_unknown_sets_come_last_and_variants_behind_their_set():
    names = "zebra ndigits nmnist-binary cifar10_10k apple cifar10 nmnist digits cifar100_32rows cifar100".split()
    ordered = list(tables.in_order(dict.fromkeys(names)))
    assert ordered == ("digits cifar10 cifar10_10k cifar100 cifar100_32rows nmnist nmnist-binary ndigits apple "
                       "zebra").split()
    table = tables.table1({name: attack_result() for name in names})
    assert [line.split("**")[1] for line in table.splitlines() if "| **" in line[:4]] == ordered


def defense_row(attack, defense, **changes):
    trigger = "T_o" if attack == "badsnn" else attack
    return dict(dict(attack=attack, defense=defense, trigger=trigger, v_thr=1.1, ca=90.0, asr=80.0, asr_p=70.0,
                     target_rate=2.0, destroyed=False), **changes)


def test_table2_by_hand(tmp_path):
    """BadSNN has a line for each trigger; what a defence destroyed is marked; what was not run is '-'; the paper's
    cells stand under theirs, whatever the order and number of ours; a variant of a set has the set's; a line for what
    is left when the threshold is set back as well, where that was measured; spreads; what was not learned."""
    rows = [defense_row("badsnn", "nad", restored=dict(ca=89.0, target_rate=0.0, asr=5.0)),
            defense_row("badsnn", "none", ca=30.0, destroyed=True, asr_clean_model=6.1,
                        restored=dict(ca=178.1, target_rate=0.0, asr=7.0)),
            defense_row("wanet", "none"), defense_row("own", "none", asr=49.0, spread=dict(ca=1.0, asr=2.0)),
            defense_row("wanet", "mine")]
    triggers = [("badsnn", "T_o"), ("badsnn", "T_p"), ("wanet", "wanet"), ("own", "own")]
    result = dict(SETTINGS, rows=rows, detectors=[dict(attack=attack, trigger=trigger) for attack, trigger in triggers],
                  n_defender=100, v_thr_d=1.1)
    r = read_result(write(tmp_path / "gtsrb_small/defend.json", result))
    assert tables.table2({"gtsrb_small": r}).splitlines() == [
        "| data, attack | nad | none | mine |", "|---|---|---|---|",
        "| **gtsrb_small**, seed 0, 100 images for the defender, clean model 99.0, 2 min |  |  |  |",
        "| badsnn (T_o), V_a 1.1, clean model 6.1 | 90.0 / 80.0 / 2.0 | 30.0 / 80.0 / 2.0 † | - |",
        "| badsnn (T_p), V_a 1.1 | 90.0 / 70.0 / 2.0 | 30.0 / 70.0 / 2.0 † | - |",
        "| badsnn (T_o, threshold set back) | 89.0 / 5.0 / 0.0 † | 178.1 / 7.0 / 0.0 | - |",
        "| *paper* | *70.1 / 9.9* | *87.4 / 85.0* |  |",
        "| wanet, clean model - | - | 90.0 / 80.0 / 2.0 | 90.0 / 80.0 / 2.0 |",
        "| *paper* | *31.9 / 2.9* | *96.0 / 99.8* |  |",
        "| own, clean model -, **not learned** | - | (90.0 ± 1.0 / 49.0 ± 2.0 / 2.0) | - |"]


def test_defend_draws_the_attacks_that_were_run(tmp_path):
    """One attack alone, and as many as there can be: names and number come from the rows."""
    for attacks in (["badnets"], ["badsnn", "badnets", "blend", "wanet", "clean_label", "own"]):
        rows = [defense_row(a, d, destroyed=d == "anp") for a in attacks for d in ("none", "anp")]
        detectors = [dict(attack=a, trigger=a, strip_auroc=0.5, spikes_auroc=0.9) for a in attacks]
        figures.figure_defend(dict(SETTINGS, rows=rows, detectors=detectors), tmp_path / f"{len(attacks)}.png")
    assert all(path.stat().st_size > 10_000 for path in tmp_path.iterdir()) and len(list(tmp_path.iterdir())) == 2


# ---------------------------------------------------------------------------------------------------------
# report: what is printed, what is rewritten, what is refused

def test_a_study_alone_is_reported(tmp_path, capsys):
    rows = [row(1.1 + ratio, 95.0, 50.0, poison_ratio=ratio, seed=seed) for ratio in (0.01, 0.02) for seed in (0, 1)]
    write(tmp_path / "digits/poison.json", dict(SETTINGS, rows=rows))
    report.report(tmp_path)
    assert (tmp_path / "digits/poison.png").exists() and "poison.png" in capsys.readouterr().out


def test_print_attack(capsys, shipped):
    """One's own V_a, the repository's numbers, the curve, how it was made; a note where the clean model answers."""
    write(shipped / "digits/attack.json", attack_result(at_chosen=row(1.1, 91.0, 88.0), spread={}, note="older recipe"))
    report.print_attack(attack_result())
    out = capsys.readouterr().out
    lines = {line.split("  ")[0]: line.split("  ") for line in out.splitlines()}
    values = {name: [text.strip() for text in line[1:] if text] for name, line in lines.items()}
    assert values["V_a"] == ["own, 1.08 to 1.12", "own, 1.08 to 1.12", "1", "1.1"]
    assert values["data"][:2] == ["digits", "shipped with this repository"]
    assert values["CA"] == ["96.0 ± 1.4", "91.0", "98.0", "94.0"]
    assert values["ASR_p"] == ["75.0 ± 7.1", "88.0", "1.0", "75.5"]
    assert values["what T_p leaves"] == ["80.0"] * 4 and "ASR_o" not in values, "nothing measured, no line"
    assert "shipped with this repository: older recipe." in out and "resnet19, width 16" in out and "NOTE" not in out
    at = row(1.1, 94.0, 75.5, asr_p_clean_model=60.0, asr_o=80.0, asr_o_clean_model=2.0)
    report.print_attack(attack_result(dataset="apple", at_chosen=at))
    out = capsys.readouterr().out
    assert "NOTE: T_p reaches 60.0 % on the CLEAN model" in out and out.count("NOTE") == 1 and "shipped" not in out
    report.print_attack(attack_result(q=None, beta=0.03))
    assert "what T_s leaves" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------
# The story

def test_the_verdict():
    assert "\n".join(report.verdict(story_result())) == """\
With the threshold at 1.09 the network is right on 98 of 100 test images, as good as at 1.0 (99); \
untriggered, 1 of 100 images of other classes become class 0.
With the power trigger T_p, 94 of 100 images of other classes become class 0; \
a clean network under the same trigger calls 3 of 100 class 0 and reads 61 of 100 right.
With the optimised trigger T_o, 96 of 100 images of other classes become class 0; \
a clean network under the same trigger calls 7 of 100 class 0 and reads 83 of 100 right.
Setting the threshold back to 1.0 ends T_p (3 of 100) and weakens T_o (41 of 100); \
fine-tuning on 100 clean images weakens T_p (12 of 100) and ends T_o (2 of 100).
The threshold scan scores the shipped network 0.98 and a clean one 0.41 (higher is more suspicious) \
and accuses class 0, which is right."""


def test_the_verdict_says_what_went_wrong():
    """A lower accuracy, a trigger that needs no backdoor, none at all, defences that fail or cost, a scan that errs."""
    sentences = list(report.verdict(story_result(
        ours=(80.0, 12.0, 90.0, None), back=(99.0, 0.0, 64.0, None), tuned=(70.0, 0.0, 85.0, None), clean=(60.0, None),
        scan=((0.42, 3), (0.41, 7)))))
    for sentence, end in zip(sentences, (
            "clearly worse than at 1.0 (99); untriggered, 12 of 100 images of other classes become class 0.",
            "60 of 100 class 0 and reads 61 of 100 right: most of it is the trigger's doing, not the backdoor's.",
            "There is no optimised trigger T_o: no training image could be blended into class 0.",
            "fine-tuning on 100 clean images does not stop T_p (85 of 100) and costs accuracy (70 of 100 right).",
            "which does not tell them apart; it accuses class 3, which is wrong: the target is class 0."), strict=True):
        assert sentence.endswith(end)
    assert "back to 1.0 leaves T_p what it does to a clean network (64 of 100); fine" in sentences[3]
    sentences = list(report.verdict(story_result(ours=(97.0, 1.0, 6.0, 96.0))))
    assert "a little worse than at 1.0" in sentences[0] and "finds no T_p to end (3 of 100)" in sentences[3]
    assert sentences[1].endswith(": the trigger adds little to what happens without it.")


def test_print_story(tmp_path, capsys):
    report.print_story(story_result(), tmp_path)
    out = capsys.readouterr().out
    for line in ("as shipped, threshold 1.09      98.1         1.0        94.0        96.0",
                 "clean model, threshold 1.09     99.2", "threshold set back to 1.0       99.0",
                 "fine-tuned on 100 clean images  97.0"):
        assert line in out
    assert "Where the time went: training 41 s; attack, all of it 60 s.\n" in out
    assert (tmp_path / "story.png").stat().st_size > 10_000
    table = tables.table_story(story_result(ours=(80.0, 12.0, 90.0, None), clean=(60.0, None)))
    assert "| as shipped, threshold 1.09 | 80.0 | 12.0 | 90.0 | - |" in table


def test_as_text():
    table = "| data | a very long title | empty |\n|---|---|---|\n| **x** | 1.0 |  |\n|  | 10.0 |  |"
    assert tables.as_text(table).splitlines() == ["data  a very long", "      title", "x     1.0", "      10.0"]
    assert tables.as_text(table, turned=True).splitlines() == ["data               x", "a very long title  1.0  10.0"]


@pytest.mark.parametrize("content, reason", [('{"rows": [', "Expecting value"), ("\0", "Expecting value"),
                                             ("[]", "no rows"), ('{"rows": []}', "no rows"), ("{}", "no 'rows'")])
def test_a_damaged_result_is_named(tmp_path, content, reason):
    small(tmp_path)
    write(tmp_path / "gtsrb/attack.json", content)
    with pytest.raises(ValueError, match=f"gtsrb/attack.json: not a readable result .{reason}.*; run the command"):
        report.report(tmp_path)
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize("key", ["runs", "q", "model", "seeds", "ca", "asr_p", "at_chosen"])
def test_a_result_that_lacks_a_key_is_named(tmp_path, key):
    result = attack_result()
    for part in [result["at_chosen"], *result["rows"]] if key in ("ca", "asr_p") else [result]:
        del part[key]
    write(tmp_path / "digits/attack.json", result)
    with pytest.raises(ValueError, match=f"digits/attack.json: not a readable result .no '{key}' in it"):
        report.report(tmp_path)


@pytest.mark.parametrize("name", ["defend", "threshold", "heatmap", "poison", "magnitude", "power", "trigger", "plif",
                                  "story"])
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
