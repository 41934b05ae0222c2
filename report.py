"""Sec. 4's tables and figures, from results/ alone: nothing here trains or loads data.

    python badsnn.py report                 every figure beside its JSON below runs/results; Table 1 as text
    python badsnn.py report --publish       for maintainers: the same for the repository's results/ and its pages
    report(Path("runs/results"))            the same from Python

Tables, the paper's numbers (results/paper.json) beside ours: table1(), table_runs(), table2(), table_story(). Figures:
FIGURES by the name of the JSON file, figure_triggers(). At a command's end are printed: print_attack(), print_story().
CA: accuracy without trigger. ASR, target_rate: share answered as the target with and without trigger. All in percent.
"""
import contextlib
import itertools
import json
import re
import shutil
import textwrap
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

import runs
from machine import say
from runs import replace_file, write_text
from settings import PRESETS

SHIPPED = Path(__file__).parent / "results"     # the repository's own, which only publish=True changes
PAPER = json.loads((SHIPPED / "paper.json").read_text(encoding="utf-8"))        # the paper's own numbers
PAPER_V_A, PAPER_TABLE1, PAPER_TABLE2 = PAPER["v_a"], PAPER["table1"], PAPER["table2"]


def report(results, publish=False):
    """Draws every figure beside its JSON below `results` and prints Table 1. publish: copies the results to the
    repository's, draws those, and rewrites the tables between the markers <!-- name --> of both pages."""
    found = {path: read_result(path) for path in sorted(results.glob("*/*.json")) if path.stem in FIGURES}
    if not found:
        raise ValueError(f"no attack.json below {results}/; run 'python badsnn.py attack' first")
    if publish and results.resolve() != SHIPPED.resolve():
        for path in itertools.chain(*map(results.glob, ("*.json", "*/*.json", "*/triggers.npz"))):
            with replace_file(SHIPPED / path.relative_to(results)) as part:
                shutil.copyfile(path, part)
        return report(SHIPPED, publish)
    attacks, defends, stories = ({path.parent.name: r for path, r in found.items() if path.stem == kind}
                                 for kind in ("attack", "defend", "story"))
    tables = {"table1": table1(attacks), "runs": table_runs(attacks), "table2": table2(defends)}
    tables["summary"] = table_summary(attacks)
    tables |= {"story": table_story(r) for r in [*in_order(stories).values()][:1]}
    scans = {path.parent.name: r for path, r in found.items() if path.stem == "scan"}
    if "summary" in scans.get("digits", ()):
        tables |= {"scan": table_scan(scans["digits"]), "evaders": table_evaders(scans.pop("digits"))}
    tables |= {"scanned": table_scanned(scans)} if scans else {}
    if (results / "benchmark.json").exists():
        summary = read_result(results / "benchmark.json")["summary"]
        tables["benchmark"] = markdown("what | measured, 1 thread / 2 threads", summary.items())
    for path, r in found.items():
        FIGURES[path.stem](r, path.with_suffix(".png"))
    for path in results.glob("*/triggers.npz"):
        figure_triggers(path.parent)
    print(f"\n{as_text(tables['table1'])}")
    for page in (SHIPPED / "README.md", SHIPPED.parent / "README.md"):
        if publish and page.exists():
            write_text(page, re.sub(r"(?s)(<!-- (\w+) -->).*?(<!-- /\2 -->)", lambda m: (
                f"{m[1]}\n{tables[m[2]]}\n{m[3]}" if m[2] in tables else m[0]), page.read_text(encoding="utf-8")))
            print(f"written: {page}")


def read_result(path):
    """The one reader of results. A result is called by its folder's name, as a variant has one: cifar10_10k."""
    class Result(dict):         # what it lacks is an error that names the file
        def __missing__(self, key):
            raise unreadable(path, f"no {key!r} in it")
    try:
        result = json.loads(path.read_text(encoding="utf-8"), object_hook=Result)
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from None
    if not isinstance(result, dict) or path.stem in FIGURES and not result["rows"]:
        raise unreadable(path, "no rows in it")
    return Result(result, dataset=path.parent.name)


def unreadable(path, reason):
    return ValueError(f"{path}: not a readable result ({reason}); run the command again")


def in_order(found):
    """Results by folder's name: in PRESETS' order, variants behind their data set, unknown ones last."""
    place = {name: i for i, name in enumerate(PRESETS)}
    return dict(sorted(found.items(), key=lambda item: (place.get(re.split("[-_]", item[0])[0], len(place)), item[0])))


def unique(rows, key):
    return list(dict.fromkeys(row[key] for row in rows))


def markdown(titles, rows):
    """A table. titles: "data | V_a | ..."."""
    lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join([f"| {titles} |", "|---" * (titles.count("|") + 1) + "|", *lines])


