"""Tables, figures and what is printed, from results alone: the committed ones, copied, and small ones made by hand."""
import shutil
from pathlib import Path

import numpy as np
import pytest

from lab import figures, report, tables

COMMITTED = Path(report.__file__).parent.parent / "results"


def defense_row(attack, defense, **changes):
    trigger = "T_o" if attack == "badsnn" else attack
    return dict(attack=attack, defense=defense, trigger=trigger, seed=0, setting="shipped", model="attacked",
                v_thr=1.1, ca=90.0, target_rate=2.0, asr=80.0) | changes


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def committed(kind):
    return {path.parent.name: tables.read_result(path) for path in sorted(COMMITTED.glob(f"*/{kind}.json"))}


def lines_of(table):
    """The cells of a Markdown table's lines, without its two head lines."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]


def holds(text, values):
    """Whether a cell says what these numbers of seeds are: "mean ± deviation", or each of them."""
    if "±" in text:
        mean, spread = map(float, text.split("±"))
        return (mean, spread) == pytest.approx((np.mean(values), np.std(values, ddof=1)), abs=0.051)
    if text.endswith(")"):
        return text == f"{np.median(values):.1f} ({min(values):.1f} to {max(values):.1f})" and len(values) > 5
    return text == ("-" if values == [None] * len(values) else ", ".join(f"{value:.1f}" for value in values))


# ----- Tables

def test_table1_says_what_the_seeds_say():
    """All committed rows: nine columns, read back, against the mean and deviation computed here."""
    found, checked = committed("attack"), 0
    for line in lines_of(tables.table1(found, every=True)):
        if line[0]:
            runs = found[line[0].strip("*")]["runs"]
        rows = [run["at_chosen"] for run in runs]
        if "own" not in line[1]:
            rows = [row for run in runs for row in run["rows"] if row["v_thr"] == float(line[1])]
        for cell, key in zip(line[2:], ("ca", "target_rate", "asr_p", "asr_o", "ca_clean_model",
                                        "target_rate_clean_model", "asr_p_clean_model", "asr_o_clean_model")):
            assert holds(cell, [row.get(key) for row in rows]), (line[:2], key)
            checked += 1
    assert checked > 500


def test_table2_by_hand():
    """Brackets: not learned. †: destroyed. What was not run is "-". The paper's cells stand under theirs."""
    rows = [defense_row("badsnn", "none", ca=90.0), defense_row("badsnn", "nad", ca=30.0),
            defense_row("badsnn", "none", setting="nominal", v_thr=1.0, asr=7.0), defense_row("own", "none", asr=49.0)]
    seen = dict(attack="badsnn", trigger="T_o", strip_auroc=0.5, spikes_auroc=0.9, scan_score=0.99, scan_right=1.0)
    r = dict(rows=rows, n_defender=100, detectors=[seen], scan_clean_model=0.2, clean_ca=99.0, note="")
    assert tables.table2({"gtsrb_small": r}).splitlines()[2:] == [
        "| **gtsrb_small**, seeds: 1, 100 images for the defender, clean model 99.0.  |  |  | score of "
        "the clean model 0.20 |",
        "| badsnn (T_o), at 1.10 | 90.0 / 80.0 / 2.0 | 30.0 / 80.0 / 2.0 † | 0.50 / 0.90 / 0.99 / 1.00 |",
        "| badsnn (T_o), threshold set back, at 1.00 | 90.0 / 7.0 / 2.0 | - |  |",
        "| own, at 1.10 | (90.0 / 49.0 / 2.0) | - |  |",
        "| *paper: badsnn T_o, V_a 1.2* | *87.4/85.0* | *70.1/9.9* |  |"]


def test_cells():
    """Every seed where the deviation is as large as the mean; some seeds lack a number."""
    assert tables.cell([dict(a=0.0), dict(a=85.4), dict(a=0.2)], "a") == "0.0, 85.4, 0.2"
    assert tables.cell([dict(a=1.0, b=None), dict(a=1.0, b=2.0)], "a", "b", digits=0) == "1 ± 0 / 2 (1 of 2 seeds)"


# ----- Figures and pages

def test_everything_committed_draws_and_is_published(tmp_path, capsys):
    """Every figure is drawn; the committed pages are what the results say."""
    shipped = tmp_path / "repository"
    shutil.copytree(COMMITTED, shipped, ignore=shutil.ignore_patterns("*.png", "*.md"))
    report.report(shipped, publish=True)
    drawn = [path for path in shipped.glob("*/*") if path.suffix == ".npz" or path.stem in figures.FIGURES]
    assert {path.stem for path in drawn} == {*figures.FIGURES, "triggers"}, "there is a result of every kind"
    assert min(path.with_suffix(".png").stat().st_size for path in drawn) > 10_000
    for name in ("table1.md", "table2.md"):
        assert (shipped / name).read_text() == (COMMITTED / name).read_text(), "run report(COMMITTED, publish=True)"
    assert "cifar100_shifts" in capsys.readouterr().out


# ----- What commands print

def test_printing(tmp_path, capsys):
    """The numbers of the committed results stand in what is printed."""
    attack, story, scan = (committed(kind)["digits"] for kind in ("attack", "story", "scan"))
    report.print_attack(attack)
    report.print_scan(scan)
    report.print_story(story, tmp_path)
    out = capsys.readouterr().out
    own = [run["at_chosen"]["ca"] for run in attack["runs"]]
    shipped = [row["asr_p"] for row in story["rows"] if row["answer"] == "none"]
    wanted = [f"{np.mean(seeds):.1f} ± {np.std(seeds, ddof=1):.1f}" for seeds in (own, shipped)]
    wanted += ["accuses class 0", f"margin scan, working: AUROC {scan['summary']['margin scan, working']['auroc']:.3f}"]
    assert [text for text in wanted if text not in out] == [] and (tmp_path / "story.png").exists()


# ----- Damaged files: one line that names the file

@pytest.mark.parametrize("name", sorted(figures.FIGURES))
def test_a_damaged_result_is_named(tmp_path, name):
    for content, reason in (('{"rows": [', "Expecting value"), ("[]", "no rows"), ('{"rows": [{}]}', "KeyError")):
        path = write(tmp_path / f"gtsrb/{name}.json", content)
        with pytest.raises(ValueError, match=f"gtsrb/{name}.json: not a readable result .*{reason}.* its command"):
            report.report(tmp_path)
        assert [*path.parent.iterdir()] == [path]


def test_what_else_is_named(tmp_path):
    """Damaged images, a folder without results."""
    write(tmp_path / "digits/attack.json", (COMMITTED / "digits/attack.json").read_text())
    write(tmp_path / "digits/triggers.npz", "half a fi")
    with pytest.raises(ValueError, match="digits/triggers.npz: not a readable result"):
        report.report(tmp_path)
    with pytest.raises(ValueError, match="no attack.json below"):
        report.report(tmp_path / "nothing")
