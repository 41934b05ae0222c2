"""The grading of the exercises, graded: nothing is worth nothing, right answers are worth everything, and every mistake
in MISTAKES costs points. Right answers are made here from the product's own functions, so none is written out."""
import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import test_exercises
import torch
import torch.nn.functional as F
from common import ROOT
from scipy.stats import binomtest
from torch import nn

import badsnn
import lif
import trigger
from kit.training import generator
from lab import defenses, detectors

CHECKS = {name: check for name, check in vars(test_exercises).items() if name.startswith("test_")}


def lif_step(v, x, v_thr, tau):
    charged = tau * v + x
    s = lif.lif_reference(charged[None], v_thr, tau)[0]
    return s, torch.where(s == 1, 0.0, charged)


def sigmoid_surrogate(d):
    return torch.autograd.functional.jvp(torch.sigmoid, 4 * d, 4 * torch.ones_like(d))[1]


def every_step_loss(outputs, y):
    return badsnn.criterion(outputs, y, SimpleNamespace(model="resnet19"))


def dual_spike_loss(model, x, y, poisoned, v_thr_t, weight, tau=0.5):
    n, v_thr = len(x), torch.cat([torch.ones(len(x)), torch.full((int(poisoned.sum()),), v_thr_t)])
    with lif.neurons(model, v_thr, tau):
        outputs = model(torch.cat([x, x[poisoned]]))[None]
    loss = every_step_loss(outputs[:, :n], y)
    return loss + weight * every_step_loss(outputs[:, n:], y[poisoned]) if poisoned.any() else loss


def adaptive_blend(*arguments, **changes):
    return trigger.adaptive_blend(*arguments, **changes)[::2]


def wilson(hits, n, level=0.95):
    known = binomtest(hits, n).proportion_ci(level, method="wilson")
    return 100 * known.low, 100 * known.high


def clp_channels(weight, gamma, running_var, eps, u):
    conv, bn = nn.Conv2d(*weight.shape[1::-1], weight.shape[2]), nn.BatchNorm2d(len(weight), eps=eps)
    with torch.no_grad():
        conv.weight.copy_(weight)
        bn.weight.copy_(gamma)
        bn.running_var.copy_(running_var)
    return defenses.clp(nn.Sequential(conv, bn), u)[1].weight == 0


def scan_score(below, above, window):
    return detectors.scan_score(below, above, window)


def fade(x, x_trig, l2):
    return x + torch.renorm(x_trig - x, 2, 0, l2)


def choose_v_a(rows, base_ca, margin):
    least, passed = max([base_ca] + [row["ca"] for row in rows]) - margin, []
    for row in sorted(rows, key=lambda row: row["v_thr"]):
        if row["ca"] < least:
            break
        passed.append((row["v_thr"], row["asr_p"] - row["target_rate"]))
    best = max([gain for _, gain in passed], default=None)
    return max([v for v, gain in passed if gain >= best - 5], default=None)


def pareto(rows, gain=lambda row: row["asr_p"] - row["target_rate"]):
    order = sorted(rows, key=lambda row: (-row["ca"], -gain(row)))
    best = [max((gain(row) for row in order[:i]), default=-1e9) for i in range(len(order))]
    return [row for row in rows if gain(row) > best[next(i for i, other in enumerate(order) if other is row)]]


ANSWERS = dict(
    lif_step=lif_step, sigmoid_surrogate=sigmoid_surrogate, spikes_per_sample=lif.count_spikes,
    every_step_loss=every_step_loss, dual_spike_loss=dual_spike_loss,
    adaptive_blend=adaptive_blend, trigger_losses=trigger.trigger_losses, spike_trigger=trigger.spike_trigger,
    answers=badsnn.answers, choose_v_a=choose_v_a, wilson=wilson, clp_channels=clp_channels, scan_score=scan_score,
    fade=fade, pareto=pareto)


def leaves_a_hook(model, images):
    model.lif.register_forward_hook(lambda *arguments: None)
    return lif.count_spikes(model, images)


def two_passes(model, x, y, poisoned, v_thr_t, weight):
    with lif.neurons(model, v_thr_t):
        malicious = F.cross_entropy(model(x[poisoned]), y[poisoned])
    return F.cross_entropy(model(x), y) + weight * malicious


def smallest_a(model, x, x_adv, x_p, target, k):
    return adaptive_blend(model, x, x_p, x_adv, target, k)