def percent(value, spread=None):
    return ("-" if value is None else f"{value:.1f}") + (f" ± {spread:.1f}" if spread is not None else "")


def span(values):
    return " to ".join(f"{v:g}" for v in sorted({min(values), max(values)}))


def table1(found, every=False):
    """Every data set at each model's own V_a, mean ± standard deviation over seeds, then at the paper's V_a with the
    paper's numbers beside. What was not measured is "-". found: results by title. every: at every V_a of the curve."""
    rows, needed = [], ("ca", "target_rate", "asr_p", "asr_p_clean_model")
    for name, r in in_order(found).items():
        control = "asr_p_renormalized" if r["q"] else "asr_clip_only"
        paper = dict(zip(PAPER_V_A, PAPER_TABLE1[name][2])) if name in PAPER_TABLE1 else {}
        own = f"**own**, {span([run['at_chosen']['v_thr'] for run in r['runs']])}"
        curve = [("", f"{row['v_thr']:g}", row, {}, paper.get(row["v_thr"], ()))
                 for row in r["rows"] if every or row["v_thr"] in PAPER_V_A]
        for title, v_thr, row, spread, theirs in [(f"**{name}**", own, r["at_chosen"], r["spread"], ()), *curve]:
            cells = [percent(row[key] if key in needed else row.get(key), spread.get(key))
                     for key in (*needed, "read_p", "asr_o", "asr_o_clean_model")]
            cells.append(" / ".join(percent(row.get(control + model)) for model in ("", "_clean_model")))
            rows.append([title, v_thr, *cells, " / ".join(map(percent, theirs))])
    return markdown("data | V_a | CA | target_rate | ASR_p | ASR_p, clean model | what T_p leaves | ASR_o | ASR_o, "
                    "clean model | T_p re-normalised, or clip alone / clean model | paper: CA / ASR_p / ASR_o", rows)


def table_summary(found):
    """Four data sets at the attacker's own V_a, the better trigger of each, and the paper at the nearest V_a."""
    rows = []
    for name, r in ((name, found[name]) for name in ("gtsrb", "cifar10", "digits", "nmnist") if name in found):
        at, (trigger, i) = r["at_chosen"], ("p", 1) if r["at_chosen"]["asr_o"] is None else ("o", 2)
        v_thr, theirs = min(zip(PAPER_V_A, PAPER_TABLE1.get(name, ((),) * 3)[2]), default=(None, ()),
                            key=lambda pair: abs(pair[0] - at["v_thr"]))
        rows.append([name + " (older recipe)" * ("older" in r["note"]), f"{at['v_thr']:.2f}", *map(percent, (
            at["ca"], at["target_rate"], at[f"asr_{trigger}"], at.get(f"asr_{trigger}_clean_model"))),
            f"{percent(theirs[0])}, {percent(theirs[i])} (V_a {v_thr:g})" if theirs else ""])
    return markdown("data | V_a | CA | target_rate | ASR | ASR, clean model | paper: CA, ASR", rows)


def table_runs(found):
    """What each row of Table 1 was made with, and the accuracy at S_n with and without backdoor."""
    rows = []
    for name, r in in_order(found).items():
        ours = [percent(r[key], np.std([run[key] for run in r["runs"]], ddof=1) if len(r["runs"]) > 1 else None)
                for key in ("clean_ca", "base_ca")]
        paper = " / ".join(map(percent, PAPER_TABLE1[name][:2])) if name in PAPER_TABLE1 else ""
        v_thr_t = span([r["v_thr_t"], r.get("v_thr_t_low") or r["v_thr_t"]])
        strength = f"q {r['q']:g}" if r["q"] else f"beta {r['beta']:g}"
        rows.append([f"**{name}**", *ours, paper, f"{r['model']}, width {r['width']}, T {r['T']}",
                     f"{r['n_train']:,} + {r['n_test']:,}", r["n_poison"], r["epochs"], r["seeds"],
                     f"target {r['target']}, S_t ({v_thr_t}, {r['tau_t']}), {strength}",
                     f"{r['seconds'] / 60:.0f} min, {r['device']}, "
                     f"{'bfloat16' if r['amp'] in (True, 'on') else 'float32'}", r["note"]])
    return markdown("data | Clean CA | Base CA | paper: Clean / Base | network | training + test samples | "
                    "malicious samples | epochs | seeds | attack | run | note", rows)


PAPERS = ("none", "fine_tune", "clp", "anp", "tsbd", "nad")     # the order of its cells in paper.json
LEARNED = 50        # percent: the least ASR, without a defence, that makes a row of Table 2 say something of a defence


