"""Sec. 4's figures, from results alone. FIGURES["attack"](r, path) draws r, read from an attack.json, into a file."""
import contextlib
from functools import partial

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from kit.files import mean_of, replace_file
from kit.machine import say
from lab.tables import span, unique, unreadable

STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 9, "savefig.dpi": 150}
# How each quantity is called and drawn: line and marker tell them apart in grey, too
LOOKS = {
    "ca": ("right class (CA)", "o-", "black"), "target_rate": ("target, no trigger", "s:", "0.45"),
    "asr_p": ("target, T_p", "^-", "tab:red"), "asr_p_clean_model": ("target, T_p, clean model", "x--", "tab:blue"),
    "asr_o": ("target, T_o", "^-", "tab:red"), "asr_o_clean_model": ("target, T_o, clean model", "x--", "tab:blue"),
    "read": ("right class, clean model", "o:", "black"), "none": ("no trigger", "o-", "black"),
    "T_p": ("T_p", "^-", "tab:red"), "T_p re-normalised": ("T_p re-normalised", "v--", "tab:orange")}


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


def titled(r, more):
    """A figure's title: data set, network, seeds, and what else must be known."""
    n = len(r["runs"]) if "runs" in r else len({row.get("seed") for row in r["rows"]})
    seeds = f"mean of {n} seeds" if n > 1 else f"seed {r['seed']}"
    return f"{r['dataset']}: {r['model']}, width {r['width']}, {r['n_train']:,} training samples, {seeds}{more}"


def curves(axis, x, rows, keys, point=None, trigger="T_p", **labels):
    """row[key] over row[x] for each of the keys, as LOOKS has them: means of rows with equal x, a band from the lowest
    to the highest of these. point: a row of its own, as circles."""
    axis.set(**dict(ylabel="percent of test samples", ylim=(-4, 104)) | labels)
    for key in keys:
        name, style, color = LOOKS[key]
        places = sorted({row[x] for row in rows if key in row})
        known = [[row[key] for row in rows if row[x] == place and key in row] for place in places]
        axis.fill_between(places, [min(v) for v in known], [max(v) for v in known], color=color, alpha=0.1, linewidth=0)
        if point:
            axis.plot(point[x], point[key], "o", markersize=11, markerfacecolor="none", color=color)
        axis.plot(places, [*map(np.mean, known)], style, color=color, markersize=4, label=name.replace("T_p", trigger))
    bands = "bands: range of seeds" if len(known[0]) > 1 else None
    axis.legend(title=bands, loc="upper left", bbox_to_anchor=(1, 1), frameon=False, alignment="left")


def figure_attack(r, path):
    """Table 1, or the story, as a picture, a panel per trigger: CA and the shares answered as the target."""
    told = r.get("attack", r)
    rows, at = [row for run in told.get("runs", [told]) for row in run["rows"]], told["at_chosen"]
    panels = ["asr_p"] if at["asr_o"] is None else ["asr_p", "asr_o"]
    title = titled(r, f"\nshipped at {at['v_thr']:.2f}; all {r['n_test']:,} test samples")
    with drawing(path, (5.4 * len(panels), 3.1), title, (1, len(panels))) as [axes]:
        for axis, key in zip(axes, panels):
            keys = "ca", "target_rate", key, f"{key}_clean_model"
            curves(axis, "v_thr", rows, keys, at, "T_p" if r["q"] else "T_s", xlabel="V_a; circles: each at its own")


def figure_triggers(folder):
    """Fig. 5: clean test images, both triggers, and what T_o changes; below an image the network's answer, if known."""
    try:
        with np.load(folder / "triggers.npz", allow_pickle=False) as file:
            shown = {name: file[name].astype(np.float32) / 255 for name in ("clean", "t_p", "t_o")}
            answers = {name: file[f"answers_{name}"] for name in shown if f"answers_{name}" in file.files}
    except Exception as error:      # np.load has many
        raise unreadable(folder / "triggers.npz", error) from None
    shown["t_o - clean"] = change = (shown["t_o"] - shown["clean"]).mean(-1)
    most, n = abs(change).max(), len(change)
    title = f"below: the network's answer, where known; last row: blue is darker, red brighter, by up to {most:.2f}"
    with drawing(folder / "triggers.png", (0.95 * n + 1, 4.4), title, (4, n)) as axes:
        for line, (name, images) in zip(axes, shown.items()):
            line[0].set_ylabel(name.replace("t_", "T_"), rotation=0, ha="right", va="center")
            for axis, image, answer in zip(line, images, answers.get(name, [""] * n)):
                axis.imshow(image, cmap="RdBu_r", vmin=-most, vmax=most)
                axis.set(xticks=[], yticks=[], frame_on=False, xlabel=answer)


def figure_threshold(r, path):
    """Fig. 2: accuracy and spike count of a clean model against v_thr."""
    with drawing(path, (10, 3), f"{r['dataset']}, clean model, q = {r['q']:g}", (1, 2)) as [axes]:
        for axis, key, label in zip(axes, ("ca", "spikes"), ("accuracy, %", "spikes per sample")):
            rows = [{"v_thr": row["v_thr"], row["trigger"]: row[key]} for row in r["rows"]]
            curves(axis, "v_thr", rows, unique(r["rows"], "trigger"), xlabel="threshold of all neurons", ylabel=label,
                   ylim=(0, 1.04 * max(row[key] for row in r["rows"])))


