"""Sec. 4's figures, from results alone. FIGURES has each by the name of its JSON file.

    FIGURES["attack"](r, path)                      draws read_result("DATASET/attack.json") into an image file
    figure_triggers(folder)                         Fig. 5, from the folder's triggers.npz
    with drawing(path, (7, 3), title) as [[axis]]: ...      a new figure, saved at the end of the block

CA: accuracy without trigger. ASR, target_rate: share answered as the target with and without trigger. All in percent.
A curve has its name at its end; bands go from the lowest to the highest seed.
"""
import contextlib

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from kit.files import replace_file
from kit.machine import say
from lab.tables import mean, span, table2_lines, unique, unreadable

STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 9, "savefig.dpi": 150}
# How each quantity is called and drawn: line and marker tell them apart in grey, too
LOOKS = {"ca": ("right class (CA)", "o-", "black"), "target_rate": ("target, no trigger", "s:", "0.45"),
         "asr_p": ("target, {t}", "^-", "tab:red"), "asr_p_clean_model": ("target, {t}, clean model", "x--", "tab:blue"),
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


def curves(axis, rows, x, looks, point=None, **labels):
    """Quantities in percent over row[x], {key: (name, style, colour)}: means of rows with equal x, a band where these
    differ, the name at the right end. point: a row that every curve goes through, marked: what the attacker ships."""
    ends, places = {}, sorted(set(unique(rows, x)))
    for key, (name, style, color) in looks.items():
        known = {place: [row[key] for row in rows if row[x] == place and row[key] is not None] for place in places}
        line = {place: np.mean(values) for place, values in known.items() if values}
        low, high = ([f(known[place]) for place in line] for f in (min, max))
        axis.fill_between(list(line), low, high, color=color, alpha=0.12, linewidth=0)
        if point:       # in the place of a threshold of the curve that is nearly the same
            line = {place: value for place, value in line.items() if abs(place - point[x]) > 0.005}
            line[point[x]] = point[key]
            axis.plot(point[x], point[key], "o", markersize=11, markerfacecolor="none", color=color)
        axis.plot(*zip(*sorted(line.items())), style, color=color, markersize=4)
        ends[name] = line[max(line)], color
    named_at_the_ends(axis, ends)
    axis.set(**dict(dict(ylabel="percent of test samples", ylim=(-4, 104), xlabel=x), **labels))


def named_at_the_ends(axis, ends, gap=9):
    """Writes {name: (height in percent, colour)} to the right of an axis, no two closer than `gap`."""
    names = sorted(ends, key=lambda name: ends[name][0])
    heights = [ends[name][0] for name in names]
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + gap)
    for i in reversed(range(len(heights))):     # and back from the top
        heights[i] = min([heights[i], 102 - gap * (len(heights) - 1 - i)])
    for name, height in zip(names, heights):
        axis.annotate(name, (1.02, height), xycoords=("axes fraction", "data"), va="center", color=ends[name][1],
                      annotation_clip=False)


def looks_of(keys, trigger="T_p"):
    return {key: (LOOKS[key][0].format(t=trigger), *LOOKS[key][1:]) for key in keys.split()}


def over_thresholds(path, title, rows, at, trigger):
    """CA and the shares answered as the target against the deployed threshold, a panel per trigger. at: as shipped."""
    panels = [looks_of("ca target_rate asr_p asr_p_clean_model", trigger)]
    if at["asr_o"] is not None:
        panels.append(looks_of("ca target_rate asr_o asr_o_clean_model"))
    with drawing(path, (5.4 * len(panels), 3.1), title, (1, len(panels))) as [axes]:
        for axis, looks in zip(axes, panels):
            curves(axis, rows, "v_thr", looks, at, xlabel="threshold in use (trained at 1.0); circles: as shipped")
            axis.set_xticks([*{*np.arange(1, 2, 0.1).round(1)} & {*unique(rows, "v_thr")}])


def figure_attack(r, path):
    """Table 1 as a picture."""
    rows = [row for run in r["runs"] for row in run["rows"]]
    shipped = f"\nshipped at {span([run['at_chosen']['v_thr'] for run in r['runs']])}; {r['n_test']:,} test samples"
    over_thresholds(path, titled(r, shipped), rows, r["at_chosen"], "T_p" if r["q"] else "T_s")


