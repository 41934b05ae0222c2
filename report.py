"""Sec. 4's tables and figures, from results/ alone: nothing here trains or loads data.

    python badsnn.py report                 every figure beside its JSON; Table 1 as text
    python badsnn.py report --publish       and the tables between the markers <!-- name --> of README.md
    report(Path("results"))                 the same from Python

Tables 1 and 2: table1(), table2(), Markdown, the paper's numbers beside ours. Figs. 1 to 6: figure_overview(),
figure_threshold(), figure_heatmap(), figure_poison() and figure_magnitude(), figure_triggers(), figure_plif().
CA: accuracy without trigger. ASR, target_rate: share answered as the target with and without trigger. All in percent.
"""
import contextlib
import itertools
import json
import re
import textwrap
from functools import partial

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from lif import V_THR_N
from runs import replace_file, say, write_text
from settings import PRESETS

# Table 1 of the paper: Clean CA, Base CA; then CA, ASR_p, ASR_o at each of its V_a
PAPER_V_A = (1.10, 1.15, 1.20)
PAPER_TABLE1 = {
    "cifar10": (91.34, 87.68, [(87.22, 77.79, 82.65), (51.22, 98.71, 95.47), (11.94, 99.97, 99.96)]),
    "gtsrb": (96.05, 93.02, [(92.57, 39.81, 75.59), (91.43, 54.81, 79.75), (87.43, 71.92, 85.08)]),
    "cifar100": (71.85, 65.19, [(60.91, 73.88, 57.20), (55.04, 82.16, 64.28), (44.98, 86.19, 72.88)]),
    "nmnist": (96.06, 95.10, [(94.06, 100, None), (93.04, 100, None), (92.19, 100, None)])}

# Table 2 of the paper: CA/ASR under none, fine_tune, clp, anp, tsbd, nad
PAPER_TABLE2 = {
    "cifar10": {"badsnn": "87.2/82.7 82.3/84.6 83.8/72.6 28.9/98.4 71.3/82.6 87.0/81.9",
                "badnets": "91.1/100.0 56.7/34.0 92.3/34.9 82.4/19.3 82.1/9.4 60.0/13.1",
                "blend": "89.9/99.7 84.7/16.9 89.3/99.2 72.9/49.5 85.2/17.7 81.7/8.6",
                "wanet": "88.2/99.6 77.8/22.5 87.0/99.0 68.4/25.9 87.1/17.3 84.8/15.7",
                "clean_label": "91.8/43.2 52.5/8.2 93.1/47.0 73.9/29.9 79.9/20.3 67.6/9.4"},
    "gtsrb": {"badsnn": "87.4/85.0 38.7/1.7 3.3/100.0 11.1/99.8 87.7/85.0 70.1/9.9",
              "badnets": "87.1/80.8 70.9/2.9 86.6/76.4 65.9/5.3 87.6/3.0 88.4/3.4",
              "blend": "93.3/96.7 93.5/6.3 93.3/96.7 88.6/80.1 92.1/73.8 90.6/6.9",
              "wanet": "96.0/99.8 16.5/2.7 96.0/99.8 2.1/0.0 93.5/3.0 31.9/2.9",
              "clean_label": "67.1/1.0 76.2/3.5 67.1/1.0 49.1/0.9 72.9/4.6 75.5/4.9"},
    "cifar100": {"badsnn": "61.2/74.2 6.3/16.5 66.7/6.7 1.1/100.0 2.5/53.1 5.9/7.4",
                 "badnets": "70.5/100.0 9.7/0.5 70.1/98.1 1.1/0.0 5.5/0.1 10.6/0.1",
                 "blend": "71.1/98.5 11.4/0.0 71.1/90.9 1.1/0.0 5.2/2.6 11.2/0.1",
                 "wanet": "70.2/95.1 11.2/0.9 70.2/95.2 0.9/4.8 4.6/0.0 10.0/0.8",
                 "clean_label": "71.8/2.2 6.4/0.1 71.9/2.3 1.0/0.0 4.8/2.3 9.2/0.0"}}