def paper_cells(r, attack):
    """The paper's [CA, ASR] of an attack by defence, both as text, for the data set of a result."""
    cells = PAPER_TABLE2.get(re.split("[-_]", r["dataset"])[0], {}).get(attack, "").split()
    return {defense: cell.split("/") for defense, cell in zip(PAPERS, cells)}


def table2_lines(r):
    """Table 2's lines: the attack, the trigger's name in brackets (BadSNN has two), which ASR, the cells by defence,
    and whether the attack was learned. BadSNN's last line is the defender who sets the threshold back as well."""
    for attack in unique(r["rows"], "attack"):
        cells = {row["defense"]: row for row in r["rows"] if row["attack"] == attack}
        triggers = [d["trigger"] for d in r["detectors"] if d["attack"] == attack]
        restored = {name: row["restored"] for name, row in cells.items() if row.get("restored")}
        for title, key, of in [*zip(triggers, ("asr", "asr_p"), (cells, cells)),
                               *[(f"{triggers[0]}, threshold set back", "asr", restored)] * bool(restored)]:
            undefended = cells.get("none", {}).get(key)
            yield attack, f" ({title})" * (title != attack), key, of, undefended is None or undefended >= LEARNED


def table2(found):
    """CA / ASR / target_rate of every attack and defence, mean ± standard deviation over seeds, the paper's CA / ASR
    below. An attack that was not learned has its cells in brackets. found: by folder's name."""
    names, lines = unique([row for r in in_order(found).values() for row in r["rows"]], "defense"), []

    def cell(row, key, learned):
        text = " / ".join(percent(row[k], row.get("spread", {}).get(k)) for k in ("ca", key, "target_rate"))
        return (text if learned else f"({text})") + " †" * row.get("destroyed", False)
    for name, r in in_order(found).items():
        lines.append([f"**{name}**, {seeds_of(r)}, {r['n_defender']} images for the defender, clean model "
                      f"{r['clean_ca']:.1f}, {r['seconds'] / 60:.0f} min", *[""] * len(names)])
        for attack, of_attack in itertools.groupby(table2_lines(r), key=lambda line: line[0]):
            for _, title, key, of, learned in of_attack:
                first = next(iter(of.values()))
                title = attack + title + (f", V_a {first['v_thr']:.3g}" * bool(title) if "v_thr" in first else "")
                if key == "asr" and "v_thr" in first:
                    title += f", clean model {percent(of.get('none', {}).get('asr_clean_model'))}"
                lines.append([title + ", **not learned**" * (not learned),
                              *(cell(of[name], key, learned) if name in of else "-" for name in names)])
            theirs = paper_cells(dict(r, dataset=name), attack)
            if theirs:
                lines.append(["*paper*", *(f"*{' / '.join(theirs[k])}*" if k in theirs else "" for k in names)])
    return markdown(" | ".join(["data, attack", *names]), lines)


def seeds_of(r):
    """The seeds of a result of defend, in words."""
    n = len({run["seed"] for run in r.get("runs", [r])})
    return f"{n} seeds, mean ±" if n > 1 else f"seed {r['seed']}"


def as_text(table, turned=False):
    """A Markdown table for the terminal, without empty columns. turned: one line per column."""
    rows = [[text.strip().replace("*", "") for text in line.split("|")[1:-1]] for line in table.splitlines()]
    columns = [column for column in zip(rows[0], *rows[2:]) if not {*column[1:]} <= {"", "-", "- / -"}]
    titles = itertools.zip_longest(*(textwrap.wrap(title, 12) for title, *_ in columns), fillvalue="")
    lines = columns if turned else [*titles, *zip(*(texts for _, *texts in columns))]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def print_attack(r):
    """What `attack` prints: Table 1's row, the repository's beside it, the curve, and what needs no backdoor."""
    found, path, t = {r["dataset"]: r}, SHIPPED / r["dataset"] / "attack.json", "T_p" if r["q"] else "T_s"
    how, lines, note = as_text(table_runs(found), turned=True), table1(found, every=True).splitlines(), ""
    if path.exists():
        shipped = read_result(path)
        lines.insert(3, table1({"shipped with this repository": shipped}).splitlines()[2])
        note = f"\nNote on what is shipped with this repository: {shipped['note']}." * bool(shipped["note"])
    table = as_text("\n".join(lines), turned=True).replace("what T_p", f"what {t}")
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
    tables = [table_scan(r), table_evaders(r)] if "summary" in r else [table_scanned({r["dataset"]: r})]
    say("\n" + "\n\n".join(map(as_text, tables)))