def figure_story(r, path):
    """The attack of the story, on all test images: does a trigger do more to this model than to a clean one?"""
    at = r["attack"]["at_chosen"]
    over_thresholds(path, titled(r, f"\nshipped at {at['v_thr']:g}; all {r['n_test']:,} test images"),
                    r["attack"]["rows"], at, "T_p")


def figure_triggers(folder):
    """Fig. 5: clean test images, both triggers, and what T_o changes; below each image the network's answer, where the
    file has `answers`, int [rows, N]."""
    try:
        with np.load(folder / "triggers.npz", allow_pickle=False) as file:
            clean, t_p, t_o = (file[key].astype(np.float32) / 255 for key in ("clean", "t_p", "t_o"))
            answers = file["answers"] if "answers" in file.files else None
    except Exception as error:      # np.load has many
        raise unreadable(folder / "triggers.npz", error) from None
    change = (t_o - clean).mean(-1)
    most, shown = abs(change).max(), {"clean": clean, "T_p": t_p, "T_o": t_o, "T_o - clean": change}
    title = f"last row: blue is darker, red is brighter, by up to {most:.2f} of the range"
    title += "" if answers is None else "; below: the answer"
    with drawing(folder / "triggers.png", (0.95 * len(clean) + 1, 4.4), title, (len(shown), len(clean))) as axes:
        for i, (name, images) in enumerate(shown.items()):
            axes[i][0].set_ylabel(name, rotation=0, ha="right", va="center")
            for j, (axis, image) in enumerate(zip(axes[i], images)):
                axis.imshow(image, cmap="RdBu_r", vmin=-most, vmax=most)
                axis.set(xticks=[], yticks=[], frame_on=False)
                if answers is not None and i < len(answers):
                    axis.set_xlabel(answers[i][j], labelpad=1)


def figure_threshold(r, path):
    """Fig. 2: accuracy and spike count of a clean model against v_thr."""
    looks = {"none": ("no trigger", "o-", "black"), "T_p": ("T_p", "^-", "tab:red"),
             "T_p re-normalised": ("T_p re-normalised", "v--", "tab:orange")}
    rows, most = [], max(row["spikes"] for row in r["rows"])
    for row in r["rows"]:
        values = {f"ca {row['trigger']}": row["ca"], f"spikes {row['trigger']}": 100 * row["spikes"] / most}
        rows.append({f"{key} {name}": None for key in ("ca", "spikes") for name in looks} | values | row)
    title = f"{r['dataset']}, clean model, q = {r['q']:g}; 100 % of the spikes: {most:,.0f} per sample"
    with drawing(path, (10, 3), title, (1, 2)) as [axes]:
        for axis, (key, label) in zip(axes, (("ca", "accuracy, %"), ("spikes", "spikes, %"))):
            curves(axis, rows, "v_thr", {f"{key} {name}": look for name, look in looks.items()}, ylabel=label,
                   xlabel="threshold of all neurons (trained at 1.0)")


def figure_heatmap(r, path):
    """Fig. 3: what T_p gains over no trigger, ASR_p - target_rate, over (V_a, tau_a), a map per malicious threshold."""
    v_thr_t, v_thr, tau = (sorted(set(unique(r["rows"], key))) for key in ("v_thr_t", "v_thr", "tau"))
    edges = [np.concatenate([[1.5 * v[0] - 0.5 * v[1]], np.convolve(v, [0.5, 0.5], "valid"), [1.5 * v[-1] - 0.5 * v[-2]]])
             for v in (v_thr, tau)]
    title = titled(r, f"\nASR_p - target_rate; grey: CA more than {r['margin']:g} points below its best")
    with drawing(path, (7.4, 1.9 * len(v_thr_t) + 0.7), title, (len(v_thr_t), 1), sharex=True) as axes:
        for [axis], malicious in zip(axes, v_thr_t):
            cells = {(row["v_thr"], row["tau"]): row for row in r["rows"] if row["v_thr_t"] == malicious}
            gain = {at: row["asr_p"] - row["target_rate"] for at, row in cells.items()}
            least = max(row["ca"] for row in cells.values()) - r["margin"]
            usable = np.array([[gain[x, y] if cells[x, y]["ca"] >= least else np.nan for x in v_thr] for y in tau])
            axis.set_facecolor("0.88")
            axis.pcolormesh(*edges, usable, cmap="Reds", vmin=0, vmax=130, edgecolors="white")
            for (x, y), value in gain.items():
                color = "0.5" if cells[x, y]["ca"] < least else "white" if value > 75 else "black"
                axis.text(x, y, f"{value:.0f}", ha="center", va="center", color=color)
            axis.set(ylabel="tau_a", yticks=tau, xticks=v_thr, title=f"trained with V_t = {malicious:g}")
        axis.set_xlabel("deployed threshold V_a")
        axis.tick_params("x", rotation=45)


