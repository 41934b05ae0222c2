"""Sec. 4's figures, from results alone. FIGURES has each by the name of its JSON file.

    FIGURES["attack"](r, path)          draws read_result("DATASET/attack.json") into an image file

CA: accuracy without trigger. ASR, target_rate: share answered as the target with and without trigger. All in percent.
A curve has its name at its end; bands go from the lowest to the highest seed.
"""
import contextlib
from functools import partial

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from kit.files import replace_file
from kit.machine import say
from lab.tables import mean, span, table2_lines, unique, unreadable

STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 9, "savefig.dpi": 150}
# How each quantity is called and drawn: line and marker tell them apart in grey, too
LOOKS = {
    "ca": ("right class (CA)", "o-", "black"), "target_rate": ("target, no trigger", "s:", "0.45"),
    "asr_p": ("target, T_p", "^-", "tab:red"), "asr_p_clean_model": ("target, T_p, clean model", "x--", "tab:blue"),
    "asr_o": ("target, T_o", "^-", "tab:red"), "asr_o_clean_model": ("target, T_o, clean model", "x--", "tab:blue"),
    "read": ("right class, clean model", "o:", "black")}


@contextlib.contextmanager
def drawing(path, size, title, shape=(1, 1), **options):
    """A new figure's axes, [rows, columns]; saved at the end of the block."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        figure.suptitle(title, fontsize=9)
        yield figure.subplots(*shape, squeeze=False, **options)
        with replace_file(path) as part:
            figure.savefig(part, format="png", metadata={"Software": None})
    say(f"written: {path}")


def titled(r, more=""):
    """A figure's title: data set, network, seeds, and what else must be known."""
    n = len({row["seed"] for row in r["rows"] if "seed" in row} or r.get("runs", "1"))
    seeds = f"mean of {n} seeds" if n > 1 else f"seed {r['seed']}"
    return f"{r['dataset']}: {r['model']}, width {r['width']}, {r['n_train']:,} training samples, {seeds}{more}"


def lines_of(rows, keys, trigger="T_p"):
    """Lines for curves(): quantities of rows, as LOOKS has them."""
    return [(rows, key, (LOOKS[key][0].replace("T_p", trigger), *LOOKS[key][1:])) for key in keys.split()]


def curves(axis, x, lines, point=None, **labels):
    """Lines (rows, key, (name, style, colour)) of row[key] over row[x]: means of rows with equal x, a band where these
    differ, the name at the right end. point: a row that every line goes through, with a circle: as shipped."""
    axis.set(**dict(dict(ylabel="percent of test samples", ylim=(-4, 104)), **labels))
    ends = []
    for rows, key, (name, style, color) in lines:
        known = {place: [row[key] for row in rows if row[x] == place] for place in sorted(unique(rows, x))}
        lowest, highest = ([f(values) for values in known.values()] for f in (min, max))
        axis.fill_between(list(known), lowest, highest, color=color, alpha=0.1, linewidth=0)
        line = {place: np.mean(values) for place, values in known.items()}
        if point:       # in the place of a threshold of the curve that is nearly the same
            line = {place: value for place, value in line.items() if abs(place - point[x]) > 0.005}
            line[point[x]] = point[key]
            axis.plot(point[x], point[key], "o", markersize=11, markerfacecolor="none", color=color)
        axis.plot(*zip(*sorted(line.items())), style, color=color, markersize=4)
        ends.append((line[max(line)], name, color))
    low, high = axis.get_ylim()
    gap, height = 0.09 * (high - low), -np.inf
    for i, (end, name, color) in enumerate(sorted(ends)):
        height = min(max(end, height + gap), high - gap * (len(ends) - 0.8 - i))
        axis.annotate(name, (1.02, height), xycoords=("axes fraction", "data"), va="center", color=color)


