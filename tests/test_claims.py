"""Numbers in prose are those of results/: a piece of a page's text with {} for every number, and their values."""
import re

from common import ROOT
from numpy import mean, quantile

from lab import scan, tables

README, RESULTS, TABLE1 = (re.sub(r" *\| *", "|", (ROOT / name).read_text())
                           for name in ("README.md", "results/README.md", "results/table1.md"))
SHOWN = "digits, T_o", "digits, T_p", "gtsrb, T_o", "cifar10_w48, T_p", "cifar10, T_o", "cifar10, T_p", "cifar100, T_o"
SCANS = "margin scan", "threshold scan", "MM-BD"
CELLS = "none shipped, none nominal, fine_tune shipped, anp shipped, anp nominal, none shipped clean".split(", ")


def of(name, *keys, **wanted):
    """Quantities of all rows of results/NAME.json with these values; of an attack, v_thr="own" is the seed's V_a."""
    r = tables.read_result(ROOT / f"results/{name}.json")
    rows = r["rows"] if "attack" not in name else [
        row for run in r["runs"] for row in (*run["rows"], run["at_chosen"] | {"v_thr": "own"})]
    return [row[key] for key in keys for row in rows if all(row[k] == value for k, value in wanted.items())]


def left(shown, cell, *keys):
    """Of BadSNN's network and trigger what Table 2 has in a cell, one number per seed."""
    (name, trigger), (defense, setting, *clean) = shown.split(", "), cell.split()
    return of(f"{name}/defend", *keys or ["asr"], attack="badsnn", trigger=trigger, defense=defense, setting=setting,
              model="clean" if clean else "attacked")


def claims():
    found, asr_p, asr_o, control = tables.read_result(ROOT / "results/digits/scan.json"), *(
        of("digits/attack", key, v_thr="own") for key in ("asr_p", "asr_o", "asr_p_clean_model"))
    seen, leak = scan.summary(found["rows"]), of("digits/attack", "asr_p", v_thr=1.0)
    prices = [a - b for s in SHOWN for a, b in zip(left(s, CELLS[0], "ca"), left(s, CELLS[4], "ca"))]
    yield "have at most {:.1f}, three have {:.1f}, {:.1f} and {:.1f}", sorted(control)[-4:]
    yield "leaves T_o {:.1f} to {:.1f} %, and T_p", quantile(sum((left(s, CELLS[4]) for s in SHOWN[::2]), []), [0, 1])
    yield "costs up to {:.1f} points of CA", [max(prices)]
    yield "T_p still has {:.1f} on digits ({:.1f} to {:.1f} by seed)", [mean(leak), *quantile(leak, [0, 1])]
    for answer, text in (("fine_tune", "it leaves T_p {:.1f} to {:.1f} % and T_o {:.1f} to {:.1f} %"),
                         ("anp_recentre", "leaves T_p {:.1f} to {:.1f} % and T_o {:.1f} to {:.1f} %, at a CA of")):
        yield text, [v for key in ("asr_p", "asr_o") for v in quantile(of("digits/story", key, answer=answer), [0, 1])]
    tuned = left("digits_nominal_defender, T_o", CELLS[2], "ca")
    yield "T_o 100.0 on every seed and a CA of {:.1f}, {:.1f} and {:.1f}", tuned
    naive, hid = (seen[f"margin scan, {which}"] for which in ("working", "low_margins"))
    yield "of {} (95 % interval {:.0f} to {:.0f} %)", [naive["n"][0], *naive["caught_interval"]]
    yield "it caught {} of {} networks whose attack survives", [round(hid["caught"] * hid["n"][0] / 100), hid["n"][0]]
    yield "(worst seed {:.1f}), T_o {:.1f} (worst {:.1f})", [min(asr_p), mean(asr_o), min(asr_o)]
    yield "T_p {:.1f}, {:.1f} and {:.1f} by seed, on GTSRB T_o {:.1f}", sum((left(s, CELLS[3]) for s in SHOWN[1:3]), [])
    for kind in ("badsnn", *scan.EVADERS):
        rows = [row for row in found["rows"] if row["kind"] == kind]
        works, which = [row for row in rows if row["working"]], "working" if kind == "badsnn" else kind
        cells = [f"{seen[f'{name}, {which}']['caught']:g} ({seen[f'{name}, {which}']['auroc']:.2f})" for name in SCANS]
        yield "|".join([f"{len(works)} of {len(rows)}", tables.cell(works, "ca", "target_rate", "asr_p"), *cells]), []
    yield "T_s reaches {:.1f}, {:.1f}, {:.1f}, {:.1f} and {:.1f} by seed", of("nmnist/attack", "asr_p", v_thr="own")
    yield "at a V_a of 1.15 T_s has {:.1f} to {:.1f}", quantile(of("nmnist/attack", "asr_p", v_thr=1.15), [0, 1])


def test_prose_and_tables():
    wanted = [text.format(*numbers) for text, numbers in claims()]
    for s in SHOWN:
        cells = [[dict(ca=ca, asr=asr) for ca, asr in zip(left(s, c, "ca"), left(s, c))] for c in CELLS]
        wanted += ["|".join([s, *(tables.cell(rows, "ca", "asr") if rows else "-" for rows in cells)])]
    for answer in dict.fromkeys(of("digits/story", "answer")):
        wanted += ["|".join(tables.cell([{key: value} for value in of("digits/story", key, answer=answer)], key)
                            for key in ("ca", "target_rate", "asr_p", "asr_o"))]
    assert [line for line in wanted if line not in README + RESULTS] == []
    assert [line for line in RESULTS.splitlines() if line.startswith("|**") and line[:-1] not in TABLE1] == []
