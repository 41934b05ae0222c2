"""What the results say: every table and figure from results/ alone, and what commands print at their end.

    python badsnn.py report                 every figure beside its JSON below runs/results; Table 1 as text
    python badsnn.py report --publish       for maintainers: the same for the repository's results/ and its pages
    report(Path("runs/results"))            the same from Python

Nothing here trains or loads data. The tables are made in tables.py, the figures in figures.py.
"""
import itertools
import re
import shutil
import tempfile
from pathlib import Path

import tables
from figures import FIGURES, figure_story, figure_triggers
from kit.machine import say
from kit.files import replace_file, write_text

SHIPPED = Path(__file__).parent / "results"     # the repository's own, which only publish=True changes


def report(results, publish=False):
    """Draws every figure beside its JSON below `results` and prints Table 1. publish: copies the results to the
    repository's, draws those, and rewrites the tables between the markers <!-- name --> of both pages."""
    found = {path: tables.read_result(path) for path in sorted(results.glob("*/*.json")) if path.stem in FIGURES}
    if not found:
        raise ValueError(f"no attack.json below {results}/; run 'python badsnn.py attack' first")
    if publish and results.resolve() != SHIPPED.resolve():
        with tempfile.TemporaryDirectory() as trial:        # what cannot be drawn is not copied
            for path, r in found.items():
                draw(path, r, Path(trial) / "figure.png")
        for path in itertools.chain(found, *map(results.glob, ("benchmark*.json", "*/triggers.npz"))):
            with replace_file(SHIPPED / path.relative_to(results)) as part:
                shutil.copyfile(path, part)
        return report(SHIPPED, publish)
    attacks, defends, stories = ({path.parent.name: r for path, r in found.items() if path.stem == kind}
                                 for kind in ("attack", "defend", "story"))
    texts = {"table1": tables.table1(attacks), "runs": tables.table_runs(attacks), "table2": tables.table2(defends)}
    texts["summary"] = tables.table_summary(attacks)
    texts |= {"story": tables.table_story(r) for r in [*tables.in_order(stories).values()][:1]}
    scans = {path.parent.name: r for path, r in found.items() if path.stem == "scan"}
    if "summary" in scans.get("digits", ()):
        texts |= {"scan": tables.table_scan(scans["digits"]), "evaders": tables.table_evaders(scans.pop("digits"))}
    texts |= {"scanned": tables.table_scanned(scans)} if scans else {}
    if (results / "benchmark.json").exists():
        summary = tables.read_result(results / "benchmark.json")["summary"]
        texts["benchmark"] = tables.markdown("what | measured, 1 thread / 2 threads", summary.items())
    for path, r in found.items():
        draw(path, r, path.with_suffix(".png"))
    for path in results.glob("*/triggers.npz"):
        figure_triggers(path.parent)
    print(f"\n{tables.as_text(texts['table1'])}")
    for page in (SHIPPED / "README.md", SHIPPED.parent / "README.md"):
        if publish and page.exists():
            write_text(page, re.sub(r"(?s)(<!-- (\w+) -->).*?(<!-- /\2 -->)", lambda m: (
                f"{m[1]}\n{texts[m[2]]}\n{m[3]}" if m[2] in texts else m[0]), page.read_text(encoding="utf-8")))
            print(f"written: {page}")


def draw(path, r, figure):
    """The figure of the result r in path. Raises ValueError that names path where r is of another shape."""
    try:
        FIGURES[path.stem](r, figure)
    except (TypeError, AttributeError, LookupError) as error:
        raise tables.unreadable(path, repr(error)) from None