def figure_attack(r, path):
    """Table 1, or the story, as a picture, a panel per trigger: CA and the shares answered as the target."""
    told, trigger = r.get("attack", r), "T_p" if r["q"] else "T_s"
    rows, at = [row for run in told.get("runs", [told]) for row in run["rows"]], told["at_chosen"]
    panels = [lines_of(rows, "ca target_rate asr_p asr_p_clean_model", trigger)]
    if at["asr_o"] is not None:
        panels.append(lines_of(rows, "ca target_rate asr_o asr_o_clean_model"))
    bands = "; bands: lowest to highest seed" if len(told.get("runs", [])) > 1 else ""
    title = titled(r, f"\nshipped at {at['v_thr']:.2f}; all {r['n_test']:,} test samples{bands}")
    with drawing(path, (5.4 * len(panels), 3.1), title, (1, len(panels))) as [axes]:
        for axis, lines in zip(axes, panels):
            curves(axis, "v_thr", lines, at, xlabel="threshold in use (trained at 1.0); circles: as shipped")


def figure_triggers(folder):
    """Fig. 5: clean test images, both triggers, and what T_o changes; below an image the network's answer, if known."""
    try:
        with np.load(folder / "triggers.npz", allow_pickle=False) as file:
            shown = {key: file[key].astype(np.float32) / 255 for key in ("clean", "t_p", "t_o")}
            answers = {key: file[f"answers_{key}"] for key in shown if f"answers_{key}" in file.files}
    except Exception as error:      # np.load has many
        raise unreadable(folder / "triggers.npz", error) from None
    shown["t_o - clean"] = change = (shown["t_o"] - shown["clean"]).mean(-1)
    most, n = abs(change).max(), len(change)
    title = "numbers: the network's answer; " if answers else ""
    title += f"last row: blue is darker, red is brighter, by up to {most:.2f} of the range"
    with drawing(folder / "triggers.png", (0.95 * n + 1, 4.4), title, (4, n)) as axes:
        for line, (name, images) in zip(axes, shown.items()):
            line[0].set_ylabel(name.replace("t_", "T_"), rotation=0, ha="right", va="center")
            for axis, image, answer in zip(line, images, answers.get(name, [""] * n)):
                axis.imshow(image, cmap="RdBu_r", vmin=-most, vmax=most)
                axis.set(xticks=[], yticks=[], frame_on=False, xlabel=answer)


def figure_threshold(r, path):
    """Fig. 2: accuracy and spike count of a clean model against v_thr."""
    looks = {"none": ("no trigger", "o-", "black"), "T_p": ("T_p", "^-", "tab:red"),
             "T_p re-normalised": ("T_p re-normalised", "v--", "tab:orange")}
    rows = {name: [row for row in r["rows"] if row["trigger"] == name] for name in looks}
    most = max(row["spikes"] for row in r["rows"])
    panels = [("ca", "accuracy, %", 104), ("spikes", "spikes per sample", 1.04 * most)]
    with drawing(path, (10, 3), f"{r['dataset']}, clean model, q = {r['q']:g}", (1, 2)) as [axes]:
        for axis, (key, label, top) in zip(axes, panels):
            curves(axis, "v_thr", [(rows[name], key, looks[name]) for name in looks], ylabel=label, ylim=(0, top),
                   xlabel="threshold of all neurons (trained at 1.0)")


def figure_heatmap(r, path):
    """Fig. 3: what T_p gains over no trigger, ASR_p - target_rate, over (V_a, tau_a), a map per malicious threshold."""
    v_thr_t, v_thr, tau = (sorted(unique(r["rows"], key)) for key in ("v_thr_t", "v_thr", "tau"))
    title = titled(r, f"\nASR_p - target_rate; grey: CA more than {r['margin']:g} points below its best")
    with drawing(path, (7.4, 1.9 * len(v_thr_t) + 0.7), title, (len(v_thr_t), 1), sharex=True) as axes:
        for [axis], malicious in zip(axes, v_thr_t):
            cells = {(row["v_thr"], row["tau"]): row for row in r["rows"] if row["v_thr_t"] == malicious}
            gain = {at: row["asr_p"] - row["target_rate"] for at, row in cells.items()}
            best = max(row["ca"] for row in cells.values())
            usable = {at: row["ca"] >= best - r["margin"] for at, row in cells.items()}
            axis.set_facecolor("0.88")
            axis.pcolormesh(v_thr, tau, [[gain[x, y] if usable[x, y] else np.nan for x in v_thr] for y in tau],
                            shading="nearest", cmap="Reds", vmin=0, vmax=130, edgecolors="white")
            for (x, y), value in gain.items():
                dark = "white" if value > 75 else "black"
                axis.text(x, y, round(value), ha="center", va="center", color=dark if usable[x, y] else "0.5")
            axis.set(ylabel="tau_a", yticks=tau, title=f"trained with V_t = {malicious:g}")
        axis.set_xticks(v_thr, [f"{v:g}" for v in v_thr], rotation=45)
        axis.set_xlabel("deployed threshold V_a")