def table_scan(r):
    """The detector by what it is shown."""
    rows = [[name.replace("late", "100 images, high thresholds only"),
             f"{at['auroc']:.3f} ({at['interval'][0]:.3f} to {at['interval'][1]:.3f})", f"{at['alarm']:.2f}",
             *(percent(at[key]) for key in ("caught", "false_alarms", "accused_right"))]
            for name, at in r["summary"].items()]
    return markdown("the scan is shown | AUROC (95 % interval) | alarm above | backdoored models caught | "
                    "false alarms, clean models | accused class right", rows)


def table_evaders(r):
    """Attackers who know the scan: what hiding costs, and what is still seen; mean ± standard deviation over seeds."""
    rows = []
    for name in unique(r["evaders"], "evader"):
        of = [row for row in r["evaders"] if row["evader"] == name]
        mean, spread = runs.mean_of(of), runs.spread_of(of)
        scores = {key: np.array([row["scores"][key] for row in of]) for key in ("100 images", "late")}
        shown = [f"{v.mean():.2f} ({(v > r['summary'][key]['alarm']).sum()} of {len(of)} caught)"
                 for key, v in scores.items()]
        rows.append([name.replace("_", " "), *(percent(mean[key], spread.get(key)) for key in
                     ("ca", "target_rate", "asr_p", "asr_p_clean_model")), *shown,
                     f"{sum(row['accused'] == row['target'] for row in of)} of {len(of)}"])
    return markdown("attacker | CA | target_rate | ASR_p | ASR_p, clean model | score | score, high thresholds only | "
                    "accused class right", rows)


def table_scanned(found):
    """One row per model of data sets without a population."""
    rows = [[f"**{name}**, {row['kind']}, seed {row['seed']}", percent(row["ca"]), f"{row['v_thr_a']:g}",
             percent(row.get("asr_p")), *(f"{row['scores'][key]:.2f}" for key in row["scores"]), row["accused"]]
            for name, r in in_order(found).items() for row in r["rows"]]
    return markdown(" | ".join(["model", "CA", "v_thr", "ASR_p", *next(iter(found.values()))["rows"][0]["scores"],
                                "accused"]), rows)


def table_story(r):
    """The shipped model, two answers of a defender, and a clean model under the same triggers."""
    keys, at = ("ca", "target_rate", "asr_p", "asr_o"), r["at_chosen"]
    titles = {"none": f"as shipped, threshold {at['v_thr']:g}", "restore": "threshold set back to 1.0",
              "fine_tune": f"fine-tuned on {r['n_defender']} clean images", "clean": "clean model, for comparison"}
    rows = [*r["rows"], dict({key: at.get(f"{key}_clean_model") for key in keys}, answer="clean")]
    return markdown("network | right class (CA) | target class, no trigger | target class, T_p | target class, T_o",
                    [[titles[row["answer"]], *(percent(row.get(key)) for key in keys)] for row in rows])


def verdict(r):
    """Five sentences made from the numbers of story.json."""
    at, target, of, scan = r["at_chosen"], f"class {r['target']}", "{:.0f} of 100".format, r["scan"]
    ours, back, tuned = sorted(r["rows"], key=lambda row: ("none", "restore", "fine_tune").index(row["answer"]))
    lost = back["ca"] - ours["ca"]
    judged = ("as good as" if abs(lost) <= 1 else "better than" if lost < 0 else
              "a little worse than" if lost <= 3 else "clearly worse than")
    yield (f"With the threshold at {at['v_thr']:g} the network is right on {of(ours['ca'])} test images, {judged} at "
           f"1.0 ({back['ca']:.0f}); untriggered, {of(ours['target_rate'])} images of other classes become {target}.")
    clean = {key: at.get(f"{key}_clean_model") for key in ("asr_p", "asr_o") if ours.get(key) is not None}
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
    say("\n".join(["", as_text(table_story(r)), "", *verdict(r)]))
    say("Where the time went: " + "; ".join(f"{name} {seconds:.0f} s" for name, seconds in r["phases"].items()) + ".")
    figure_story(r, folder / "story.png")


STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 9, "savefig.dpi": 150}
# How each quantity is called and drawn: line and marker tell them apart in grey, too
CURVES = {"ca": ("CA", "o-", "black"), "target_rate": ("target_rate (no trigger)", "s:", "0.45"),
          "asr_p": ("ASR_p", "^-", "tab:red"), "asr_p_clean_model": ("ASR_p, clean model", "x--", "tab:blue"),
          "asr_p_renormalized": ("ASR_p, re-normalised", "v--", "tab:orange"), "l2": ("L2 (right)", "s:", "tab:purple"),
          "asr_o": ("ASR_o", "D-", "tab:green"), "asr_o_clean_model": ("ASR_o, clean model", "+-.", "darkgreen"),
          "asr_clip_only": ("clip alone", "v--", "tab:orange"), "read": ("accuracy left, clean model", "o:", "black")}