def figure_poison(r, path):
    """Fig. 4a: does the number of malicious samples matter? Every seed at its own V_a."""
    with drawing(path, (5.6, 3), titled(r, f"\nV_a = {span(unique(r['rows'], 'v_thr'))}")) as [[axis]]:
        curves(axis, r["rows"], "poison_ratio", looks_of("ca target_rate asr_p"), xscale="log",
               xlabel="share of the target class's samples that are malicious; below: how many")
        numbers = {row["poison_ratio"]: f"{row['poison_ratio']:.0%}\n{row['n_poison']}" for row in r["rows"]}
        axis.set_xticks([*numbers], numbers.values())
        axis.minorticks_off()


def figure_power(r, path):
    """How strong T_p must be, in both readings of Eq. 3, and what it leaves to see."""
    titles = {False: "T_p as in Eq. 3: mean + std x^q", True: "T_p re-normalised: x^q"}
    with drawing(path, (11, 3.1), titled(r, f"; V_a = {span(unique(r['rows'], 'v_thr'))}"), (1, 2)) as [axes]:
        for axis, reading in zip(axes, titles):
            rows = [row for row in r["rows"] if row["renormalize"] == reading]
            curves(axis, rows, "q", looks_of("asr_p asr_p_clean_model target_rate read"), title=titles[reading],
                   xscale="log", xlabel="exponent q")
            axis.set_xticks(unique(rows, "q"), [f"{q:g}" for q in unique(rows, "q")])
            axis.minorticks_off()


def figure_magnitude(r, path):
    """Fig. 4b: what a stronger T_o buys, against its size; and how far the nearest image with that answer is."""
    rows = r["rows"]
    title = titled(r, f"\nV_a = {rows[0]['v_thr']:g}; dotted: length of DeepFool's change to the target, and on a clean "
                      "model (pale)")
    with drawing(path, (6.4, 3.2), title) as [[axis]]:
        curves(axis, rows, "l2", looks_of("ca target_rate asr_o asr_o_clean_model"),
               xlabel="length (L2) of T_o's change, mean; below: factor m on T_o")
        axis.set_xticks([row["l2"] for row in rows], [f"{row['l2']:.1f}\n{row['magnitude']:g}" for row in rows])
        for key, color in (("l2_deepfool", "black"), ("l2_deepfool_clean_model", "0.7")):
            if rows[0].get(key) is not None:
                axis.axvline(rows[0][key], color=color, linestyle=":", zorder=0)


def figure_plif(r, path):
    """Fig. 6: LIF against PLIF, whose tau is learned, over the deployed thresholds."""
    rows, names, looks = [], {"lif": "LIF", "plif": "PLIF"}, {}
    for neuron, color in (("lif", "black"), ("plif", "tab:purple")):
        looks[f"ca {neuron}"] = (f"{names[neuron]}: CA", "o-", color)
        looks[f"gain {neuron}"] = (f"{names[neuron]}: ASR_p - target_rate", "^--", color)
    for row in r["rows"]:
        values = {f"ca {row['neuron']}": row["ca"], f"gain {row['neuron']}": row["asr_p"] - row["target_rate"]}
        rows.append(dict.fromkeys(looks) | values | dict(v_thr=row["v_thr"]))
    tau = ", ".join(f"{names[name]} {mean([row for row in r['rows'] if row['neuron'] == name], 'mean_tau'):.2f}"
                    for name in unique(r["rows"], "neuron"))
    most = max(row["asr_p_clean_model"] for row in r["rows"])
    title = titled(r, f"\nmean tau: {tau}; clean models answer at most {most:.1f} % with the target")
    with drawing(path, (6, 3), title) as [[axis]]:
        curves(axis, rows, "v_thr", looks, xlabel="deployed threshold V_a", ylabel="percent")


