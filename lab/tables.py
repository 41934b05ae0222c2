"""Sec. 4's tables, from results alone: ours in Markdown, the paper's numbers (results/paper.json) beside them."""
import itertools
import re
import textwrap

import numpy as np

from kit.files import ROOT
from lab.results import read_json
from settings import PRESETS

PAPER = read_json(ROOT / "results/paper.json")      # its own numbers
LEARNED = 50        # percent: the least ASR, without a defence, that makes a row of Table 2 say something of a defence


def read_result(path):
    """A result, called by its folder's name, as a variant has one: cifar10_w48. Raises ValueError."""
    result = read_json(path)
    if not isinstance(result, dict) or not result.get("rows"):
        raise unreadable(path, "no rows in it")
    return result | {"dataset": path.parent.name}


def unreadable(path, reason):
    return ValueError(f"{path}: not a readable result ({reason}); run its command again")


def data_set_of(name):
    return re.split("[-_]", name)[0]        # a result's folder; of a variant (cifar10_w48, nmnist-binary) the same


def in_order(found):
    place = {name: i for i, name in enumerate(PRESETS)}      # variants behind their data set, unknown ones last
    return dict(sorted(found.items(), key=lambda item: (place.get(data_set_of(item[0]), len(place)), item[0])))


def unique(rows, key):
    return list(dict.fromkeys(row[key] for row in rows))


def mean(rows, key):
    known = [row[key] for row in rows if row.get(key) is not None]
    return np.mean(known) if known else np.nan


def cell(rows, *keys, digits=1):
    """Quantities of a row per seed as "a / b": mean ± deviation, or every seed where that is as large (of more than 5
    median and range); "-": none."""
    texts = []
    for key in keys:
        known = [row[key] for row in rows if row.get(key) is not None]
        text = ", ".join(f"{value:.{digits}f}" for value in known) or "-"
        if len(known) > 5:
            text = "{:.{d}f} ({:.{d}f} to {:.{d}f})".format(np.median(known), min(known), max(known), d=digits)
        if len(known) > 1 and (np.std(known, ddof=1) < np.mean(known) or not any(known)):
            text = f"{np.mean(known):.{digits}f} ± {np.std(known, ddof=1):.{digits}f}"
        if 0 < len(known) < len(rows):
            text += f" ({len(known)} of {len(rows)} seeds)"
        texts.append(text)
    return " / ".join(texts)


def span(rows, key):
    values = [row[key] for row in rows if row[key] is not None]
    return " to ".join(f"{v:g}" for v in sorted({min(values), max(values)}))


def markdown(titles, rows):
    lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join([f"| {titles} |", "|---" * (titles.count("|") + 1) + "|", *lines])


def table1(found, every=False):
    """Every data set at each model's own V_a, then at the paper's (every: at all of the curve), the paper beside."""
    rows, keys = [], ("ca", "target_rate", "asr_p", "asr_o")
    for name, r in in_order(found).items():
        theirs = dict(zip(PAPER["v_a"], PAPER["table1"].get(data_set_of(name), [[]])[-1]))
        control = "asr_p_renormalized" if r["q"] else "asr_clip_only"
        own = [run["at_chosen"] for run in r["runs"]]
        for at in [own, *zip(*(run["rows"] for run in r["runs"]))]:
            v_thr, title, paper = at[0]["v_thr"], ["", f"{at[0]['v_thr']:g}"], ""
            if at is own:
                title = [f"**{name}**", f"**own**, {span(own, 'v_thr')}"]
            elif v_thr in theirs:
                paper = cell([dict(enumerate(theirs[v_thr]))], 0, 1, 2)
            if at is own or every or v_thr in PAPER["v_a"]:
                cells = [cell(at, key) for key in (*keys, *(f"{key}_clean_model" for key in keys))]
                rows.append([*title, *cells, cell(at, control, f"{control}_clean_model"), paper])
    return markdown("data | V_a | CA | target_rate | ASR_p | ASR_o | clean model: CA | its target_rate | its ASR_p | "
                    "its ASR_o | T_p re-normalised, or clip alone / clean model | paper", rows)