@contextlib.contextmanager
def drawing(path, size, title, shape=(1, 1), shared=False, ratios=None):
    """A new figure's axes, [rows, columns], columns as wide as `ratios` says. At the end of the block one legend for
    all goes to the right; saved."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        figure.suptitle(title, fontsize=9)
        axes = figure.subplots(*shape, squeeze=False, sharex=shared, sharey=shared, width_ratios=ratios)
        yield axes
        for axis in axes.flat if shared else ():
            axis.label_outer()
        named = {label: line for axis in figure.axes for line, label in zip(*axis.get_legend_handles_labels())}
        if named:
            figure.legend(named.values(), named.keys(), loc="outside right center", fontsize=8, frameon=False)
        with replace_file(path) as part:
            figure.savefig(part, format="png", metadata={"Software": None})
    say(f"written: {path}")


def curve(axis, rows, x, key, look=None):
    """One line of row[key] over row[x]: means of rows with equal x; where there are several (seeds), pale points."""
    label, style, color = look or CURVES[key]
    rows = [row for row in rows if row.get(key) is not None]
    places = sorted({row[x] for row in rows})
    means = [np.mean([row[key] for row in rows if row[x] == place]) for place in places]
    if len(rows) > len(places):
        axis.plot([row[x] for row in rows], [row[key] for row in rows], style[0], color=color, alpha=0.3, markersize=4)
    if rows:
        axis.plot(places, means, style, color=color, label=label, markersize=5)


def curves(axis, rows, x, keys, **labels):
    """Several quantities in percent, as CURVES has them, with a tick at every x."""
    for key in keys.split():
        curve(axis, rows, x, key)
    places = unique(rows, x)
    axis.set(**dict(dict(ylabel="percent of test samples", ylim=(-3, 103), xlabel=x), **labels))
    axis.set_xticks(places, [f"{v:g}" for v in places], rotation=45, ha="right", rotation_mode="anchor")
    axis.minorticks_off()


def titled(r, v_thr=False):
    """A figure's title: data set, network, seeds, and where one is asked for the V_a."""
    n = len({row["seed"] for row in r["rows"] if "seed" in row} or r.get("runs", "1"))
    at = f"\nV_a = {span([row['v_thr'] for row in r['rows']])}" if v_thr else ""
    return (f"{r['dataset']}: {r['model']}, width {r['width']}, {r['n_train']:,} training samples{at}, "
            + (f"mean of {n} seeds, pale: each" if n > 1 else f"seed {r['seed']}"))


def figure_attack(r, path):
    """Table 1 as a picture: CA and the shares answered as the target, against the deployed threshold."""
    rows = [row for run in r["runs"] for row in run["rows"]]
    with drawing(path, (7, 3.3), titled(r)) as [[axis]]:
        curves(axis, rows, "v_thr", "ca target_rate asr_p asr_p_renormalized asr_clip_only asr_p_clean_model asr_o "
               "asr_o_clean_model", xlabel="deployed threshold V_a")
        own = [run["at_chosen"]["v_thr"] for run in r["runs"]]
        axis.axvspan(min(own) - 0.003, max(own) + 0.003, color="0.88", zorder=0, label="own V_a")


def figure_triggers(folder):
    """Fig. 5: clean test images, both triggers, and five times the perturbation of T_o."""
    try:
        with np.load(folder / "triggers.npz", allow_pickle=False) as file:
            clean, t_p, t_o = (file[key].astype(np.float32) / 255 for key in ("clean", "t_p", "t_o"))
    except Exception as error:      # np.load has many
        raise unreadable(folder / "triggers.npz", error) from None
    shown = {"clean": clean, "T_p": t_p, "T_o": t_o, "5 (T_o - clean)": (0.5 + 5 * (t_o - clean)).clip(0, 1)}
    with drawing(folder / "triggers.png", (0.9 * len(clean) + 0.8, 3.9), None, (len(shown), len(clean))) as axes:
        for (title, images), line in zip(shown.items(), axes):
            line[0].set_ylabel(title, rotation=0, ha="right", va="center")
            for axis, image in zip(line, images):
                axis.imshow(image)
                axis.set(xticks=[], yticks=[], frame_on=False)


