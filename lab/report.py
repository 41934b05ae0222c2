"""What the results say: every table and figure from results/ alone, and what commands print at their end."""
import shutil

from kit.files import ROOT, replace_file, write_text
from kit.machine import say
from lab import demo, tables
from lab.figures import FIGURES, figure_triggers

SHIPPED = ROOT / "results"      # the repository's own, which only publish=True changes
TEXT1 = """In percent. CA: test samples answered right. target_rate, ASR_p, ASR_o: samples of other classes answered as
the target without trigger, with T_p (events: T_s), with T_o. Clean model: without backdoor, same threshold and trigger;
it reads: triggered samples it answers right, at 1.0. Own: the V_a of each seed, chosen on held-out samples; other V_a
and the last column, CA / ASR_p / ASR_o: the paper's. Mean ± standard deviation over seeds, or every seed where that is
as large as the mean."""
TEXT2 = """CA / ASR / target_rate ([Table 1](table1.md)) after each defence, at the threshold behind an attack's name.
Brackets: the attack was not learned (ASR below 50). †: CA fell below half of what it is without the defence. Set back:
to 1.0 after the defence. Clean model: without backdoor, but shipped and repaired alike. Last column, without a defence:
AUROC of STRIP and of the spike count; score of the threshold scan (1: suspicious); does it accuse the target (1)?"""


def report(results, publish=False):
    """Draws every figure beside its JSON below `results` and prints Table 1. publish: copies the results to the
    repository's, draws those, and writes table1.md and table2.md there. Raises ValueError that names a damaged file."""
    found = {path: tables.read_result(path) for path in sorted(results.glob("*/*.json")) if path.stem in FIGURES}
    if not found:
        raise ValueError(f"no attack.json below {results}/; run 'python badsnn.py attack' first")
    if publish and results.resolve() != SHIPPED.resolve():
        report(results)         # what cannot be drawn is not copied
        for path in [*found, *results.glob("*/triggers.npz"), *results.glob("*/demo.json")]:
            with replace_file(SHIPPED / path.relative_to(results)) as part:
                shutil.copyfile(path, part)
        return report(SHIPPED, publish)
    for path, r in found.items():
        try:
            FIGURES[path.stem](r, path.with_suffix(".png"))
        except (TypeError, AttributeError, LookupError) as error:       # a result of another shape
            raise tables.unreadable(path, repr(error)) from None
    for path in results.glob("*/triggers.npz"):
        figure_triggers(path.parent)
    for path in results.glob("*/demo.json"):
        demo.write_page(path, SHIPPED.parent / "docs/index.html" if publish else path.with_suffix(".html"))
    attacks = {path.parent.name: r for path, r in found.items() if path.stem == "attack"}
    defends = {path.parent.name: r for path, r in found.items() if path.stem == "defend"}
    table1 = tables.table1(attacks)
    print(f"\n{tables.as_text(table1)}")
    if publish:
        write_text(SHIPPED / "table1.md", f"# Table 1\n\n{TEXT1}\n\n{table1}\n\n{tables.table_runs(attacks)}\n")
        write_text(SHIPPED / "table2.md", f"# Table 2\n\n{TEXT2}\n\n{tables.table2(defends)}\n")


def print_attack(r):
    """What `attack` prints: how it was made, and the curve of Table 1."""
    found = {r["dataset"]: r}
    for table in (tables.table_runs(found), tables.table1(found, every=True)):
        say(f"\n{tables.as_text(table, turned=True)}")
    say(f"\n{TEXT1}")


def print_scan(r):
    """What `scan` prints: how well the detector tells models and who evades it, or a line per model."""
    for row in [] if "summary" in r else r["rows"]:
        say(f"{row['kind']}, seed {row['seed']}: CA {row['ca']:.1f}, shipped at {row['v_thr_a']:g}; score "
            f"{row['scores']['100 images']:.2f}, class {row['accused']} accused")
    for shown, at in r.get("summary", {}).items():
        say(f"{shown}: AUROC {tables.cell([at], 'auroc', digits=3)} (95 %: {at['interval']}); alarm above "
            f"{at['alarm']:.2f}; caught / false alarms: {tables.cell([at], 'caught', 'false_alarms')} %")
    for name in tables.unique(r["evaders"], "evader"):
        of = [row | row["scores"] for row in r["evaders"] if row["evader"] == name]
        say(f"evader {name}: CA / target_rate / ASR_p {tables.cell(of, 'ca', 'target_rate', 'asr_p')}, of a clean "
            f"model {tables.cell(of, 'asr_p_clean_model')}; score {tables.cell(of, '100 images', digits=2)}")


def print_story(r, folder):
    """What `story` prints, and story.png in the folder: a table, and three sentences of numbers."""
    rows, v_thr, scan = [], r["attack"]["at_chosen"]["v_thr"], r["scan"]
    titles = dict(none="as shipped", nominal="threshold set back", fine_tune="fine-tuned", anp="ANP",
                  anp_nominal="ANP, threshold set back", clean="clean model, shipped alike")
    for answer in tables.unique(r["rows"], "answer"):
        of = [row for row in r["rows"] if row["answer"] == answer]
        rows.append([titles[answer], *(tables.cell(of, key) for key in ("ca", "target_rate", "asr_p", "asr_o"))])
    table = tables.markdown("network | right class (CA) | target, no trigger | target, T_p | target, T_o", rows)
    accused = ", ".join(str(one["accused"]) for one in scan)
    score = tables.cell(scan, "backdoored", "clean", digits=2)
    say(f"\n{tables.as_text(table)}\n\nShipped at threshold {v_thr:.2f} instead of 1.0; percent of the test images less"
        f" the defender's {r['n_defender']}.\nThe target is class {r['target']}; the threshold scan accuses class "
        f"{accused}.\nIts score of the backdoored / a clean network: {score}.")
    FIGURES["story"](r, folder / "story.png")
