"""What the results say: every table and figure from results/ alone, and what commands print at their end.

    python badsnn.py report                 every figure beside its JSON below runs/results; Table 1 as text
    python badsnn.py report --publish       for maintainers: the same for the repository's results/, and its tables
    report(Path("runs/results"))            the same from Python

Nothing here trains or loads data. The tables are made in tables.py, the figures in figures.py.
"""
import shutil
import tempfile
from pathlib import Path

from kit.files import ROOT, replace_file, write_text
from kit.machine import say
from lab import tables
from lab.figures import FIGURES, figure_story, figure_triggers

SHIPPED = ROOT / "results"      # the repository's own, which only publish=True changes
TEXT1 = """# Table 1

CA: percent of the test samples that are answered right. ASR_p, ASR_o, target_rate: percent of the samples of other
classes that are answered as the target, with T_p (on events T_s), with T_o, without a trigger. Clean model: a network
without backdoor at the same threshold, under the same trigger; "reads": its accuracy on triggered samples at 1.0.
Own: each seed at the V_a that its attacker chose on held-out training samples; the other V_a are the paper's.
Mean ± standard deviation over seeds; where that is as large as the mean, every seed.
"""
TEXT2 = """# Table 2

CA / ASR / target_rate after a defence, in percent, as in [Table 1](table1.md); behind an attack the threshold in use.
In brackets: an attack that was not learned (ASR below 50). †: CA fell below half of what it is without the defence.
Set back: the threshold is 1.0 again after the defence. Clean model: without backdoor, shipped and repaired alike.
"""


def report(results, publish=False):
    """Draws every figure beside its JSON below `results` and prints Table 1. publish: copies the results to the
    repository's, draws those, and writes table1.md and table2.md there. Raises ValueError that names a damaged file."""
    found = {path: tables.read_result(path) for path in sorted(results.glob("*/*.json")) if path.stem in FIGURES}
    if not found:
        raise ValueError(f"no attack.json below {results}/; run 'python badsnn.py attack' first")
    if publish and results.resolve() != SHIPPED.resolve():
        with tempfile.TemporaryDirectory() as trial:        # what cannot be drawn is not copied
            for path, r in found.items():
                draw(path, r, Path(trial) / "figure.png")
        for path in [*found, *results.glob("*/triggers.npz")]:
            with replace_file(SHIPPED / path.relative_to(results)) as part:
                shutil.copyfile(path, part)
        return report(SHIPPED, publish)
    attacks, defends = ({path.parent.name: r for path, r in found.items() if path.stem == kind}
                        for kind in ("attack", "defend"))
    table1 = tables.table1(attacks)
    for path, r in found.items():
        draw(path, r, path.with_suffix(".png"))
    for path in results.glob("*/triggers.npz"):
        figure_triggers(path.parent)
    print(f"\n{tables.as_text(table1)}")
    if publish:
        write_text(SHIPPED / "table1.md", "\n".join([
            TEXT1, "## Of every data set the network with the highest held-out CA", "", tables.table_summary(attacks), "",
            "## All", "", table1, "", "## What they were made with", "", tables.table_runs(attacks), ""]))
        write_text(SHIPPED / "table2.md", "\n".join([
            TEXT2, tables.table2(defends), "", "## Detectors", "", tables.table_detectors(defends), ""]))
    return None