def figure_study(r, path, x, keys, xlabel, tick, split=None, xscale="linear"):
    """Figs. 4a and 4b, and T_p's strength: quantities over x, a panel for every value of row[split]. tick: the text
    below a row's place. Dotted in Fig. 4b: how far DeepFool goes to the target, pale on a clean model."""
    panels, names = unique(r["rows"], split) if split else [""], {False: "T_p as in Eq. 3", True: "T_p re-normalised"}
    title = titled(r, f"\nV_a = {span(unique(r['rows'], 'v_thr'))}")
    with drawing(path, (5.8 * len(panels), 3.1), title, (1, len(panels))) as [axes]:
        for axis, value in zip(axes, panels):
            rows = [row for row in r["rows"] if not split or row[split] == value]
            curves(axis, x, lines_of(rows, keys), xscale=xscale, xlabel=xlabel, title=names.get(value))
            axis.set_xticks([row[x] for row in rows], [tick.format(**row) for row in rows])
            axis.minorticks_off()
            for key, color in (("l2_deepfool", "black"), ("l2_deepfool_clean_model", "0.7")):
                axis.axvline(rows[0].get(key) or 0, visible=key in rows[0], color=color, linestyle=":", zorder=0)


def figure_plif(r, path):
    """Fig. 6: LIF against PLIF, whose tau is learned, over the deployed thresholds."""
    lines, more = [], "\nmean tau:"
    for neuron, color in (("lif", "black"), ("plif", "tab:purple")):
        rows = [dict(row, gain=row["asr_p"] - row["target_rate"]) for row in r["rows"] if row["neuron"] == neuron]
        lines += [(rows, "ca", (f"{neuron.upper()}: CA", "o-", color)),
                  (rows, "gain", (f"{neuron.upper()}: ASR_p - target_rate", "^--", color))]
        more += f" {neuron.upper()} {mean(rows, 'mean_tau'):.2f},"
    more += f" clean models under T_p: at most {max(row['asr_p_clean_model'] for row in r['rows']):.1f} % target"
    with drawing(path, (6, 3), titled(r, more)) as [[axis]]:
        curves(axis, "v_thr", lines, xlabel="deployed threshold V_a", ylabel="percent")


def figure_events(r, path):
    """The study of events, means and (pale) seeds: attacks that poison, at S_n; BadSNN at V_a = 1.2."""
    looks = dict(asr=("ASR", "^", "tab:red"), asr_clean_model=("ASR, clean model", "x", "tab:blue"),
                 target_rate=("target_rate", "|", "0.45"), ca=("CA", "o", "black"))
    panels = {}         # title: trigger: rows
    for row in r["rows"]:
        title = f"BadSNN, V_a 1.2, {row['frames']}" if "badsnn" in row["attack"] else "attacks that poison, threshold 1"
        if not row["attack"].endswith(("own V_a", "V_a 1.1")) and (row["T"], row["neuron"]) == (r["T"], r["neuron"]):
            panels.setdefault(title, {}).setdefault(row["trigger"], []).append(row)
    with drawing(path, (3.5 * len(panels), 3.3), titled(r), (1, len(panels))) as [axes]:
        for axis, (title, of) in zip(axes, panels.items()):
            for key, (label, marker, color) in looks.items():
                for place, rows in enumerate(of.values()):
                    axis.plot([row[key] for row in rows], [-place] * len(rows), marker, color=color, alpha=0.25, ms=4)
                axis.plot([mean(rows, key) for rows in of.values()], -np.arange(len(of)), marker, color=color,
                          label=label, markerfacecolor="none")
            axis.set(xlim=(-3, 103), xlabel="percent", title=title)
            axis.set_yticks(-np.arange(len(of)), of)
        axis.figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)