def blends_everything(model, x, x_adv, x_p, target, k):
    return adaptive_blend(model, x, x_adv, x_p, target, k)[0], torch.ones(len(x), dtype=torch.bool)


def no_way_back(model, x, x_adv, x_p, target, k):
    x_blend, found = adaptive_blend(model, x, x_adv, x_p, target, k)
    return x_blend.where(found.view(-1, 1, 1, 1), x_p), found


def no_clamp(frames, beta, generator):
    return frames + beta * (2 * torch.rand(frames.shape, generator=generator) - 1)


def losses_with(i, change):
    """Eq. 6 with the i-th of its three losses changed."""
    return lambda *a: [change(loss, *a) if j == i else loss for j, loss in enumerate(trigger.trigger_losses(*a))]


MISTAKES = [        # exercise, what is wrong, the answer
    ("lif_step", "no decay", lambda v, x, v_thr, tau: lif_step(v, x, v_thr, 1.0)),
    ("lif_step", "no memory", lambda v, x, v_thr, tau: lif_step(0 * v, x, v_thr, tau)),
    ("lif_step", "no reset", lambda v, x, v_thr, tau: (lif_step(v, x, v_thr, tau)[0], tau * v + x)),
    ("lif_step", "soft reset", lambda v, x, v_thr, tau: (lif_step(v, x, v_thr, tau)[0],
                                                         tau * v + x - v_thr * lif_step(v, x, v_thr, tau)[0])),
    ("lif_step", "> for >=", lambda v, x, v_thr, tau: lif_step(v, x, v_thr + 1e-6, tau)),
    ("lif_step", "decays the input, too", lambda v, x, v_thr, tau: lif_step(v, (1 - tau) * x, v_thr, tau)),
    ("lif_step", "returns v first", lambda *a: lif_step(*a)[::-1]),
    ("sigmoid_surrogate", "no inner derivative", lambda d: sigmoid_surrogate(d) / 4),
    ("sigmoid_surrogate", "slope 1", lambda d: sigmoid_surrogate(d / 4)),
    ("sigmoid_surrogate", "wrong sign", lambda d: -sigmoid_surrogate(d)),
    ("sigmoid_surrogate", "the sigmoid itself", lambda d: torch.sigmoid(4 * d)),
    ("spikes_per_sample", "mean over T", lambda model, x: lif.count_spikes(model, x) / model.T),
    ("spikes_per_sample", "sum over the batch", lambda model, x: lif.count_spikes(model, x).sum()),
    ("spikes_per_sample", "first layer only", lambda model, x: lif.count_spikes(model.lif, model.conv(x)[None])),
    ("spikes_per_sample", "leaves a hook", leaves_a_hook),
    ("every_step_loss", "of the mean", lambda outputs, y: F.cross_entropy(outputs.mean(0), y)),
    ("every_step_loss", "sum over T", lambda outputs, y: len(outputs) * every_step_loss(outputs, y)),
    ("every_step_loss", "last step only", lambda outputs, y: every_step_loss(outputs[-1:], y)),
    ("every_step_loss", "labels repeated in the wrong order", lambda outputs, y: F.cross_entropy(
        outputs.flatten(0, 1), y.repeat_interleave(len(outputs)))),
    ("every_step_loss", "no gradient", lambda outputs, y: every_step_loss(outputs, y).detach()),
    ("dual_spike_loss", "two passes", two_passes),
    ("dual_spike_loss", "wrong sign", lambda *a: dual_spike_loss(*a[:5], -a[5])),
    ("dual_spike_loss", "no weight", lambda *a: dual_spike_loss(*a[:5], 1.0)),
    ("dual_spike_loss", "nominal loss only", lambda *a: dual_spike_loss(*a[:3], a[3] & False, *a[4:])),
    ("dual_spike_loss", "every image is malicious", lambda *a: dual_spike_loss(*a[:3], a[3] | True, *a[4:])),
    ("dual_spike_loss", "the others are malicious", lambda *a: dual_spike_loss(*a[:3], ~a[3], *a[4:])),
    ("dual_spike_loss", "tau 1", lambda *a: dual_spike_loss(*a, tau=1.0)),
    ("dual_spike_loss", "threshold 1", lambda *a: dual_spike_loss(*a[:4], 1.0, a[5])),
    ("adaptive_blend", "as printed", lambda *a: adaptive_blend(*a, literal=True)),
    ("adaptive_blend", "smallest a", smallest_a),
    ("adaptive_blend", "one candidate too few", lambda *a: adaptive_blend(*a[:5], a[5] - 1)),
    ("adaptive_blend", "one candidate too many", lambda *a: adaptive_blend(*a[:5], a[5] + 1)),
    ("adaptive_blend", "another class", lambda *a: adaptive_blend(*a[:4], (a[4] + 1) % 4, a[5])),
    ("adaptive_blend", "says that all were found", blends_everything),
    ("adaptive_blend", "only the two ends", lambda *a: adaptive_blend(*a[:5], 2)),
    ("adaptive_blend", "T_p where nothing works", no_way_back),
    ("trigger_losses", "similarity, not distance", losses_with(0, lambda loss, *a: 1 - loss)),
    ("trigger_losses", "away from the target", losses_with(1, lambda loss, *a: -loss)),
    ("trigger_losses", "true answer as target", lambda *a: trigger.trigger_losses(*a[:3], (a[3] + 1) % 6, a[4])),
    ("trigger_losses", "no weights", losses_with(2, lambda loss, made, wanted, logits, target, std: (
        ((made - wanted) / torch.tensor(std).view(-1, 1, 1)) ** 2).mean())),
    ("trigger_losses", "no division by std", lambda *a: trigger.trigger_losses(*a[:4], (1.0, 1.0, 1.0))),
    ("trigger_losses", "sum over pixels", losses_with(2, lambda loss, made, *a: loss * made[0].numel())),
    ("trigger_losses", "another order", lambda *a: trigger.trigger_losses(*a)[::-1]),
    ("spike_trigger", "no clamp", no_clamp),
    ("spike_trigger", "no noise", lambda frames, beta, generator: trigger.spike_trigger(frames, 0, generator)),
    ("spike_trigger", "noise of half the width", lambda frames, beta, generator: trigger.spike_trigger(
        frames, beta / 2, generator)),
    ("spike_trigger", "noise from 0 to beta", lambda frames, beta, generator: (
        frames + beta * torch.rand(frames.shape, generator=generator)).clamp(0, 1)),
    ("spike_trigger", "another generator", lambda frames, beta, generator: trigger.spike_trigger(frames, beta)),
    ("answers", "silence is class 0", lambda rates: rates.argmax(1)),
    ("answers", "class 0 is silence", lambda rates: rates.argmax(1).where(rates.argmax(1) > 0, -1)),
    ("answers", "only zeros are silence", lambda rates: rates.argmax(1).where(rates.amax(1) > 0, -1)),
    ("answers", "the smallest", lambda rates: badsnn.answers(-rates)),
    ("choose_v_a", "forgets base_ca", lambda rows, base_ca, margin: badsnn.choose(rows, -1e9, margin)),
    ("choose_v_a", "forgets the rows' ca", lambda rows, base_ca, margin: badsnn.choose(
        rows, base_ca, margin + max(base_ca, *(row["ca"] for row in rows)) - base_ca)),
    ("choose_v_a", "no margin", lambda rows, base_ca, margin: badsnn.choose(rows, base_ca, 0)),
    ("choose_v_a", "forgets target_rate", lambda rows, base_ca, margin: badsnn.choose(
        [dict(row, target_rate=-20) for row in rows], base_ca, margin)),
    ("choose_v_a", "the best gain itself", lambda rows, base_ca, margin: max(rows, key=lambda row: (
        row["ca"] >= max(base_ca, *(r["ca"] for r in rows)) - margin, row["asr_p"]))["v_thr"]),
    ("choose_v_a", "goes on behind a dip", lambda rows, base_ca, margin: badsnn.choose(
        [row for row in rows if row["ca"] >= max(base_ca, *(r["ca"] for r in rows)) - margin], base_ca, margin)),
    ("wilson", "90 %", lambda hits, n: wilson(hits, n, 0.90)),
    ("wilson", "shares", lambda hits, n: tuple(v / 100 for v in wilson(hits, n))),
    ("wilson", "the normal interval", lambda hits, n: tuple(
        100 * (hits / n + side * 1.96 * (hits / n * (1 - hits / n) / n) ** 0.5) for side in (-1, 1))),
    ("wilson", "misses instead of hits", lambda hits, n: wilson(n - hits, n)),
    ("clp_channels", "the weak ones", lambda weight, gamma, var, eps, u: ~clp_channels(weight, gamma, var, eps, u)),
    ("clp_channels", "no BatchNorm", lambda weight, gamma, var, eps, u: clp_channels(
        weight, gamma * 0 + 1, var * 0 + 1, eps, u)),
    ("clp_channels", "the variance for its root", lambda weight, gamma, var, eps, u: clp_channels(
        weight, gamma / var.sqrt(), var, eps, u)),
    ("clp_channels", "sign of gamma", lambda weight, gamma, var, eps, u: clp_channels(
        weight, gamma.clamp(min=0), var, eps, u)),
    ("clp_channels", "u is 3", lambda weight, gamma, var, eps, u: clp_channels(weight, gamma, var, eps, 3.0)),
    ("scan_score", "across the shipped threshold", lambda b, a, w: detectors.scan_score(b[:0], torch.cat([b, a]), w)),
    ("scan_score", "one side only", lambda b, a, w: detectors.scan_score(a[:0], a if len(a) else b, w)),
    ("scan_score", "no window", lambda b, a, w: detectors.scan_score(b, a, 1)),
    ("scan_score", "window off by one", lambda b, a, w: detectors.scan_score(b, a, w + 1)),
    ("scan_score", "largest class of each threshold", lambda b, a, w: (
        max(side[i:i + w].amax(1).mean().item() for side in (b, a) for i in range(len(side))),
        detectors.scan_score(b, a, w)[1])),
    ("scan_score", "the last window is missing", lambda b, a, w: detectors.scan_score(b[:-1], a[:-1], w)),
    ("fade", "scales the short ones up", lambda x, x_trig, l2: x + l2 * F.normalize(
        (x_trig - x).flatten(1), dim=1).view_as(x)),
    ("fade", "one factor for all", lambda x, x_trig, l2: x + (x_trig - x) * min(
        1, l2 / (x_trig - x).flatten(1).norm(dim=1).max().item())),
    ("fade", "returns the change", lambda x, x_trig, l2: fade(x, x_trig, l2) - x),
    ("fade", "clips pixels", lambda x, x_trig, l2: x + (x_trig - x).clamp(-l2, l2)),
    ("fade", "wrong sign", lambda x, x_trig, l2: 2 * x - fade(x, x_trig, l2)),
    ("pareto", "ASR_p for the gain", lambda rows: pareto(rows, lambda row: row["asr_p"])),
    ("pareto", "the beaten ones", lambda rows: [row for row in rows if row not in pareto(rows)]),
    ("pareto", "another order", lambda rows: pareto(rows)[::-1]),
    ("pareto", "the best of each only", lambda rows: [row for row in rows if row in (
        max(rows, key=lambda row: row["ca"]), max(rows, key=lambda row: row["asr_p"] - row["target_rate"]))]),
]