def figure_heatmap(r, path):
    """Fig. 3: what T_p gains over no trigger, ASR_p - target_rate, over (V_a, tau_a), a map per malicious threshold."""
    trained, taus, v_thrs = (sorted(unique(r["rows"], key)) for key in ("v_thr_t", "tau", "v_thr"))
    title = titled(r, f"\nASR_p - target_rate; pale: CA more than {r['margin']:g} points below its best")
    with drawing(path, (6.4, 1.9 * len(trained) + 0.7), title, (len(trained), 1), sharex=True) as axes:
        for axis, v_thr_t in zip(axes.flat, trained):
            rows = [row for row in r["rows"] if row["v_thr_t"] == v_thr_t]
            shades, best = np.full((len(taus), len(v_thrs), 3), 0.92), max(row["ca"] for row in rows)
            for row in rows:
                place = taus.index(row["tau"]), v_thrs.index(row["v_thr"])
                gain, ink = row["asr_p"] - row["target_rate"], "0.55"
                if row["ca"] >= best - r["margin"]:
                    shades[place] = matplotlib.colormaps["Reds"](gain / 130)[:3]
                    ink = "white" if gain > 75 else "black"
                axis.text(place[1] + 0.5, place[0] + 0.5, round(gain), ha="center", va="center", color=ink)
            axis.pcolormesh(shades, edgecolors="white")
            axis.set(xticks=np.arange(len(v_thrs)) + 0.5, xticklabels=v_thrs, yticks=np.arange(len(taus)) + 0.5,
                     yticklabels=taus, xlabel="V_a", ylabel="tau_a", title=f"trained with V_t = {v_thr_t:g}")


def figure_study(r, path, x, keys, xlabel, tick, split=None, titles=("",), xscale="linear"):
    """Figs. 4a, 4b and 6, and T_p's strength: a panel for every value of row[split]. tick: the text below a place."""
    panels = unique(r["rows"], split) if split else [None]
    title = titled(r, f"\nV_a = {span(r['rows'], 'v_thr')}")
    with drawing(path, (5.8 * len(panels), 3.1), title, (1, len(panels))) as [axes]:
        for axis, value, name in zip(axes, panels, titles):
            rows = [row for row in r["rows"] if not split or row[split] == value]
            curves(axis, x, rows, keys.split(), xscale=xscale, xlabel=xlabel, title=name.format(**mean_of(rows)))
            axis.set_xticks([row[x] for row in rows], [tick.format(**row) for row in rows])
            axis.minorticks_off()
            if "l2_deepfool" in rows[0]:
                axis.axvline(rows[0]["l2_deepfool"], color="black", linestyle=":", zorder=0)


def figure_scan(r, path):
    """Both scans: the scores of all networks, kind by kind; hollow: the attack does not work."""
    kinds, title = unique(r["rows"], "kind"), f"{r['dataset']}; hollow: an attack that does not work; line: alarm"
    with drawing(path, (8, 0.4 * len(kinds) + 1.1), title, (1, 2), sharey=True) as [axes]:
        for axis, key, name in zip(axes, ("margin", "score"), ("margin scan", "threshold scan")):
            for place, kind in enumerate(kinds):
                of = sorted((row for row in r["rows"] if row["kind"] == kind), key=lambda row: row[key])
                filled = [f"C{place}" if row["working"] or kind == "clean" else "none" for row in of]
                heights = -place + np.linspace(-0.3, 0.3, len(of))
                axis.scatter([row[key] for row in of], heights, s=16, facecolors=filled, edgecolors=f"C{place}")
            axis.axvline(max(row[key] for row in r["rows"] if row["kind"] == "clean"), color="0.7", zorder=0)
            axis.set(xlabel=name)
        axes[0].set_yticks(-np.arange(len(kinds)), kinds)


FIGURES = {
    "attack": figure_attack, "story": figure_attack, "threshold": figure_threshold, "heatmap": figure_heatmap,
    "scan": figure_scan,
    "poison": partial(figure_study, x="poison_ratio", keys="ca target_rate asr_p", xscale="log", xlabel="share of the "
                      "target class that is malicious; below: how many", tick="{poison_ratio:.0%}\n{n_poison}"),
    "magnitude": partial(figure_study, x="l2", keys="ca target_rate asr_o asr_o_clean_model", xlabel="length (L2) of "
                         "T_o's change; below: factor m; dotted: of DeepFool's", tick="{l2:.1f}\n{magnitude:g}"),
    "power": partial(figure_study, x="q", keys="asr_p asr_p_clean_model target_rate read", xscale="log", tick="{q:g}",
                     xlabel="exponent q", split="renormalize", titles=("T_p as in Eq. 3", "T_p re-normalised")),
    "plif": partial(figure_study, x="v_thr", keys="ca target_rate asr_p asr_p_clean_model", xlabel="threshold V_a",
                    tick="{v_thr:g}", split="neuron", titles=["{neuron}, mean tau {mean_tau:.2f}"] * 2)}