def figure_threshold(r, path):
    """Fig. 2: accuracy and spike count of a clean model against v_thr."""
    looks = {"none": ("o-", "black"), "T_p": ("^-", "tab:red"), "T_p re-normalised": ("v--", "tab:orange")}
    with drawing(path, (7.6, 2.8), f"{r['dataset']}, clean model, q = {r['q']:g}", (1, 2)) as [axes]:
        for axis, (key, label, top) in zip(axes, (("ca", "accuracy, %", 103), ("spikes", "spikes per sample", None))):
            for name, look in looks.items():
                rows = [row for row in r["rows"] if row["trigger"] == name]
                curve(axis, rows, "v_thr", key, (f"trigger: {name}", *look))
            axis.set(xlabel="v_thr", ylabel=label, ylim=(0, top))


def figure_heatmap(r, path):
    """Fig. 3: CA, target_rate and ASR_p over (V_a, tau_a), one line of maps per malicious threshold."""
    v_thr_t, v_thr, tau = (sorted({row[key] for row in r["rows"]}) for key in ("v_thr_t", "v_thr", "tau"))
    cells = {(row["v_thr_t"], row["v_thr"], row["tau"]): row for row in r["rows"]}
    with drawing(path, (10, 2.3 * len(v_thr_t)), titled(r), (len(v_thr_t), 3), shared=True) as axes:
        for line, malicious in zip(axes, v_thr_t):
            for axis, key in zip(line, ("ca", "target_rate", "asr_p")):
                values = np.array([[cells[malicious, x, y][key] for x in v_thr] for y in tau])
                axis.imshow(values, cmap="Greys", vmin=0, vmax=130, origin="lower", aspect="auto")
                for (i, j), value in np.ndenumerate(values):
                    axis.text(j, i, f"{value:.0f}", ha="center", va="center", color="white" if value > 75 else "black")
                axis.set(xlabel="deployed threshold V_a", xticks=range(len(v_thr)), xticklabels=v_thr, ylabel="tau_a",
                         yticks=range(len(tau)), yticklabels=tau, title=f"{CURVES[key][0]}, %: V_t = {malicious:g}")


def figure_lines(r, path, x, keys, split=None, titles=None, **labels):
    """Figs. 4a, 6 and the power study: quantities over x, one panel for every value of row[split]."""
    values = unique(r["rows"], split) if split else [None]
    with drawing(path, (3.5 + 2.2 * len(values), 3.1), titled(r, x != "v_thr"), (1, len(values)), True) as [axes]:
        for axis, value in zip(axes, values):
            rows = [row for row in r["rows"] if not split or row[split] == value]
            learned = f", mean tau {np.mean([row['mean_tau'] for row in rows]):.2f}" if "mean_tau" in rows[0] else ""
            curves(axis, rows, x, keys, title=titles[value] + learned if titles else None, **labels)


def figure_magnitude(r, path):
    """Fig. 4b: what a stronger T_o buys and what it costs."""
    with drawing(path, (7, 3.3), titled(r, v_thr=True)) as [[axis]]:
        curves(axis, r["rows"], "magnitude", "ca asr_o asr_o_clean_model", xlabel="magnitude m: factor on T_o's output")
        right = axis.twinx()
        curve(right, r["rows"], "magnitude", "l2")
        right.set(ylabel="L2 norm of the perturbation", ylim=(0, None))
        right.spines["right"].set_visible(True)


def figure_trigger(r, path):
    """ASR_o against the size of T_o, on held-out training images, one line per lambda_adv. Circled: of those no larger
    than T_p the smallest with an ASR_o of at least 95 %, else the one with the highest."""
    m, small = unique(r["rows"], "magnitude"), [row for row in r["rows"] if row["l2"] <= row["l2_p"]]
    best = min(small or r["rows"], key=lambda row: (-min(row["asr_o"], 95), row["l2"]))
    with drawing(path, (6.6, 3), titled(r, v_thr=True)) as [[axis]]:
        for lambda_adv, style in zip(unique(r["rows"], "lambda_adv"), ("o:", "s--", "D-")):
            rows = [row for row in r["rows"] if row["lambda_adv"] == lambda_adv]
            curve(axis, rows, "l2", "asr_o", (f"lambda_adv {lambda_adv:g}", style, "black"))
        axis.plot(best["l2"], best["asr_o"], "o", markersize=13, markerfacecolor="none", color="tab:red",
                  label=f"best, m = {best['magnitude']:g}")
        axis.axvline(best["l2_p"], color="0.8", zorder=0, label="L2 of T_p")
        axis.set(ylabel="ASR_o, %, held-out training images", ylim=(-3, 103),
                 xlabel=f"mean L2 norm, pixels; m = {min(m):g} to {max(m):g} from left to right")