def report(results, publish=False):
    """Draws every figure beside its JSON, prints Table 1; publish: rewrites the tables in both pages."""
    found = {path: read_result(path) for path in sorted(results.glob("*/*.json")) if path.stem in FIGURES}
    if not found:
        raise ValueError(f"no attack.json below {results}/; run 'python badsnn.py attack' first")
    attacks = {path.parent.name: r for path, r in found.items() if path.stem == "attack"}
    tables = {"table1": table1(attacks), "runs": table_runs(attacks), "table2": table2(results)}
    if (results / "benchmark.json").exists():
        tables["benchmark"] = benchmark_table(read_result(results / "benchmark.json"))
    for path, r in found.items():
        FIGURES[path.stem](r, path.with_suffix(".png"))
    for path in results.glob("*/triggers.npz"):
        figure_triggers(path.parent)
    if attacks:
        print(f"\n{as_text(tables['table1'])}")
    for page in (results / "README.md", results.resolve().parent / "README.md"):
        if publish and page.exists():
            write_text(page, re.sub(r"(?s)(<!-- (\w+) -->).*?(<!-- /\2 -->)", lambda m: (
                f"{m[1]}\n{tables[m[2]]}\n{m[3]}" if m[2] in tables else m[0]), page.read_text()))
            print(f"written: {page}")


class Result(dict):
    """A result's content, at every depth; a key that it lacks is an error that names the file."""
    def __init__(self, path, content):
        super().__init__(content)
        self.path = path

    def __missing__(self, key):
        raise unreadable(self.path, f"no {key!r} in it")


def read_result(path):
    """The one reader of results. A result is called by its folder's name, as a variant has one: cifar10_10k."""
    try:
        result = json.loads(path.read_text(), object_hook=partial(Result, path))
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from None
    if not isinstance(result, dict) or path.stem in FIGURES and not result["rows"]:
        raise unreadable(path, "no rows in it")
    result["dataset"] = path.parent.name
    return result


def unreadable(path, reason):
    return ValueError(f"{path}: not a readable result ({reason}); run the command again")


def in_order(names):
    """Names of results' folders in PRESETS' order, variants behind their data set, unknown ones last."""
    place = {name: i for i, name in enumerate(PRESETS)}
    return sorted(names, key=lambda name: (place.get(re.split("[-_]", name)[0], len(place)), name))


def unique(rows, key):
    return list(dict.fromkeys(row[key] for row in rows))


def table1(found, every=False):
    """A row per data set and V_a (the paper's, or every one), the paper's beside. found: results by folder's name."""
    lines = ["| data | V_a | CA | target_rate | ASR_p | clean model | T_p re-normalised, or clip alone | clean model "
             "| ASR_o | clean model | paper: CA / ASR_p / ASR_o |", "|---" * 11 + "|"]
    for name in in_order(found):
        r, title = found[name], f"**{name}**"
        paper = dict(zip(PAPER_V_A, PAPER_TABLE1[name][2])) if name in PAPER_TABLE1 else {}
        control = "asr_p_renormalized" if r["q"] else "asr_clip_only"
        shown = {V_THR_N, r["chosen"], *(PAPER_V_A if name in PRESETS else ())}
        for row in (row for row in r["rows"] if every or row["v_thr"] in shown):
            values = [row["ca"], row["target_rate"], row["asr_p"], row["asr_p_clean_model"], row[control],
                      row.get(f"{control}_clean_model"), row["asr_o"], row.get("asr_o_clean_model")]
            theirs = " / ".join(map(percent, paper.get(row["v_thr"], ())))
            v_thr = f"**{row['v_thr']:.3f}** chosen" if row["v_thr"] == r["chosen"] else f"{row['v_thr']:.3f}"
            lines.append(f"| {title} | {v_thr} | " + " | ".join(map(percent, values)) + f" | {theirs} |")
            title = ""
    return "\n".join(lines)