def grade(answers, seed, only=None):
    """[points, of] of a namespace in the place of exercises.py, for all exercises or for one."""
    got = of = 0
    for name, check in CHECKS.items():
        exercise, n = check.pytestmark[0].args
        if only in (None, exercise):
            of += n
            with contextlib.suppress(Exception):        # a wrong answer may also lead to an error
                check(answers, generator(seed, "exercise", name))
                got += n
    return got, of


def test_right_answers_get_all_points():
    """With any seed that a lecturer may set: texts, as in the environment."""
    assert {check.pytestmark[0].args[0] for check in CHECKS.values()} == set(ANSWERS)
    for seed in ("some words", *map(str, range(40))):
        got, of = grade(SimpleNamespace(**ANSWERS), seed)
        assert got == of == 40, seed


@pytest.mark.parametrize("exercise, wrong", [mistake[::2] for mistake in MISTAKES],
                         ids=[f"{exercise}: {text}".replace(" ", "_") for exercise, text, _ in MISTAKES])
def test_every_mistake_costs_points(exercise, wrong):
    for seed in map(str, range(25)):
        got, of = grade(SimpleNamespace(**dict(ANSWERS, **{exercise: wrong})), seed, exercise)
        assert got < of, f"not noticed with GRADE_SEED={seed}"


