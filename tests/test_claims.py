"""Numbers in prose that come from results are the results' numbers.

Each claim is a page, a piece of its text with {} in the place of every number, and these numbers, computed from
results/. If a result changes, the test says how the sentence must read now. A sentence that is rewritten takes its
claim along.
"""
import re

import pytest
from common import ROOT

from kit.files import read_json

README, RESULTS = "README.md", "results/README.md"


def result(name):
    """results/NAME.json, such as digits/attack."""
    return read_json(ROOT / f"results/{name}.json")


def rows(name, **wanted):
    """The rows of a result that have these values."""
    return [row for row in result(name)["rows"] if all(row[key] == value for key, value in wanted.items())]


def mean(found, key):
    return sum(row[key] for row in found) / len(found)


def each(name, key, **wanted):
    """A value of every seed, from its curve over V_a."""
    return [row[key] for run in result(f"{name}/attack")["runs"] for row in run["rows"]
            if all(row[name] == value for name, value in wanted.items())]


def restored(name, trigger):
    """A trigger's ASR as shipped and with the threshold set back, mean over seeds."""
    of = dict(attack="badsnn", defense="none", trigger=trigger, model="attacked")
    return [mean(rows(f"{name}/defend", setting=setting, **of), "asr") for setting in ("shipped", "nominal")]


CLAIMS = [
    (README, "T_p still reaches {:.0f} % on average ({:.0f} to {:.0f} %) and T_o {:.0f} %", lambda: [
        mean(rows("digits/attack", v_thr=1.0), "asr_p"), min(each("digits", "asr_p", v_thr=1.0)),
        max(each("digits", "asr_p", v_thr=1.0)), mean(rows("digits/attack", v_thr=1.0), "asr_o")]),
    (README, "on CIFAR-10 T_p falls from {:.0f} to {:.0f} %, on GTSRB T_o from {:.0f} to {:.0f} %", lambda: [
        *restored("cifar10_w48", "T_p"), *restored("gtsrb", "T_o")]),
    (README, "it caught {:.1f} % and named the right class", lambda: [
        result("digits/scan")["summary"]["100 images"]["caught"]]),
]


@pytest.mark.parametrize("page, text, numbers", CLAIMS, ids=[re.sub(r"\W+", "_", text[:40]) for _, text, _ in CLAIMS])
def test_numbers_in_prose_are_those_of_the_results(page, text, numbers):
    wanted = text.format(*numbers())
    assert wanted in (ROOT / page).read_text(encoding="utf-8"), f"{page} must now say: {wanted}"