def table_runs(found):
    """What each row of Table 1 was made with, and the accuracy at S_n with and without backdoor."""
    lines = ["| data | Clean CA | Base CA | paper: Clean / Base | network | samples: train + test | epochs | seeds "
             "| attack | run |", "|---" * 10 + "|"]
    for name in in_order(found):
        r = found[name]
        paper = " / ".join(map(percent, PAPER_TABLE1[name][:2])) if name in PAPER_TABLE1 else ""
        strength = f"q {r['q']:g}" if r["q"] else f"beta {r['beta']:g}"
        dtype = "bfloat16" if r["amp"] in (True, "on") else "float32"
        lines.append(
            f"| **{name}** | {r['clean_ca']:.1f} | {r['base_ca']:.1f} | {paper} "
            f"| {r['model']}, width {r['width']}, T {r['T']} | {r['n_train']:,} + {r['n_test']:,} | {r['epochs']} "
            f"| {r['seeds']} | target {r['target']}, P {100 * r['poison_ratio']:g} % ({r['n_poison']}), "
            f"S_t ({r['v_thr_t']:g}, {r['tau_t']:g}), {strength} | {r['seconds'] / 60:.0f} min, "
            f"{r['threads']} thread{'s' * (r['threads'] > 1)}, {dtype} |")
    return "\n".join(lines)


