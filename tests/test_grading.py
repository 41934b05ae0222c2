"""The grading, graded: right answers keep their points, mistakes and cheats cost their author's, and only those."""
import csv
import json
import re
import signal
import subprocess
import sys
import time

import grading
import pytest
import torch
import torch.nn.functional as F
from common import ROOT
from test_exercises import EXERCISES, blend, eq2, front, known_interval, pruned, renormed, slope, step, tet

import badsnn
import lif
import trigger
from lab.detectors import scan_score


def leaves_a_hook(model, images):
    model.first.register_forward_hook(lambda *arguments: None)
    return lif.count_spikes(model, images)


MISTAKES = [        # exercise, what is wrong, the answer
    ("lif_step", "no decay", lambda v, x, v_thr, tau: step(v, x, v_thr, 1.0)),
    ("lif_step", "no reset", lambda v, x, v_thr, tau: (step(v, x, v_thr, tau)[0], tau * v + x)),
    ("lif_step", "> for >=", lambda v, x, v_thr, tau: step(v, x, v_thr + 1e-6, tau)),
    ("sigmoid_surrogate", "no inner derivative", lambda d: slope(d) / 4),
    ("sigmoid_surrogate", "wrong sign", lambda d: -slope(d)),
    ("sigmoid_surrogate", "the sigmoid itself", lambda d: torch.sigmoid(4 * d)),
    ("spikes_per_sample", "sum over the batch", lambda model, x: lif.count_spikes(model, x).sum()),
    ("spikes_per_sample", "mean over T", lambda model, x: lif.count_spikes(model, x) / model.T),
    ("spikes_per_sample", "leaves a hook", leaves_a_hook),
    ("every_step_loss", "of the mean", lambda outputs, y: F.cross_entropy(outputs.mean(0), y)),
    ("every_step_loss", "sum over T", lambda outputs, y: len(outputs) * tet(outputs, y)),
    ("every_step_loss", "no gradient", lambda outputs, y: tet(outputs, y).detach()),
    ("dual_spike_loss", "two passes", lambda model, *a: eq2(model, *a) + 0 * model(a[0]).sum()),
    ("dual_spike_loss", "the others are malicious", lambda *a: eq2(*a[:3], ~a[3], *a[4:])),
    ("dual_spike_loss", "tau 1", lambda *a: eq2(*a, tau=1.0)),
    ("dual_spike_loss", "threshold 1", lambda *a: eq2(*a[:4], 1.0, a[5])),
    ("adaptive_blend", "as printed", lambda *a: blend(*a, literal=True)),
    ("adaptive_blend", "smallest a", lambda model, x, x_adv, x_p, *a: blend(model, x, x_p, x_adv, *a)),
    ("adaptive_blend", "one candidate too few", lambda *a: blend(*a[:5], a[5] - 1)),
    ("adaptive_blend", "says that all were found", lambda *a: (blend(*a)[0], torch.ones(len(a[1])))),
    ("trigger_losses", "true answer as target", lambda *a: trigger.trigger_losses(*a[:3], (a[3] + 1) % 6, a[4])),
    ("trigger_losses", "no division by std", lambda *a: trigger.trigger_losses(*a[:4], (1.0, 1.0, 1.0))),
    ("trigger_losses", "another order", lambda *a: trigger.trigger_losses(*a)[::-1]),
    ("spike_trigger", "no clamp", lambda x, beta, rng: x + beta * (2 * torch.rand(x.shape, generator=rng) - 1)),
    ("spike_trigger", "no noise", lambda frames, beta, generator: trigger.spike_trigger(frames, 0, generator)),
    ("spike_trigger", "another generator", lambda frames, beta, generator: trigger.spike_trigger(frames, beta)),
    ("answers", "silence is class 0", lambda rates: rates.argmax(1)),
    ("answers", "class 0 is silence", lambda rates: rates.argmax(1).where(rates.argmax(1) > 0, -1)),
    ("answers", "only zeros are silence", lambda rates: rates.argmax(1).where(rates.amax(1) > 0, -1)),
    ("choose_v_a", "forgets base_ca", lambda rows, base_ca, margin: badsnn.choose(rows, -1e9, margin)),
    ("choose_v_a", "forgets target_rate", lambda rows, base_ca, margin: badsnn.choose(
        [dict(row, target_rate=-20) for row in rows], base_ca, margin)),
    ("choose_v_a", "goes on behind a dip", lambda rows, base_ca, margin: badsnn.choose(
        [row for row in rows if row["ca"] >= max(base_ca, *(r["ca"] for r in rows)) - margin], base_ca, margin)),
    ("wilson", "90 %", lambda hits, n: known_interval(hits, n, 0.90)),
    ("wilson", "shares", lambda hits, n: tuple(v / 100 for v in known_interval(hits, n))),
    ("wilson", "the normal interval", lambda hits, n: tuple(
        100 * (hits / n + side * 1.96 * (hits / n * (1 - hits / n) / n) ** 0.5) for side in (-1, 1))),
    ("clp_channels", "no BatchNorm", lambda weight, *a: pruned(weight, *torch.ones(2, len(weight)), *a[2:])),
    ("clp_channels", "sign of gamma", lambda weight, gamma, *a: pruned(weight, gamma.clamp(min=0), *a)),
    ("clp_channels", "u is 3", lambda *a: pruned(*a[:4], 3.0)),
    ("scan_score", "across the shipped threshold", lambda b, a, w: scan_score(b[:0], torch.cat([b, a]), w)),
    ("scan_score", "one side only", lambda b, a, w: scan_score(a[:0], a if len(a) else b, w)),
    ("scan_score", "the last window is missing", lambda b, a, w: scan_score(b[:-1], a[:-1], w)),
    ("fade", "scales the short ones up", lambda x, x_trig, l2: x + l2 * F.normalize(
        (x_trig - x).flatten(1), dim=1).view_as(x)),
    ("fade", "one factor for all", lambda x, x_trig, l2: x + (x_trig - x) * min(
        1, l2 / (x_trig - x).flatten(1).norm(dim=1).max().item())),
    ("fade", "returns the change", lambda x, x_trig, l2: renormed(x, x_trig, l2) - x),
    ("pareto", "ASR_p for the gain", lambda rows: front(rows, "")),
    ("pareto", "the best gain only", lambda rows: front([dict(row, ca=0) for row in rows])),
    ("pareto", "another order", lambda rows: front(rows)[::-1]),
]


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda exercise: exercise.draw.__name__)
def test_right_answers_lose_nothing_and_every_mistake_does(exercise):
    def cases(answer, seed):        # what they show, one after the other, asked for in this process
        return (exercise.lost(lambda: answer, lambda work: work(), seed, [number])
                for number in grading.CASES)
    mistakes = {text: answer for name, text, answer in MISTAKES if name == exercise.draw.__name__}
    assert len(mistakes) >= 3
    for seed in ("0", "some words", *map(str, range(1, 50))):     # texts, as the command line gives them
        assert not any(cases(exercise.right, seed)), seed
        assert not [text for text, answer in mistakes.items() if not any(cases(answer, seed))], seed


