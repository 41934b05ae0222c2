"""Sec. 4's tables, from results alone: ours in Markdown, the paper's numbers (results/paper.json) beside them.

    r = read_result(Path("results/digits/attack.json"))         # a dict that names its file where a key is missing
    table1({"digits": r}), table2({"digits": defended})         # Tables 1 and 2; the other tables likewise
    print(as_text(table1({"digits": r})))                       # the same for a terminal

CA: accuracy without trigger. ASR, target_rate: share answered as the target with and without trigger. All in percent.
"""
import itertools
import json
import re
import textwrap
from pathlib import Path

import numpy as np

import runs
from settings import PRESETS

PAPER = json.loads((Path(__file__).parent / "results/paper.json").read_text(encoding="utf-8"))     # its own numbers
PAPER_V_A, PAPER_TABLE1, PAPER_TABLE2 = PAPER["v_a"], PAPER["table1"], PAPER["table2"]


def read_result(path):
    """The one reader of results. A result is called by its folder's name, as a variant has one: cifar10_w48."""
    class Result(dict):         # what it lacks is an error that names the file
        def __missing__(self, key):
            raise unreadable(path, f"no {key!r} in it")
    try:
        result = json.loads(path.read_text(encoding="utf-8"), object_hook=Result)
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from None
    if not isinstance(result, dict) or path.stem != "benchmark" and not result["rows"]:
        raise unreadable(path, "no rows in it")
    return Result(result, dataset=path.parent.name)


def unreadable(path, reason):
    return ValueError(f"{path}: not a readable result ({reason}); run the command again")


def in_order(found):
    """Results by folder's name: in PRESETS' order, variants behind their data set, unknown ones last."""
    place = {name: i for i, name in enumerate(PRESETS)}
    return dict(sorted(found.items(), key=lambda item: (place.get(data_set_of(item[0]), len(place)), item[0])))


def data_set_of(name):
    """A result's data set, by its folder's name: of a variant (cifar10_w48, nmnist-binary) the same."""
    return re.split("[-_]", name)[0]


def unique(rows, key):
    return list(dict.fromkeys(row[key] for row in rows))


def markdown(titles, rows):
    """A table. titles: "data | V_a | ..."."""
    lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join([f"| {titles} |", "|---" * (titles.count("|") + 1) + "|", *lines])


def of_paper(name):
    """The paper's [Clean CA, Base CA] for a data set or its variant, and Table 1's (CA, ASR_p, ASR_o) by V_a."""
    *at_nominal, rows = PAPER_TABLE1.get(data_set_of(name), [()])
    return at_nominal, dict(zip(PAPER_V_A, rows))


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
        paper = of_paper(name)[1]
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
    """Five data sets at the attacker's own V_a: the widest network of each, the trigger that gains more over a clean
    model, and the paper at the nearest V_a."""
    rows = []
    by_width = sorted(reversed(in_order(found)), key=lambda name: found[name]["width"])
    widest = {data_set_of(name): name for name in by_width}         # the last; of equal ones the first in order
    for name in (widest[key] for key in ("gtsrb", "cifar10", "cifar100", "digits", "nmnist") if key in widest):
        at, theirs = found[name]["at_chosen"], of_paper(name)[1]
        triggers = [("asr_p", "T_p" if found[name]["q"] else "T_s", 1), ("asr_o", "T_o", 2)]
        key, trigger, i = max((one for one in triggers if at[one[0]] is not None),
                              key=lambda one: at[one[0]] - (at.get(f"{one[0]}_clean_model") or 0))
        v_thr = min(theirs, key=lambda v: abs(v - at["v_thr"]), default=None)
        rows.append([name, f"{at['v_thr']:.2f}", percent(at["ca"]), percent(at["target_rate"]),
                     f"{percent(at[key])} ({trigger})", percent(at.get(f"{key}_clean_model")),
                     f"{percent(theirs[v_thr][0])}, {percent(theirs[v_thr][i])} (V_a {v_thr:g})" if theirs else ""])
    return markdown("data | V_a | CA | target_rate | ASR | ASR, clean model | paper: CA, ASR", rows)


def table_runs(found):
    """What each row of Table 1 was made with, and the accuracy at S_n with and without backdoor."""
    rows = []
    for name, r in in_order(found).items():
        ours = [percent(r[key], np.std([run[key] for run in r["runs"]], ddof=1) if len(r["runs"]) > 1 else None)
                for key in ("clean_ca", "base_ca")]
        paper = " / ".join(map(percent, of_paper(name)[0]))
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
    cells = PAPER_TABLE2.get(data_set_of(r["dataset"]), {}).get(attack, "").split()
    return {defense: cell.split("/") for defense, cell in zip(PAPERS, cells)}


def table2_lines(r):
    """Table 2's lines: the attack, the trigger's name in brackets (BadSNN has two), which ASR, the cells by defence,
    and whether the attack was learned. BadSNN's last lines: the defender who sets the threshold back as well, and the
    control, a clean model that was shipped at the same setting and repaired in the same way."""
    for attack in unique(r["rows"], "attack"):
        cells = {row["defense"]: row for row in r["rows"] if row["attack"] == attack}
        triggers = [d["trigger"] for d in r["detectors"] if d["attack"] == attack]
        whole = cells.get("none", {})
        inside = {title: {name: dict(row[key], destroyed=row[key]["ca"] < whole.get(key, row[key])["ca"] / 2)
                          for name, row in cells.items() if row.get(key)} for title, key in
                  (("threshold set back", "restored"), ("clean model repaired alike", "clean_model"))}
        for title, key, of in [*zip(triggers, ("asr", "asr_p"), (cells, cells)),
                               *((f"{triggers[0]}, {title}", "asr", of) for title, of in inside.items() if of)]:
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
              "fine_tune": f"fine-tuned on {r['n_defender']} clean images",
              "clean": f"clean model, threshold {at['v_thr']:g}"}
    return markdown("network | right class (CA) | target class, no trigger | target class, T_p | target class, T_o",
                    [[titles[row["answer"]], *(percent(row.get(key)) for key in keys)] for row in r["rows"]])