def table_runs(found):
    """What each row of Table 1 was made with, and the accuracy at S_n with and without backdoor."""
    rows = []
    for name, r in in_order(found).items():
        paper = cell([dict(enumerate(PAPER["table1"].get(data_set_of(name), [])))], 0, 1)
        v_thr_t = " to ".join(f"{v * r.get('v_thr_n', 1):.3g}" for v in (r["v_thr_t_low"], r["v_thr_t"]) if v)
        strength = f"q {r['q']:g}" if r["q"] else f"beta {r['beta']:g}"
        read = [cell([run["visible"].get(key, {}) for run in r["runs"]], "read") for key in ("asr_p", "asr_o")]
        rows.append([f"**{name}**", cell(r["runs"], "clean_ca"), cell(r["runs"], "base_ca"), paper, " / ".join(read),
                     f"{r['model']}, width {r['width']}, T {r['T']}", f"{r['n_train']:,} + {r['n_test']:,}",
                     f"{r['n_poison']} ({r['poison_ratio']:.1%})", r["epochs"], r["seeds"],
                     f"target {r['target']}, S_t ({v_thr_t}, {r['tau_t'] or 'learned'}), {strength}",
                     f"{r['seconds'] / 60:.0f} min, {r['device']}{', bfloat16' if r['bf16'] else ''}", r["note"]])
    return markdown("data | Clean CA | Base CA | paper: both | clean model reads T_p / T_o | network | training + test "
                    "samples | malicious samples (of the target class) | epochs | seeds | attack | run | note", rows)


def table2_lines(r):
    """Table 2's lines: a title, {defence: its rows, one per seed}, whether the attack was learned, and the defences
    that destroyed the model: its CA fell below half of what it is without a defence."""
    lines = {}
    for row in r["rows"]:
        line = lines.setdefault(tuple(row[key] for key in ("attack", "trigger", "setting", "model")), {})
        line.setdefault(row["defense"], []).append(row)
    for (attack, trigger, setting, model), cells in lines.items():
        title = attack if trigger == attack else f"{attack} ({trigger})"
        title += ", threshold set back" if setting == "nominal" else ""
        title += ", clean model" if model == "clean" else ""
        undefended = mean(lines.get((attack, trigger, "shipped", "attacked"), {}).get("none", []), "asr")
        half = mean(cells.get("none", []), "ca") / 2
        yield title, cells, not undefended < LEARNED, [d for d, rows in cells.items() if mean(rows, "ca") < half]


def table2(found):
    """CA / ASR / target_rate of every attack and defence, the paper's CA / ASR below, what detectors see behind."""
    names, lines = unique([row for r in found.values() for row in r["rows"]], "defense"), []
    for name, r in in_order(found).items():
        about = f"seeds: {len(unique(r['rows'], 'seed'))}, {r['n_defender']} images for the defender, clean model"
        lines.append([f"**{name}**, {about} {r['clean_ca']:.1f}. {r['note']}", *[""] * len(names),
                      f"score of the clean model {r['scan_clean_model']:.2f}"])
        for title, cells, learned, destroyed in table2_lines(r):
            texts = dict.fromkeys(names, "-")
            for defense, rows in cells.items():
                text = cell(rows, "ca", "asr", "target_rate")
                mark = " †" if defense in destroyed else ""
                texts[defense] = f"{text}{mark}" if learned else f"({text}){mark}"
            of = [row for row in r["detectors"] if title in (row["attack"], f"{row['attack']} ({row['trigger']})")]
            seen = cell(of, "strip_auroc", "spikes_auroc", "scan_score", "scan_right", digits=2) if of else ""
            lines.append([f"{title}, at {cell(next(iter(cells.values())), 'v_thr', digits=2)}", *texts.values(), seen])
        for attack, theirs in PAPER["table2"].get(data_set_of(name), {}).items():
            theirs = dict(zip(PAPER["defenses"], theirs.split()))
            which = PAPER["badsnn_in_table2"][data_set_of(name)] if attack == "badsnn" else ""
            if attack in unique(r["rows"], "attack"):
                lines.append([f"*paper: {attack} {which}*", *(f"*{theirs.get(d, '-')}*" for d in names), ""])
    return markdown(" | ".join(["data, attack, threshold", *names, "STRIP / spikes / scan / right"]), lines)


def as_text(table):
    """A Markdown table for the terminal, without empty columns."""
    rows = [[text.strip().replace("*", "") for text in line.split("|")[1:-1]] for line in table.splitlines()]
    columns = [column for column in zip(rows[0], *rows[2:]) if not {*column[1:]} <= {"", "-", "- / -"}]
    titles = itertools.zip_longest(*(textwrap.wrap(title, 12) for title, *_ in columns), fillvalue="")
    lines = [*titles, *zip(*(texts for _, *texts in columns))]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