def test_every_exercise_has_at_least_four_mistakes():
    for exercise in ANSWERS:
        assert sum(name == exercise for name, *_ in MISTAKES) >= 4, exercise


@pytest.mark.parametrize("exercise", sorted(ANSWERS.keys() - {"wilson", "choose_v_a"}))
def test_arguments_are_left_as_they_are(exercise):
    def edits(*arguments):
        answer = ANSWERS[exercise](*arguments)
        for a in arguments:
            if isinstance(a, torch.Tensor):
                a.detach().zero_()
            if isinstance(a, list):
                a.clear()
        return answer
    got, of = grade(SimpleNamespace(**dict(ANSWERS, **{exercise: edits})), "0", exercise)
    assert got < of


def test_choose_v_a_may_edit_its_rows():
    def edits(rows, base_ca, margin):
        rows.sort(key=lambda row: row["v_thr"])
        for row in rows:
            row.update(asr_p=row["asr_p"] - row["target_rate"], target_rate=0)
        return choose_v_a(rows, base_ca, margin)
    assert grade(SimpleNamespace(choose_v_a=edits), "0", "choose_v_a") == (4, 4)


def graded(submission, out, *options, seed="0"):
    """Grades a file from the command line: (exit code, what OUT.json holds, or None)."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_exercises.py",
               "--exercises", str(submission), "--grade", str(out), *options]
    done = subprocess.run(command, cwd=ROOT, env=dict(os.environ, GRADE_SEED=seed), capture_output=True)
    return done.returncode, json.loads(out.read_text()) if out.exists() else None


def test_the_command_line_grades(tmp_path):
    """The shipped stubs and a file that is no Python are worth 0; the right answers, from a file, everything."""
    right, broken, out = tmp_path / "right.py", tmp_path / "broken.py", tmp_path / "out.json"
    right.write_text("from test_grading import ANSWERS\nglobals().update(ANSWERS)\n")
    broken.write_text("def lif_step(:\n")
    _, stubs = graded(ROOT / "notebooks" / "exercises.py", out)
    assert stubs["points"] == 0 and set(stubs["exercises"]) == set(ANSWERS)
    _, best = graded(right, out, seed="some words")
    assert best["points"] == best["of"] == stubs["of"] == 40 and best["seed"] == "some words"
    _, none = graded(broken, out)
    assert (none["points"], none["of"]) == (0, 40) and "SyntaxError" in none["exercises"]["fade"]["said"]


def test_what_ends_or_never_ends_costs_its_exercise_only(tmp_path):
    bad, out = tmp_path / "bad.py", tmp_path / "out.json"
    bad.write_text("""from __future__ import annotations
