"""What the results say: every table and figure from results/ alone, and what commands print at their end.

    report(Path("runs/results"))            every figure beside its JSON; prints Table 1
    report(Path("runs/results"), True)      for maintainers: the same for the repository's results/, and its tables

Nothing here trains or loads data. The tables are made in tables.py, the figures in figures.py.
"""
import shutil

from kit.files import ROOT, replace_file, write_text
from kit.machine import say
from lab import tables
from lab.figures import FIGURES, figure_triggers

SHIPPED = ROOT / "results"      # the repository's own, which only publish=True changes
TEXT1 = """# Table 1

In percent. CA: test samples answered right. target_rate, ASR_p, ASR_o: samples of other classes answered as the target
without trigger, with T_p (events: T_s), with T_o. Clean model: without backdoor, same threshold and trigger; it reads:
its accuracy on triggered samples at 1.0. Own: the V_a of each seed, chosen on held-out samples; other V_a and the last
column, CA / ASR_p / ASR_o: the paper's. Mean ± standard deviation over seeds, or every seed where that is as large as
the mean. First each data set's network with the highest held-out CA; then all; then what they were made with."""
TEXT2 = """# Table 2

CA / ASR / target_rate (see [Table 1](table1.md)) after each defence; behind an attack, the threshold in use. Brackets:
the attack was not learned (ASR below 50). †: CA fell below half of what it is without the defence. Set back: to 1.0
after the defence. Clean model: without backdoor, but shipped and repaired alike. Last column, without a defence: AUROC
of STRIP and of the spike count; score of the threshold scan (1: suspicious); whether it accuses the target (1: yes)."""


def report(results, publish=False):
    """Draws every figure beside its JSON below `results` and prints Table 1. publish: copies the results to the
    repository's, draws those, and writes table1.md and table2.md there. Raises ValueError that names a damaged file."""
    found = {path: tables.read_result(path) for path in sorted(results.glob("*/*.json")) if path.stem in FIGURES}
    if not found:
        raise ValueError(f"no attack.json below {results}/; run 'python badsnn.py attack' first")
    if publish and results.resolve() != SHIPPED.resolve():
        report(results)         # what cannot be drawn is not copied
        for path in [*found, *results.glob("*/triggers.npz")]:
            with replace_file(SHIPPED / path.relative_to(results)) as part:
                shutil.copyfile(path, part)
        return report(SHIPPED, publish)
    attacks, defends = ({path.parent.name: r for path, r in found.items() if path.stem == kind}
                        for kind in ("attack", "defend"))
    for path, r in found.items():
        draw(path, r, path.with_suffix(".png"))
    for path in results.glob("*/triggers.npz"):
        figure_triggers(path.parent)
    print(f"\n{tables.as_text(tables.table1(attacks))}")
    if publish:
        pages = {"table1": [TEXT1, tables.table_summary(attacks), tables.table1(attacks), tables.table_runs(attacks)],
                 "table2": [TEXT2, tables.table2(defends)]}
        for name, parts in pages.items():
            write_text(SHIPPED / f"{name}.md", "\n\n".join(parts) + "\n")


def draw(path, r, figure):
    """The figure of the result r in path. Raises ValueError that names path where r is of another shape."""
    try:
        FIGURES[path.stem](r, figure)
    except (TypeError, AttributeError, LookupError) as error:
        raise tables.unreadable(path, repr(error)) from None


def print_attack(r):
    """What `attack` prints: how it was made, the curve of Table 1, and the repository's own row beside it."""
    found, path = {r["dataset"]: r}, SHIPPED / r["dataset"] / "attack.json"
    lines = tables.table1(found, every=True).splitlines()
    if path.exists():
        lines.insert(3, tables.table1({"shipped with this repository": tables.read_result(path)}).splitlines()[2])
    for table in (tables.table_runs(found), "\n".join(lines)):
        say(f"\n{tables.as_text(table, turned=True)}")
    say("\nCA: percent right without trigger. ASR, target_rate: percent of the other classes answered as the target, "
        "with and\nwithout trigger. Own: each seed at the V_a chosen on its held-out samples (Eq. 8). Clean model: "
        "without backdoor, same\nthreshold, same trigger; it reads: its accuracy on triggered samples, at 1.0.")


def print_scan(r):
    """What `scan` prints: how well the detector tells models and who evades it, or a line per model."""
    for row in [] if "summary" in r else r["rows"]:
        say(f"{row['kind']}, seed {row['seed']}: CA {row['ca']:.1f}, shipped at {row['v_thr_a']:g}; score "
            f"{row['scores']['100 images']:.2f}, class {row['accused']} accused")
    for shown, at in r.get("summary", {}).items():
        say("{0}: AUROC {auroc:.3f} (95 %: {interval}); alarm above {alarm:.2f}: {caught:.1f} % of the backdoored "
            "models, {false_alarms:.1f} % of the clean ones".format(shown, **at))
    for name in tables.unique(r["evaders"], "evader"):
        rows = [row | row["scores"] for row in r["evaders"] if row["evader"] == name]
        cells = [tables.cell(rows, key) for key in ("ca", "target_rate", "asr_p", "asr_p_clean_model")]
        say("hidden by {}: CA {}; target_rate {}; ASR_p {}, on a clean model {}; ".format(name, *cells)
            + f"score {tables.cell(rows, '100 images', digits=2)}")


def print_story(r, folder):
    """What `story` prints, and story.png in the folder: a table, and three sentences of numbers."""
    at, scan, rows = r["attack"]["at_chosen"], r["scan"], []
    titles = dict(none="as shipped", nominal="threshold set back", fine_tune="fine-tuned", anp="ANP",
                  anp_nominal="ANP, threshold set back", clean="clean model, shipped alike")
    for answer in tables.unique(r["rows"], "answer"):
        of = [row for row in r["rows"] if row["answer"] == answer]
        rows.append([titles[answer], *(tables.cell(of, key) for key in ("ca", "target_rate", "asr_p", "asr_o"))])
    table = tables.markdown("network | right class (CA) | target, no trigger | target, T_p | target, T_o", rows)
    accused = ", ".join(str(one["accused"]) for one in scan)
    scores = [tables.cell(scan, key, digits=2) for key in ("backdoored", "clean")]
    say(f"\n{tables.as_text(table)}\n\nShipped at threshold {at['v_thr']:.2f} instead of 1.0; percent of the test "
        f"images less {r['n_defender']}, which the defender has.\nThe target is class {r['target']}; the threshold "
        f"scan accuses class {accused}.\nIts score is {scores[0]}, of a clean network {scores[1]}.")
    FIGURES["story"](r, folder / "story.png")
