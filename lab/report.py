"""What the results say: every table and figure from results/ alone, and what commands print at their end."""
from kit.files import ROOT
from kit.machine import say
from lab import demo, tables
from lab.figures import FIGURES, figure_triggers
from lab.results import write_text

SHIPPED, READ = ROOT / "results", {*FIGURES, "defend"}      # the repository's own; what tables and figures read
TEXT1 = """In percent. CA: test samples answered right. target_rate, ASR_p, ASR_o: samples of other classes answered as
the target without trigger, with T_p (events: T_s), with T_o. Clean model: without backdoor, same threshold and trigger;
it reads: triggered samples it answers right, at 1.0. Own: the V_a of each seed, chosen on held-out samples; other V_a
and the last column, CA / ASR_p / ASR_o: the paper's."""
TEXT2 = """CA / ASR / target_rate (see [Table 1](table1.md)) after each defence, at the threshold behind an attack. Set
back: to 1.0 after it. Brackets: not learned (ASR below 50). †: CA fell below half. Last column, without a defence:
AUROC of STRIP and of the spike count; score of the threshold scan (1: suspicious); does it accuse the target (1)?"""


def report(results, publish=False):
    """Draws every figure below `results`, prints Table 1; publish: writes both tables as pages. Raises ValueError."""
    found = {path: tables.read_result(path) for path in sorted(results.glob("*/*.json")) if path.stem in READ}
    if not found:
        raise ValueError(f"no attack.json below {results}/; run 'python badsnn.py attack' first")
    attacks = {path.parent.name: r for path, r in found.items() if path.stem == "attack"}
    for path, r in found.items():
        try:
            if path.stem in FIGURES:
                FIGURES[path.stem](r, path.with_suffix(".png"))
            if path.stem == "attack":
                tables.table1({path.parent.name: r})
        except (TypeError, AttributeError, LookupError) as error:       # a result of another shape
            raise tables.unreadable(path, repr(error)) from None
    for path in results.glob("*/triggers.npz"):
        figure_triggers(path.parent)
    for path in results.glob("*/demo.json"):
        demo.write_page(path, results.parent / "docs/index.html" if publish else path.with_suffix(".html"))
    table1 = tables.table1(attacks)
    print(f"\n{tables.as_text(table1)}")
    if publish:
        defends = {path.parent.name: r for path, r in found.items() if path.stem == "defend"}
        write_text(results / "table1.md", f"# Table 1\n\n{TEXT1}\n\n{table1}\n\n{tables.table_runs(attacks)}\n")
        write_text(results / "table2.md", f"# Table 2\n\n{TEXT2}\n\n{tables.table2(defends)}\n")


def print_attack(r):
    """What `attack` prints: Table 1 with the whole curve, and the accuracy at the nominal setting."""
    say(f"\n{tables.as_text(tables.table1({r['dataset']: r}, every=True))}\n\n{TEXT1}\n\nAt threshold 1.0: CA "
        f"{tables.cell(r['runs'], 'base_ca')} (Base CA), of the clean model {tables.cell(r['runs'], 'clean_ca')}.")


def print_scan(r):
    """What `scan` prints: how well both scans tell networks, and what hiding costs."""
    for name, at in r["summary"].items():
        say(f"{name:>28}: AUROC {at['auroc']:.3f}; caught {at['caught']:g} % of {at['n'][0]} (95 %: "
            f"{at['caught_interval']}), alarm {at['alarm']:.2f}")
    for kind in tables.unique(r["rows"], "kind"):
        of = [row for row in r["rows"] if row["kind"] == kind]
        say(f"{kind}, works {sum(row['working'] for row in of)} of {len(of)}: CA / target_rate / ASR_p "
            f"{tables.cell(of, 'ca', 'target_rate', 'asr_p')}; margin / threshold scan "
            f"{tables.cell(of, 'margin', 'score', digits=2)}")


def print_story(r, folder):
    """What `story` prints, and story.png in the folder: a table beside the published ranges, and what the scan says."""
    titles = dict(none="as shipped", recentre="threshold re-centred", fine_tune="fine-tuned", anp="ANP",
                  anp_recentre="ANP, re-centred", clean="clean model, shipped alike")
    known, rows = SHIPPED / r["dataset"] / "story.json", []
    published = tables.read_result(known)["rows"] if known.exists() else []
    for answer, title in titles.items():
        cells = [title]
        for key in ("ca", "target_rate", "asr_p", "asr_o"):
            mine, theirs = ([row for row in of if row["answer"] == answer] for of in (r["rows"], published))
            cells.append(tables.cell(mine, key) + (f" ({tables.span(theirs, key)})" if theirs else ""))
        rows.append(cells)
    table = tables.markdown("network | right class (CA) | target, no trigger | target, T_p | target, T_o", rows)
    accused = ", ".join(str(one["accused"]) for one in r["scan"])
    say(f"\n{tables.as_text(table)}\n\nPercent of the test images less the defender's {r['n_defender']}; in brackets: "
        f"the published range.\nShipped at threshold {r['attack']['at_chosen']['v_thr']:.2f}, not 1.0. "
        f"The target is class {r['target']}; the threshold scan accuses class {accused}.\nIts score of the "
        f"backdoored / a clean network: {tables.cell(r['scan'], 'backdoored', 'clean', digits=2)}.")
    FIGURES["story"](r, folder / "story.png")