def figure_defend(r, path):
    """Table 2 at a glance: CA and ASR after every defence as heat maps, what the paper has as a ring in its colour; and
    what the detectors see. Grey: an attack that was not learned. Hatched: CA fell below half of the undefended."""
    lines, defenses, detectors = [*table2_lines(r)], unique(r["rows"], "defense"), ("strip_auroc", "spikes_auroc")
    ca, asr, auroc = {}, {}, {}         # (line, column): value, spread, learned, destroyed, the paper's value
    for i, (attack, title, key, of, learned) in enumerate(lines):
        measured = not title.endswith("set back)")
        theirs = paper_cells(r, attack) if key == "asr" and measured else {}
        for name, row in of.items():
            for place, (panel, of_panel) in enumerate(((ca, "ca"), (asr, key))):
                panel[i, defenses.index(name)] = (row[of_panel], row.get("spread", {}).get(of_panel), learned,
                                                  row.get("destroyed", False),
                                                  float(theirs[name][place]) if name in theirs else None)
        for d in r["detectors"]:
            if d["attack"] == attack and measured and title in ("", f" ({d['trigger']})"):
                auroc.update({(i, j): (100 * d[name], None, learned, False, None) for j, name in enumerate(detectors)})
    title = (f"{r['dataset']}: {r['model']}, width {r['width']}, {r['n_train']:,} training samples, {seeds_of(r)}. "
             "Ring: the paper's value. Hatched: destroyed. Grey: not learned.")
    with drawing(path, (11.5, 0.4 * len(lines) + 1.3), title, (1, 3), ratios=[len(defenses)] * 2 + [2.5]) as [axes]:
        names = [attack + title for attack, title, *_ in lines], [""] * len(lines), [""] * len(lines)
        heat_map(axes[0], ca, "Blues", "CA, %", names[0], defenses)
        heat_map(axes[1], asr, "Reds", "ASR, %", names[1], defenses)
        heat_map(axes[2], auroc, "Greys", "detectors, AUROC", names[2], ("STRIP", "spikes"))


def heat_map(axis, cells, colors, title, rows, columns):
    """Cells {(row, column): (value in percent, spread, learned, destroyed, the paper's value)}, darker for more."""
    def shade(value):
        return matplotlib.colormaps[colors](value / 130)
    for (i, j), (value, spread, learned, destroyed, theirs) in cells.items():
        axis.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, facecolor=shade(value) if learned else "0.9",
                                 edgecolor="white", hatch="////" * destroyed))
        axis.text(j - 0.12 * (theirs is not None), i, f"{value:.0f}" + f" ±{spread or 0:.0f}" * (spread is not None),
                  ha="center", va="center", fontsize=7,
                  color="0.55" if not learned else "white" if value > 75 else "black")
        if theirs is not None:
            axis.plot(j + 0.33, i, "o", markersize=8, markerfacecolor=shade(theirs), markeredgecolor="black")
    axis.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(rows) - 0.5, -0.5), title=title)
    axis.set_xticks(range(len(columns)), columns, rotation=30, ha="right", rotation_mode="anchor")
    axis.set_yticks(range(len(rows)), rows)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)


def figure_events(r, path):
    """The study of events. Left: attacks that poison, at S_n. Then BadSNN at V_a = 1.2 under T_s and added events."""
    looks = {"asr": ("ASR", "^", "tab:red"), "asr_clean_model": ("ASR, clean model", "x", "tab:blue"),
             "target_rate": ("target_rate (no trigger)", "|", "0.45"), "ca": ("CA", "o", "black")}
    panels = {"attacks that poison, V_a 1": [row for row in r["rows"] if "badsnn" not in row["attack"]]}
    for row in r["rows"]:
        if row["attack"] == "badsnn, V_a 1.2":
            neuron = ", ATan" * (row["neuron"] == "lif_atan")
            panels.setdefault(f"BadSNN, V_a 1.2\n{row['frames']}, T = {row['T']}{neuron}", []).append(row)
    with drawing(path, (2.4 * len(panels) + 1, 2.9), titled(r), (1, len(panels))) as [axes]:
        for axis, (title, rows) in zip(axes, panels.items()):
            names = unique(rows, "trigger")
            for key, (label, marker, color) in looks.items():
                axis.plot([row[key] for row in rows], [-names.index(row["trigger"]) for row in rows], marker,
                          color=color, alpha=0.25, markersize=4)
                axis.plot([np.mean([row[key] for row in rows if row["trigger"] == name]) for name in names],
                          -np.arange(len(names)), marker, color=color, label=label, markerfacecolor="none")
            axis.set(xlim=(-3, 103), xlabel="percent", title=title)
            axis.set_yticks(-np.arange(len(names)), names)