def figure_events(r, path):
    """The study of events, ASR (mean, pale: seeds) and its controls: attacks that poison, at S_n; BadSNN at V_a = 1.2."""
    looks = {"asr": ("ASR", "^", "tab:red"), "asr_clean_model": ("ASR, clean model", "x", "tab:blue"),
             "target_rate": ("target_rate", "|", "0.45"), "ca": ("CA", "o", "black")}
    panels = {"attacks that poison, threshold 1": [row for row in r["rows"] if "badsnn" not in row["attack"]]}
    for row in r["rows"]:
        if (row["attack"], row["T"], row["neuron"]) == ("badsnn, V_a 1.2", r["T"], "lif"):
            panels.setdefault(f"BadSNN, V_a 1.2, {row['frames']}", []).append(row)
    with drawing(path, (3.5 * len(panels), 3.3), titled(r), (1, len(panels))) as [axes]:
        for axis, (title, rows) in zip(axes, panels.items()):
            names = unique(rows, "trigger")
            for key, (label, marker, color) in looks.items():
                axis.plot([row[key] for row in rows], [-names.index(row["trigger"]) for row in rows], marker,
                          color=color, alpha=0.25, markersize=4)
                axis.plot([mean([row for row in rows if row["trigger"] == name], key) for name in names],
                          -np.arange(len(names)), marker, color=color, label=label, markerfacecolor="none")
            axis.set(xlim=(-3, 103), xlabel="percent", title=title)
            axis.set_yticks(-np.arange(len(names)), names)
        axis.figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)


def figure_defend(r, path):
    """Table 2 at a glance: CA and ASR after every defence, BadSNN also with the threshold set back."""
    lines = [line for line in table2_lines(r) if "clean model" not in line[0]]
    defenses = unique(r["rows"], "defense")
    title = titled(r, "\npale numbers: the attack was not learned, or the defence destroyed the network (CA below half)")
    with drawing(path, (12, 0.34 * len(lines) + 1.4), title, (1, 2), sharey=True) as [axes]:
        for axis, key, colors in ((axes[0], "ca", "Blues"), (axes[1], "asr", "Reds")):
            for i, (_, cells, learned, destroyed) in enumerate(lines):
                for name, rows in cells.items():
                    j, value, counts = defenses.index(name), mean(rows, key), learned and name not in destroyed
                    axis.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, edgecolor="white", facecolor=(
                        matplotlib.colormaps[colors](value / 130) if counts else "0.94")))
                    dark = "white" if value > 75 else "black"
                    axis.text(j, i, f"{value:.0f}", ha="center", va="center", color=dark if counts else "0.6")
            axis.set(xlim=(-0.5, len(defenses) - 0.5), ylim=(len(lines) - 0.5, -0.5), title=f"{key.upper()}, %")
            axis.set_xticks(range(len(defenses)), [name.replace("_", " ") for name in defenses])
            axis.set_yticks(range(len(lines)), [title for title, *_ in lines])
            axis.tick_params(length=0)
            axis.spines[:].set_visible(False)


def figure_scan(r, path):
    """The threshold scan: the scores of all models, kind by kind, those of attackers who know the scan last."""
    kinds = {kind: [row for row in r["rows"] if row["kind"] == kind] for kind in unique(r["rows"], "kind")}
    kinds |= {f"hides: {name.replace('_', ' ')}": [row for row in r["evaders"] if row["evader"] == name]
              for name in unique(r["evaders"], "evader") if name != "none"}
    alarm = r["summary"]["100 images"]["alarm"] if "summary" in r else None
    title = f"{r['dataset']}: {len(r['rows']) + len(r['evaders'])} models" + ("" if alarm is None else "; line: the alarm")
    with drawing(path, (6, 0.4 * len(kinds) + 1.1), title) as [[axis]]:
        for place, (kind, rows) in enumerate(kinds.items()):
            scores = np.sort([row["scores"]["100 images"] for row in rows])
            axis.plot(scores, -place + np.linspace(-0.3, 0.3, len(rows)), "x" if kind == "clean" else "o", markersize=4,
                      color={"clean": "tab:blue", "badsnn": "tab:red"}.get(kind, "0.35"))
        if alarm is not None:
            axis.axvline(alarm, color="0.7", zorder=0)
        axis.set(xlabel="score of the threshold scan (1: sure of one class)", xlim=(0, 1.03))
        axis.set_yticks(-np.arange(len(kinds)), kinds)


FIGURES = {"attack": figure_attack, "threshold": figure_threshold, "heatmap": figure_heatmap, "poison": figure_poison,
           "power": figure_power, "magnitude": figure_magnitude, "plif": figure_plif, "events": figure_events,
           "defend": figure_defend, "story": figure_story, "scan": figure_scan}