def print_attack(r):
    """What `attack` prints: Table 1's row, the repository's beside it, the curve, and what needs no backdoor."""
    found, path, t = {r["dataset"]: r}, SHIPPED / r["dataset"] / "attack.json", "T_p" if r["q"] else "T_s"
    how, note = tables.as_text(tables.table_runs(found), turned=True), ""
    lines = tables.table1(found, every=True).splitlines()
    if path.exists():
        shipped = tables.read_result(path)
        lines.insert(3, tables.table1({"shipped with this repository": shipped}).splitlines()[2])
        note = f"\nNote on what is shipped with this repository: {shipped['note']}." * bool(shipped["note"])
    table = tables.as_text("\n".join(lines), turned=True).replace("what T_p", f"what {t}")
    say(f"\n{how}\n\n{table}\n\nCA: percent right without trigger. ASR, target_rate: percent of the other classes "
        "answered as the target, with and without\ntrigger. Own: each seed at the V_a chosen on its held-out training "
        "samples (Eq. 8); ±: standard deviation over seeds.\nClean model: without backdoor, same trigger, same V_a. "
        f"What {t} leaves: percent that a clean model at 1.0 still gets right.{note}")
    for name, key in ((t, "asr_p"), ("T_o", "asr_o")):
        ours, clean = r["at_chosen"].get(key) or 0, r["at_chosen"].get(f"{key}_clean_model") or 0
        if clean > max(ours / 2, 1):
            say(f"NOTE: {name} reaches {clean:.1f} % on the CLEAN model, {ours:.1f} % on ours: not the backdoor.")


def print_scan(r):
    """What `scan` prints: the detector's tables, or a line per model."""
    parts = ([tables.table_scan(r), tables.table_evaders(r)] if "summary" in r else
             [tables.table_scanned({r["dataset"]: r})])
    say("\n" + "\n\n".join(map(tables.as_text, parts)))


def verdict(r):
    """Five sentences made from the numbers of story.json."""
    at, target, of, scan = r["at_chosen"], f"class {r['target']}", "{:.0f} of 100".format, r["scan"]
    ours, back, tuned, control = ({row["answer"]: row for row in r["rows"]}[name]
                                  for name in ("none", "restore", "fine_tune", "clean"))
    lost = back["ca"] - ours["ca"]
    judged = ("as good as" if abs(lost) <= 1 else "better than" if lost < 0 else
              "a little worse than" if lost <= 3 else "clearly worse than")
    yield (f"With the threshold at {at['v_thr']:g} the network is right on {of(ours['ca'])} test images, {judged} at "
           f"1.0 ({back['ca']:.0f}); untriggered, {of(ours['target_rate'])} images of other classes become {target}.")
    clean = {key: control[key] for key in ("asr_p", "asr_o") if ours.get(key) is not None}
    for key, title in (("asr_p", "power trigger T_p"), ("asr_o", "optimised trigger T_o")):
        if key not in clean:
            yield f"There is no {title}: no training image could be blended into {target}."
            continue
        read = at.get(key.replace("asr", "read"))
        read = f" and reads {of(read)} right" if read is not None else ""
        yield (f"With the {title}, {of(ours[key])} images of other classes become {target}; a clean network under the "
               f"same trigger calls {of(clean[key])} {target}{read}"
               + (": the trigger adds little to what happens without it." if ours[key] <= ours["target_rate"] + 10 else
                  ": most of it is the trigger's doing, not the backdoor's." if clean[key] > ours[key] / 2 else "."))

    def effects(row):
        for key, control in clean.items():
            verb = ("finds no {} to end" if ours[key] <= 10 else "ends {}" if row[key] <= 10 else
                    "leaves {} what it does to a clean network" if row[key] <= control + 5 else
                    "weakens {}" if row[key] < ours[key] - 10 else "does not stop {}")
            yield f"{verb.format('T' + key[3:])} ({of(row[key])})"
        if row["ca"] < ours["ca"] - 3:
            yield f"costs accuracy ({of(row['ca'])} right)"
    yield (f"Setting the threshold back to 1.0 {' and '.join(effects(back))}; fine-tuning on {r['n_defender']} clean "
           f"images {' and '.join(effects(tuned))}.")
    score, other, accused = scan["backdoored"]["score"], scan["clean"]["score"], scan["backdoored"]["accused"]
    yield (f"The threshold scan scores the shipped network {score:.2f} and a clean one {other:.2f} (higher is more "
           f"suspicious){' and' if score > other + 0.05 else ', which does not tell them apart; it'} accuses class "
           f"{accused}, which is {'right' if accused == r['target'] else f'wrong: the target is {target}'}.")


def print_story(r, folder):
    """What `story` prints, and story.png in the folder: the table, the verdict, and where the time went."""
    say("\n".join(["", tables.as_text(tables.table_story(r)), "", *verdict(r)]))
    say("Where the time went: " + "; ".join(f"{name} {seconds:.0f} s" for name, seconds in r["phases"].items()) + ".")
    figure_story(r, folder / "story.png")