def figure_recipe(r, path):
    """Time to accuracy: one line per recipe of training."""
    with drawing(path, (7, 3), titled(r)) as [[axis]]:
        looks = zip(("o:", "s--", "^-.", "D-"), ("0.6", "0.4", "0.2", "tab:red"))
        for name, (style, gray) in zip(unique(r["rows"], "recipe"), looks):
            rows = [row for row in r["rows"] if row["recipe"] == name]
            curve(axis, rows, "minutes", "ca", (name, style, gray))
        axis.set(xlabel="minutes of training", ylabel="CA, %, held-out training images", ylim=(0, None))


def figure_story(r, path):
    """story.json in three curves, named where they end: does T_p do more to this model than to a clean one?"""
    looks = {"ca": ("no trigger:\nright class", "o--", "black"), "asr_p": ("T_p:\ntarget class", "^-", "tab:red"),
             "asr_p_clean_model": ("T_p, clean model:\ntarget class", "x:", "tab:blue")}
    at, height = r["at_chosen"], -20
    rows = sorted([*(row for row in r["curve"] if row["v_thr"] != at["v_thr"]), at], key=lambda row: row["v_thr"])
    with drawing(path, (6.6, 3.2), titled(r)) as [[axis]]:
        curves(axis, r["curve"], "v_thr", "", xlabel="threshold in use (trained at 1)", ylabel="percent of test images")
        axis.axvline(at["v_thr"], color="0.88", zorder=0, linewidth=10)
        for key in sorted(looks, key=rows[-1].__getitem__):
            label, style, color = looks[key]
            height = max(rows[-1][key], height + 20)        # labels keep apart where the curves do not
            curve(axis, rows, "v_thr", key, (None, style, color))
            axis.annotate(label, (1.04, height), xycoords=("axes fraction", "data"), va="center", color=color)
        axis.text(at["v_thr"], 105, f"V_a = {at['v_thr']:g}, chosen by the attacker:\n{at['target_rate']:.1f} % target "
                  "class without trigger", va="bottom", ha="right" if at is rows[-1] else "center")


def figure_scan(r, path):
    """The threshold scan: what models are sure of when their thresholds change, and the scores of every kind."""
    looks = {"clean": "tab:blue", "badsnn": "tab:red", "badnets": "0.35", "blend": "0.35"}
    with drawing(path, (9.5, 3.6), titled(dict(r, rows=r["rows"][:1])), (1, 2)) as [[left, right]]:
        for row in r["rows"]:
            if row["kind"] in ("clean", "badsnn"):
                x = [v / row["v_thr_a"] for v in row["v_thr"]]
                left.plot(x, row["curve"], color=looks[row["kind"]], alpha=0.45, linewidth=0.9,
                          linestyle="-" if row["kind"] == "clean" else "--")
        for kind, label, style in (("clean", "clean models", "-"), ("badsnn", "backdoored models", "--")):
            left.plot([], [], style, color=looks[kind], label=label)
        left.set(xlabel="threshold / shipped threshold", ylabel="mean probability of the largest class", ylim=(0, 1.03))
        kinds = {kind: [row for row in r["rows"] if row["kind"] == kind] for kind in unique(r["rows"], "kind")}
        kinds |= {f"evader: {name}": [row for row in r["evaders"] if row["evader"] == name]
                  for name in unique(r["evaders"], "evader") if name != "none"}
        for place, (kind, rows) in enumerate(kinds.items()):
            scores = np.sort([row["scores"]["100 images"] for row in rows])
            right.plot(scores, -place + np.linspace(-0.3, 0.3, len(rows)), "x" if kind == "clean" else "o",
                       markersize=3.5, color=looks.get(kind, "tab:purple"))
        if "summary" in r:
            right.axvline(r["summary"]["100 images"]["alarm"], color="0.7", zorder=0)
        right.set(xlabel="score; line: alarm", xlim=(0, 1.03))
        right.set_yticks(-np.arange(len(kinds)), [kind.replace("_", " ") for kind in kinds])


FIGURES = {
    "attack": figure_attack, "threshold": figure_threshold, "heatmap": figure_heatmap, "magnitude": figure_magnitude,
    "trigger": figure_trigger, "defend": figure_defend, "story": figure_story, "events": figure_events,
    "scan": figure_scan, "recipe": figure_recipe,
    "poison": partial(figure_lines, x="poison_ratio", keys="ca target_rate asr_p", xscale="log", xlabel="poison ratio"),
    "power": partial(figure_lines, x="q", keys="asr_p asr_p_clean_model read", split="renormalize", xscale="log",
                     titles=["T_p literal", "T_p re-normalised"]),
    "plif": partial(figure_lines, x="v_thr", keys="ca target_rate asr_p asr_p_clean_model", split="neuron",
                    titles=dict(lif="LIF", plif="PLIF"), xlabel="deployed threshold V_a")}