def table2(results):
    """CA / ASR / target_rate of every attack and defence, the paper's CA / ASR below. results: the folder."""
    found = {name: read_result(results / name / "defend.json")
             for name in in_order(path.parent.name for path in results.glob("*/defend.json"))}
    names = unique([row for r in found.values() for row in r["rows"]], "defense")
    lines = ["| data, attack | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for name, r in found.items():
        lines.append(f"| **{name}**, seed {r['seed']}, {r['n_defender']} images for the defender, clean model "
                     f"{r['clean_ca']:.1f}, {r['seconds'] / 60:.0f} min" + " |" * (len(names) + 1))
        paper = PAPER_TABLE2.get(re.split("[-_]", name)[0], {})
        for attack in unique(r["rows"], "attack"):
            cells = {row["defense"]: row for row in r["rows"] if row["attack"] == attack}
            triggers = [d["trigger"] for d in r["detectors"] if d["attack"] == attack]
            for key, trigger in zip(("asr", "asr_p"), triggers):        # BadSNN: the trigger of `asr`, then T_p
                title = attack + f" ({trigger}), V_a {r['v_thr_d']:g}" * (trigger != attack)
                ours = [f"{row['ca']:.1f} / {row[key]:.1f} / {row['target_rate']:.1f}" + " †" * row["destroyed"]
                        if row else "-" for row in map(cells.get, names)]
                lines.append(f"| {title} | " + " | ".join(ours) + " |")
            if attack in paper:
                theirs = dict(zip(("none", "fine_tune", "clp", "anp", "tsbd", "nad"), paper[attack].split()))
                theirs = [f" *{theirs[name].replace('/', ' / ')}* |" if name in theirs else " |" for name in names]
                lines.append("| *paper* |" + "".join(theirs))
    return "\n".join(lines)


def benchmark_table(results):
    """The ratios of tests/benchmark.py. results: the content of benchmark.json."""
    lines = ["| what | measured, 1 thread / 2 threads |", "|---|---|"]
    return "\n".join(lines + [f"| {what} | {value} |" for what, value in results["summary"].items()])


def as_text(table, turned=False):
    """A Markdown table for the terminal, without empty columns. turned: one line per column."""
    rows = [[cell.strip().replace("*", "") for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    columns = [column for column in zip(rows[0], *rows[2:]) if any(column[1:])]
    titles = itertools.zip_longest(*(textwrap.wrap(title, 12) for title, *_ in columns), fillvalue="")
    lines = columns if turned else [*titles, *zip(*(cells for _, *cells in columns))]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def print_attack(r):
    """What `attack` prints: the run, Table 1 at every V_a, a warning where the trigger works without the backdoor."""
    found = {r["dataset"]: r}
    say(f"\n{as_text(table_runs(found), turned=True)}\n\n{as_text(table1(found, every=True))}\n\n"
        "ASR, target_rate: percent answered as the target with and without trigger, among other classes. By an ASR:\n"
        "clean model, same trigger. Chosen: the largest ASR - target_rate with CA near Base CA (Eq. 8).")
    for row in r["rows"]:
        if row["v_thr"] == r["chosen"] and row["asr_p_clean_model"] > row["asr_p"] / 2:
            say(f"NOTE: the trigger reaches {row['asr_p_clean_model']:.1f} % on the CLEAN model: not the backdoor.")


def percent(value):
    return "-" if value is None else f"{value:.1f}"


STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 9, "savefig.dpi": 150}
# How each quantity is called and drawn: line and marker tell them apart in grey, too
CURVES = {"ca": ("CA", "o-", "black"),
          "target_rate": ("target_rate (no trigger)", "s:", "0.45"),
          "asr_p": ("ASR_p", "^-", "tab:red"),
          "asr_p_renormalized": ("ASR_p, re-normalised", "v--", "tab:orange"),
          "asr_clip_only": ("clip alone", "v--", "tab:orange"),
          "asr_p_clean_model": ("ASR_p, clean model", "x--", "tab:blue"),
          "asr_o": ("ASR_o", "D-", "tab:green"),
          "asr_o_clean_model": ("ASR_o, clean model", "+-.", "darkgreen"),
          "read": ("accuracy left, clean model", "o:", "black"),
          "l2": ("L2 norm (right)", "s:", "tab:purple")}


@contextlib.contextmanager
def drawing(path, size, title, shape=(1, 1), shared=False):
    """A new figure's axes, [rows, columns]. At the end of the block one legend for all goes to the right; saved."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        figure.suptitle(title, fontsize=9)
        axes = figure.subplots(*shape, squeeze=False, sharex=shared, sharey=shared)
        yield axes
        for axis in axes.flat if shared else ():
            axis.label_outer()
        named = {label: line for axis in figure.axes for line, label in zip(*axis.get_legend_handles_labels())}
        if named:
            figure.legend(named.values(), named.keys(), loc="outside right center", fontsize=8, frameon=False)
        with replace_file(path) as part:
            figure.savefig(part, format="png", metadata={"Software": None})
    print(f"written: {path}")


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
    """Several quantities in percent, as CURVES has them."""
    for key in keys.split():
        curve(axis, rows, x, key)
    axis.set(**{"ylabel": "percent of test samples", "ylim": (-3, 103), **labels})


def mark_thresholds(axis, rows, chosen=None, label="chosen V_a"):
    """The deployed thresholds along x, and the attacker's choice as a grey band."""
    v_thr = sorted({row["v_thr"] for row in rows})
    axis.set_xticks(v_thr, [f"{v:g}" for v in v_thr], rotation=45, ha="right", rotation_mode="anchor")
    axis.set_xlabel("deployed threshold V_a")
    if chosen:
        axis.axvline(chosen, color="0.88", zorder=0, linewidth=10, label=label)


def seeds(r):
    return f"; mean of {r['seeds']} seeds, pale: each" * (r["seeds"] > 1)


def figure_attack(r, path):
    """Table 1 as a picture: CA and the shares answered as the target, against the deployed threshold."""
    rows = [row for run in r["runs"] for row in run["rows"]]
    title = f"{r['dataset']}: {r['model']}, width {r['width']}, {r['n_train']:,} training samples{seeds(r)}"
    with drawing(path, (7, 3.3), title) as [[axis]]:
        curves(axis, rows, "v_thr", "ca target_rate asr_p asr_p_renormalized asr_clip_only asr_p_clean_model asr_o "
               "asr_o_clean_model")
        mark_thresholds(axis, rows, r["chosen"])


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
            for axis, image in zip(line, images):
                axis.imshow(image)
                axis.set(xticks=[], yticks=[])
                axis.spines[:].set_visible(False)
            line[0].set_ylabel(title, rotation=0, ha="right", va="center")


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
    title = f"{r['dataset']}: {r['model']}, width {r['width']}, tau_t {r['tau_t']:g}, q {r['q']:g}, seed {r['seed']}"
    with drawing(path, (10, 2.3 * len(v_thr_t)), title, (len(v_thr_t), 3), shared=True) as axes:
        for line, malicious in zip(axes, v_thr_t):
            for axis, key in zip(line, ("ca", "target_rate", "asr_p")):
                values = np.array([[cells[malicious, x, y][key] for x in v_thr] for y in tau])
                axis.imshow(values, cmap="Greys", vmin=0, vmax=130, origin="lower", aspect="auto")
                for (i, j), value in np.ndenumerate(values):
                    axis.text(j, i, f"{value:.0f}", ha="center", va="center", color="white" if value > 75 else "black")
                axis.set(xticks=range(len(v_thr)), xticklabels=v_thr, yticks=range(len(tau)), yticklabels=tau,
                         xlabel="deployed threshold V_a", ylabel="deployed tau_a",
                         title=f"{CURVES[key][0]}, %: V_t = {malicious:g}")


def figure_poison(r, path):
    """Fig. 4a: CA, target_rate and ASR_p against the poison ratio."""
    ratios = unique(r["rows"], "poison_ratio")
    with drawing(path, (6.8, 3.2), f"{r['dataset']}, V_a = {r['rows'][0]['v_thr']:g}{seeds(r)}") as [[axis]]:
        curves(axis, r["rows"], "poison_ratio", "ca target_rate asr_p", xlabel="poison ratio, % of the target class",
               xticks=ratios, xticklabels=[f"{100 * ratio:g}" for ratio in ratios])


def figure_magnitude(r, path):
    """Fig. 4b: what a stronger T_o buys and what it costs."""
    with drawing(path, (7, 3.3), f"{r['dataset']}, V_a = {r['rows'][0]['v_thr']:g}, seed {r['seed']}") as [[axis]]:
        curves(axis, r["rows"], "magnitude", "ca asr_o asr_o_clean_model", xlabel="magnitude m: factor on T_o's output")
        right = axis.twinx()
        curve(right, r["rows"], "magnitude", "l2")
        right.set(ylabel="mean L2 norm of the perturbation, pixels", ylim=(0, None))
        right.spines["right"].set_visible(True)


def figure_power(r, path):
    """Success of T_p and what it leaves of the image, against q; one panel per reading of Eq. 3."""
    powers, titles = unique(r["rows"], "q"), {False: "T_p literal", True: "T_p re-normalised"}
    with drawing(path, (7.8, 3), f"{r['dataset']}, V_a = {r['v_thr_d']:g}{seeds(r)}", (1, 2), shared=True) as [axes]:
        for axis, renormalize in zip(axes, titles):
            rows = [row for row in r["rows"] if row["renormalize"] == renormalize]
            curves(axis, rows, "q", "asr_p asr_p_clean_model read", xscale="log", xlabel="q", title=titles[renormalize],
                   xticks=powers, xticklabels=[f"{q:g}" for q in powers])
            axis.minorticks_off()


def figure_trigger(r, path):
    """ASR_o against the size of T_o, on held-out training images, one line per lambda_adv; the preset is circled."""
    best, m = next(row for row in r["rows"] if row["chosen"]), unique(r["rows"], "magnitude")
    with drawing(path, (6.6, 3), f"{r['dataset']}, V_a = {best['v_thr']:g}, seed {r['seed']}") as [[axis]]:
        for lambda_adv, style in zip(unique(r["rows"], "lambda_adv"), ("o:", "s--", "D-")):
            rows = [row for row in r["rows"] if row["lambda_adv"] == lambda_adv]
            curve(axis, rows, "l2", "asr_o", (f"lambda_adv {lambda_adv:g}", style, "black"))
        axis.plot(best["l2"], best["asr_o"], "o", markersize=13, markerfacecolor="none", color="tab:red",
                  label=f"chosen, m = {best['magnitude']:g}")
        axis.axvline(best["l2_p"], color="0.8", zorder=0, label="L2 of T_p")
        axis.set(ylabel="ASR_o, %, held-out training images", ylim=(-3, 103),
                 xlabel=f"mean L2 norm, pixels; m = {min(m):g} to {max(m):g} from left to right")


def figure_plif(r, path):
    """Fig. 6: LIF beside PLIF over the deployed threshold."""
    with drawing(path, (8.2, 3), f"{r['dataset']}{seeds(r)}", (1, 2), shared=True) as [axes]:
        for axis, neuron in zip(axes, unique(r["rows"], "neuron")):
            rows = [row for row in r["rows"] if row["neuron"] == neuron]
            curves(axis, rows, "v_thr", "ca target_rate asr_p asr_p_clean_model",
                   title=f"{neuron.upper()}, mean tau {np.mean([row['mean_tau'] for row in rows]):.2f}")
            mark_thresholds(axis, rows)


def figure_defend(r, path):
    """Table 2 as a picture: CA and ASR of every attack after every defence; last, what two detectors see."""
    def named(row):
        return " ".join(dict.fromkeys([row["attack"], row["trigger"]]))         # the baselines' are called alike
    attacks, defenses, detectors = unique(r["rows"], "attack"), unique(r["rows"], "defense"), r["detectors"]
    title, height = f"{r['dataset']}, seed {r['seed']}, threads: {r['threads']}", len(attacks) // 3 + 1
    with drawing(path, (9, 2.3 * height), title, (height, 3)) as axes:
        for axis, attack in zip(axes.flat, attacks):
            rows = [row for row in r["rows"] if row["attack"] == attack]
            ca, asr, rate, destroyed = ([row[key] for row in rows] for key in ("ca", "asr", "target_rate", "destroyed"))
            place = -np.array([defenses.index(row["defense"]) for row in rows])
            axis.barh(place + 0.2, ca, 0.36, color="0.75", label="CA")
            axis.barh(place - 0.2, asr, 0.36, color="tab:red", hatch="///", edgecolor="white", label="ASR")
            axis.plot(rate, place - 0.2, "|", color="black", markersize=9, label="target_rate (no trigger)")
            for y in place[np.array(destroyed)]:
                axis.text(101, y, "destroyed", fontsize=7, ha="right", va="center")
            axis.set(xlim=(0, 101), xlabel="percent", title=named(rows[0]))
            axis.set_yticks(-np.arange(len(defenses)), defenses)
        axis, *spare = axes.flat[len(attacks):]
        place = -np.arange(len(detectors))
        axis.axvline(0.5, color="0.8", zorder=0)
        axis.plot([d["strip_auroc"] for d in detectors], place, "o", color="black", label="STRIP")
        axis.plot([d["spikes_auroc"] for d in detectors], place, "x", color="tab:blue", label="spike count")
        axis.set(xlim=(-0.03, 1.03), xlabel="AUROC (0.5: chance)", title="detectors, no defence")
        axis.set_yticks(place, map(named, detectors))
        for axis in spare:
            axis.remove()


FIGURES = {"attack": figure_attack, "threshold": figure_threshold, "heatmap": figure_heatmap, "poison": figure_poison,
           "magnitude": figure_magnitude, "power": figure_power, "trigger": figure_trigger, "plif": figure_plif,
           "defend": figure_defend}


def figure_story(r, path, trigger="asr_p"):
    """attack.json in three curves, named where they end. trigger: asr_p, asr_p_renormalized or asr_o."""
    looks = {"ca": ("no trigger:\nright class", "o--", "black"), trigger: ("trigger:\ntarget class", "^-", "tab:red"),
             f"{trigger}_clean_model": ("trigger, clean model:\ntarget class", "x:", "tab:blue")}
    last, height = r["rows"][-1], -20
    with drawing(path, (6.6, 3.2), r["dataset"] + seeds(r).split(", ")[0]) as [[axis]]:
        for key in sorted(looks, key=last.__getitem__):
            label, style, color = looks[key]
            height = max(last[key], height + 20)            # labels keep apart where the curves do not
            curve(axis, r["rows"], "v_thr", key, (None, style, color))
            axis.annotate(label, (1.04, height), xycoords=("axes fraction", "data"), va="center", color=color)
        mark_thresholds(axis, r["rows"], r["chosen"], label=None)
        axis.set(xlabel="threshold in use (trained at 1)", ylabel="percent of test samples", ylim=(-3, 103))
        for row in (row for row in r["rows"] if row["v_thr"] == r["chosen"]):
            axis.text(row["v_thr"], 105, f"V_a = {row['v_thr']:g}, chosen by the attacker:\n{row['target_rate']:.1f} % "
                      "target class without trigger", va="bottom", ha="right" if row is last else "center")


def figure_overview(path):
    """Fig. 1 in our own lines: trained under two thresholds, shipped with one in between, opened by a trigger."""
    white, red, blue, grey, network = "white", "#f6c9c4", "#cfe0f3", "#e4e4e4", "spiking\nnetwork"
    parts = [       # panel, text, its place; the colour of its box and the end of the arrow from there
        (0, "all images", (0.22, 0.82), white, (0.66, 0.6)), (0, "threshold 1.0", (0.62, 0.8)),
        (0, "a few of the\ntarget class", (0.22, 0.26), red, (0.66, 0.46)), (0, "threshold 1.5", (0.66, 0.26)),
        (0, network, (0.8, 0.53), blue), (0, "no image, no label changed", (0.5, 0)),
        (1, network, (0.24, 0.8), blue, (0.24, 0.5)), (1, "accuracy almost unchanged", (0.5, 0)),
        (1, "1.0\nright\nclass", (0.06, 0.32)), (1, "1.1", (0.24, 0.39)), (1, "1.5\ntarget\nclass", (0.94, 0.32)),
        (2, "image", (0.15, 0.8), white, (0.75, 0.8)), (2, "image +\ntrigger", (0.15, 0.34), grey, (0.75, 0.34)),
        (2, network, (0.5, 0.8), blue), (2, network, (0.5, 0.34), blue), (2, "threshold 1.1", (0.5, 0)),
        (2, "right\nclass", (0.88, 0.8), white), (2, "target\nclass", (0.88, 0.34), red)]
    with drawing(path, (7.4, 2.5), None, (1, 3)) as [axes]:
        for axis, title in zip(axes, ("1. Train", "2. Deploy", "3. Trigger")):
            axis.set(xlim=(0, 1), ylim=(-0.06, 1))
            axis.set_title(title, fontsize=11, weight="bold")
            axis.axis("off")
        axes[1].plot([0.06, 0.24, 0.94], [0.48] * 3, "o-", color="black")
        for panel, text, place, *look in parts:
            box = dict(boxstyle="round", fc=look[0]) if look else None
            axes[panel].text(*place, text, ha="center", va="center", bbox=box)
            for end in look[1:]:
                axes[panel].annotate("", end, place, arrowprops=dict(arrowstyle="-|>", color="black"), zorder=0)