import dataclasses, os, signal, sys
import pytest
from test_grading import ANSWERS
globals().update(ANSWERS)

@dataclasses.dataclass
class Row:          # looks for its module by name
    values: list[int]

def lif_step(*arguments):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        pass

def sigmoid_surrogate(d):
    raise KeyboardInterrupt

def spikes_per_sample(*arguments):
    pytest.exit("enough")

def every_step_loss(*arguments):
    sys.exit(0)

def wilson(*arguments):
    os._exit(0)
""")
    _, result = graded(bad, out, "--limit", "10")
    lost = {name: grade["said"] for name, grade in result["exercises"].items() if grade["points"] < grade["of"]}
    assert lost.keys() == {"lif_step", "sigmoid_surrogate", "spikes_per_sample", "every_step_loss", "wilson"}
    assert lost["lif_step"] == "not finished after 10 seconds" and result["points"] == 30 and result["of"] == 40


@pytest.mark.skipif(not importlib.util.find_spec("xdist"), reason="no pytest-xdist")
def test_several_processes_are_refused_and_an_old_result_goes(tmp_path):
    out = tmp_path / "out.json"
    out.write_text("last week's")
    assert graded(ROOT / "notebooks" / "exercises.py", out, "-n", "2") == (4, None)


def test_unsolved_exercises_fail_only_where_they_are_named():
    listed = subprocess.run([sys.executable, "-m", "pytest", "--collect-only", "-q", "tests"], cwd=ROOT,
                            capture_output=True, text=True).stdout
    assert "test_grading" in listed and "test_exercises.py" not in listed


def test_the_stubs_are_those_that_are_graded():
    source = Path(ROOT / "notebooks" / "exercises.py").read_text()
    assert source.count("    raise NotImplementedError\n") == len(ANSWERS)
    assert all(f"\ndef {name}(" in source for name in ANSWERS) and max(map(len, source.splitlines())) <= 120