def figure_defend(r, path):
    """Table 2 at a glance: CA and ASR after every defence, BadSNN also with the threshold set back."""
    lines, defenses = [line for line in table2_lines(r) if "clean model" not in line[0]], unique(r["rows"], "defense")
    title = titled(r, "\npale numbers: the attack was not learned, or the defence destroyed the network (half its CA)")
    with drawing(path, (12, 0.34 * len(lines) + 1.4), title, (1, 2), sharey=True) as [axes]:
        for axis, key, colors in ((axes[0], "ca", "Blues"), (axes[1], "asr", "Reds")):
            for i, (_, cells, learned, destroyed) in enumerate(lines):
                for name, rows in cells.items():
                    j, value, counts = defenses.index(name), mean(rows, key), learned and name not in destroyed
                    shade = matplotlib.colormaps[colors](value / 130) if counts else "0.94"
                    dark = "white" if value > 75 else "black"
                    axis.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, edgecolor="white", facecolor=shade))
                    axis.text(j, i, f"{value:.0f}", ha="center", va="center", color=dark if counts else "0.6")
            axis.set(xlim=(-0.5, len(defenses) - 0.5), ylim=(len(lines) - 0.5, -0.5), title=f"{key.upper()}, %")
            axis.set_xticks(range(len(defenses)), [name.replace("_", " ") for name in defenses])
            axis.set_yticks(range(len(lines)), [title for title, *_ in lines])
            axis.tick_params(length=0)
            axis.spines[:].set_visible(False)


def figure_scan(r, path):
    """The threshold scan: the scores of all models, kind by kind, those of attackers who know the scan last."""
    kinds, colors = {}, {"clean": "tab:blue", "badsnn": "tab:red"}
    for row in [*r["rows"], *r["evaders"]]:
        name = row.get("kind") or f"hides: {row['evader'].replace('_', ' ')}"
        kinds.setdefault(name.replace("hides: none", "badsnn"), []).append(row["scores"]["100 images"])
    title = f"{r['dataset']}: {len(r['rows']) + len(r['evaders'])} models"
    with drawing(path, (6, 0.4 * len(kinds) + 1.1), title) as [[axis]]:
        for place, (kind, scores) in enumerate(kinds.items()):
            axis.plot(np.sort(scores), -place + np.linspace(-0.3, 0.3, len(scores)), "x" if kind == "clean" else "o",
                      markersize=4, color=colors.get(kind, "0.35"))
        if "summary" in r:
            axis.axvline(r["summary"]["100 images"]["alarm"], color="0.7", zorder=0)
            axis.set_title("line: the alarm")
        axis.set(xlabel="score of the threshold scan (1: sure of one class)", xlim=(0, 1.03))
        axis.set_yticks(-np.arange(len(kinds)), kinds)


FIGURES = {
    "attack": figure_attack, "story": figure_attack, "threshold": figure_threshold, "heatmap": figure_heatmap,
    "plif": figure_plif, "events": figure_events, "defend": figure_defend, "scan": figure_scan,
    "poison": partial(figure_study, x="poison_ratio", keys="ca target_rate asr_p", xscale="log", xlabel="share of the "
                      "target class that is malicious; below: how many", tick="{poison_ratio:.0%}\n{n_poison}"),
    "magnitude": partial(figure_study, x="l2", keys="ca target_rate asr_o asr_o_clean_model", xlabel="length (L2) of "
                         "T_o's change; below: factor m; dotted: of DeepFool's", tick="{l2:.1f}\n{magnitude:g}"),
    "power": partial(figure_study, x="q", keys="asr_p asr_p_clean_model target_rate read", split="renormalize",
                     xscale="log", xlabel="exponent q", tick="{q:g}")}
