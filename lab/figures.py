"""Sec. 4's figures, from results alone. FIGURES has each by the name of its JSON file.

    FIGURES["attack"](r, path)                      draws read_result("DATASET/attack.json") into an image file
    figure_triggers(folder)                         Fig. 5, from the folder's triggers.npz
    with drawing(path, (7, 3), title) as [[axis]]: ...      a new figure, saved at the end of the block

CA: accuracy without trigger. ASR, target_rate: share answered as the target with and without trigger. All in percent.
Lines and markers differ as well as colours, so that a figure can be read in grey.
"""
import contextlib
from functools import partial

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from kit.machine import say
from kit.files import replace_file
from tables import paper_cells, seeds_of, span, table2_lines, unique, unreadable

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
    """Fig. 4b: what a stronger T_o buys, against its size; and how far the nearest image with that answer is."""
    rows = r["rows"]
    with drawing(path, (7, 3.3), titled(r, v_thr=True)) as [[axis]]:
        curves(axis, rows, "l2", "ca asr_o asr_o_clean_model", xlabel="mean L2 norm of T_o's change; m: factor on T_o")
        axis.set_xticks([row["l2"] for row in rows], [f"{row['l2']:.1f}\nm {row['magnitude']:g}" for row in rows])
        for key, model, color in (("l2_deepfool", "", "darkgreen"), ("l2_deepfool_clean_model", ", clean", "0.5")):
            if rows[0].get(key) is not None:
                axis.axvline(rows[0][key], color=color, linestyle=":", label=f"DeepFool's distance{model}")


def figure_trigger(r, path):
    """ASR_o against the size of T_o, on held-out training images, one line per lambda_adv and budget; dotted: a clean
    model. Circled: of those no larger than T_p the smallest with an ASR_o of at least 95 %, else the highest."""
    m, small = unique(r["rows"], "magnitude"), [row for row in r["rows"] if row["l2"] <= row["l2_p"]]
    best = min(small or r["rows"], key=lambda row: (-min(row["asr_o"], 95), row["l2"]))
    with drawing(path, (6.6, 3), titled(r, v_thr=True)) as [[axis]]:
        names = {"lambda_adv": "lambda_adv", "budget": "budget", "nominal_weight": "nominal weight"}
        kinds = {}
        for row in r["rows"]:
            kind = ", ".join(f"{name} {row[key]:g}" for key, name in names.items() if row.get(key))
            kinds.setdefault(kind, []).append(row)
        for (kind, rows), mark, color in zip(kinds.items(), "osD^", ("0.6", "black", "tab:blue", "tab:green")):
            curve(axis, rows, "l2", "asr_o", (kind, f"{mark}-", color))
            curve(axis, rows, "l2", "asr_o_clean_model", (None, f"{mark}:", color))
        axis.plot(best["l2"], best["asr_o"], "o", markersize=13, markerfacecolor="none", color="tab:red",
                  label=f"best, m = {best['magnitude']:g}")
        axis.axvline(best["l2_p"], color="0.8", zorder=0, label="L2 of T_p")
        axis.set(ylabel="ASR_o, %, held-out images\n(dotted: clean model)", ylim=(-3, 103),
                 xlabel=f"mean L2 norm, pixels; m = {min(m):g} to {max(m):g} from left to right")


def figure_defend(r, path):
    """Table 2 at a glance: CA and ASR after every defence as heat maps, what the paper has as a ring in its colour; and
    what the detectors see. Grey: an attack that was not learned. Hatched: CA fell below half of the undefended."""
    lines, defenses = [*table2_lines(r)], unique(r["rows"], "defense")
    detectors = dict(strip_auroc="STRIP: AUROC", spikes_auroc="spikes: AUROC", scan_score="scan: score")
    ca, asr, auroc = {}, {}, {}         # (line, column): value, spread, learned, destroyed, the paper's value
    for i, (attack, title, key, of, learned) in enumerate(lines):
        measured = "," not in title     # not one of BadSNN's further lines
        theirs = paper_cells(r, attack) if key == "asr" and measured else {}
        for name, row in of.items():
            for place, (panel, of_panel) in enumerate(((ca, "ca"), (asr, key))):
                panel[i, defenses.index(name)] = (row[of_panel], row.get("spread", {}).get(of_panel), learned,
                                                  row.get("destroyed", False),
                                                  float(theirs[name][place]) if name in theirs else None)
        for d in r["detectors"]:
            if d["attack"] == attack and measured and title in ("", f" ({d['trigger']})"):
                auroc.update({(i, j): (100 * d[name], None, learned, False, None) for j, name in enumerate(detectors)
                              if name in d})
    title = (f"{r['dataset']}: {r['model']}, width {r['width']}, {r['n_train']:,} training samples, {seeds_of(r)}. "
             + "Ring: the paper's value. " * any(cell[4] is not None for cell in ca.values())
             + "Hatched: destroyed. Grey: not learned.")
    with drawing(path, (11.5, 0.4 * len(lines) + 1.3), title, (1, 3), ratios=[len(defenses)] * 2 + [3.5]) as [axes]:
        names = [attack + title for attack, title, *_ in lines], [""] * len(lines), [""] * len(lines)
        heat_map(axes[0], ca, "Blues", "CA, %", names[0], defenses)
        heat_map(axes[1], asr, "Reds", "ASR, %", names[1], defenses)
        heat_map(axes[2], auroc, "Greys", "detectors (x 100)", names[2], [*detectors.values()])


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
    n = len(r["rows"]) + len(r["evaders"])
    with drawing(path, (9.5, 3.6), f"{r['dataset']}: {n} models", (1, 2)) as [[left, right]]:
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