SOLVED = """
def lif_step(v, x, v_thr, tau):
    v = tau * v + x
    s = (v >= v_thr).float()
    return s, v * (1 - s)
"""
HANDED_IN = dict(       # the points, a word of the reason, the file
    a_right=("2", "", SOLVED),
    cheats_by_import=("0", "line 1 imports test_grading", "from test_grading import *"),
    cheats_by_pasting=("0", "line 1 imports badsnn.choose", "from badsnn import choose as choose_v_a"),
    cheats_by_a_door=("0", "uses sys", "import torch\nchoose_v_a = torch.sys.modules['badsnn'].choose"),
    cheats_by_patch=("0", "fade: case", "import torch.testing as t\nt.assert_close = print\ndef fade(x, *_): return x"),
    cheats_by_editing=("0", "as they are", "def fade(x, t, l2):\n    return t.sub_(x).renorm_(2, 0, l2).add_(x)"),
    cheats_by_writing=("0", "uses open", "open('grades.csv', 'w').write('me,40')"),
    cheats_by_exit=("0", "SystemExit", "raise SystemExit(0)"),
    empty=("0", "no attribute", ""),
    floods=("0", "in time", "def lif_step(*a):\n    while True:\n        print('x' * 10**6)"),
    grows=("0", "Memory|in time", "rows = []\nwhile True:\n    rows.append(bytearray(10**8))"),
    hangs=("0", "in time", "while True:\n    pass"),
    sends=("0", "", "import torch\ndef lif_step(*a):\n    return torch.zeros(10**7), torch.zeros(1)"),
    syntax=("0", "SyntaxError", "def lif_step(:"),
    z_half=("1", "case 1, potentials: .* index .*See notebook 1, From Eq. 1", SOLVED.replace("v * (1 - s)", "v")))


def test_a_folder_is_graded_to_its_end(tmp_path):
    """Everybody is a row, also who hands in nothing; who is right keeps the points, whoever comes before and after."""
    (tmp_path / "in/nothing").mkdir(parents=True)
    for name, (_, _, source) in HANDED_IN.items():
        (tmp_path / f"in/{name}.py").write_text(source)
    command = [sys.executable, ROOT / "tests/grading.py", tmp_path / "in", "--seed", "some words", "--out", tmp_path]
    subprocess.run([*command, "--limit", "15"], check=True)
    rows = {row["name"]: row for row in csv.DictReader((tmp_path / "grades.csv").open())}
    for name, (points, word, _) in (HANDED_IN | dict(nothing=("0", "nothing readable", ""))).items():
        assert rows[name]["points"] == points and re.search(word, rows[name]["why"]), rows[name]
    assert len({row["task"] for row in rows.values()}) > 10
    half = json.loads((tmp_path / "z_half.json").read_text())       # Gradescope's and GitHub Classroom's keys
    assert (half["score"], half["max_score"], half["tests"][0]["max_score"], len(half["tests"])) == (1, 40, 2, 15)


def test_what_ignores_signals_is_ended():
    def ignores():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(99)
    with pytest.raises(grading.Wrong, match="not finished in time"):
        grading.apart(ignores, 1)


def test_the_stubs_are_those_that_are_graded():
    assert re.findall(r"(?m)^def (\w+)", grading.MINE.read_text()) == [e.draw.__name__ for e in EXERCISES]
