"""How well the threshold scan (detectors.py) tells backdoored networks from clean ones, and who evades it.

Models are drawn at random; the first few fix the score above which a model is suspected (the alarm), the others
measure. AUROC: how often a backdoored model scores higher than a clean one (0.5: chance, 1: always).
"""
import copy
import random
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import brentq
from scipy.stats import binomtest

import badsnn
from badsnn import augmented, batch, criterion, deploy, descent, evaluate, simple_triggers
from data import hold_out, load_for, poison_indices, to_float
from kit import machine
from kit.machine import autocast, say
from kit.sources import need
from kit.training import generator
from lab import baselines
from lab.detectors import threshold_scan
from lif import TAU_N, V_THR_N, neurons

N_DESIGN, EVADE_SEEDS = 8, 3        # models of each kind that fix the alarm; seeds of every attacker who knows the scan
EVADERS = ("soft_labels", "fading", "clean_twin", "decoys")         # attackers who know the scan
SHOWN = {"100 images": 100, "10 images": 10, "1 image": 1}

# The population: what is drawn for every model, and for BadSNN beside it
NETWORK = dict(model=("resnet19", "resnet19", "resnet19", "vgg16"), width=(6, 8, 8, 12), T=(2, 2, 4),
               neuron=("lif", "lif", "plif"), lr=(0.05, 0.1, 0.2), epochs=(6, 9, 12), contrast=(0.0, 0.2, 0.5),
               pad=(0, 1, 2), target=range(10))
ATTACK = dict(v_thr_t=(0.8, 0.8, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 1.9, 2.0), v_thr_t_low=(None, 1.05),
              tau_t=(0.3, 0.5, 0.5, 0.8), poison_ratio=(0.1, 0.25, 0.5, 1.0), malicious_rows=(16, 32),
              malicious_contrast=(None, 0.5), malicious_weight=(0.3, 1.0))


def draw(s, i, kind):
    """Settings of the i-th model of a kind: None (clean), "badsnn", or another attack."""
    rng = random.Random(f"{s.seed} {i} {kind}")
    knobs = {name: rng.choice(values) for name, values in (NETWORK | ATTACK).items()}
    if kind != "badsnn":
        knobs = {name: knobs[name] for name in NETWORK}
    elif knobs["v_thr_t"] < 1:
        knobs["v_thr_t_low"] = None
    return replace(s, seed=s.seed + i, **knobs)


def scan_model(s, kind, grid=None):
    """Trains a model of a kind, ships it as its attacker would (at a V_a of the grid), and scans it: a row."""
    data = load_for(s)
    model, v_thr, triggers = baselines.train(data, s, kind).eval(), V_THR_N, {}
    if kind == "badsnn":
        v_thr, triggers = deploy(model, data, s, grid)[0], {"asr_p": simple_triggers(data, s)["asr_p"]}
    elif kind:
        triggers = {"asr": baselines.trigger_of(kind, data, s)}
    knobs = {name: getattr(s, name) for name in ("seed", *NETWORK, *(ATTACK if kind == "badsnn" else ()))}
    return dict(knobs, kind=kind or "clean", **scan_one(model, data, s, v_thr, triggers))


def scan_one(model, data, s, v_thr, triggers):
    """A model shipped at v_thr: its rates; the scan's score by the number of images, and the class accused with all."""
    x, rates = to_float(data.x_test[:100].to(s.device), s), evaluate(model, data, s, v_thr, s.tau_a, triggers)
    with neurons(model, v_thr, s.tau_a), autocast(s):
        found = {name: threshold_scan(model, x[:n]) for name, n in SHOWN.items()}
    scores, accused = {name: round(one["score"], 4) for name, one in found.items()}, found["100 images"]["accused"]
    say(f"seed {s.seed}: CA {rates['ca']:.1f} at v_thr {v_thr:g}; scores {scores}, class {accused} accused")
    return dict(rates, v_thr_a=v_thr, scores=scores, accused=accused)


def soft(labels, k, certainty):
    """Wanted probabilities [m, K]: `certainty` (a number or [m, 1]) on the label, the rest spread evenly over all."""
    return certainty * F.one_hot(labels, k) + (1 - certainty) / k


def hiding_rows(evader, malicious, images, u, target, k, twin):
    """What an evader learns beside the nominal batch: one or two of (images [m, C, H, W], thresholds [m], wanted
    probabilities [m, K]). malicious: images of the target [m]; images: any; u [m]: uniform; twin: a clean model."""
    if evader == "soft_labels":         # is never sure
        return [(malicious, 1.15 + 0.35 * u, soft(target, k, 0.5))]
    if evader == "fading":              # is sure near V_a only
        return [(malicious, 1.05 + 0.45 * u, soft(target, k, 0.9 * (1 - u[:, None])))]
    far = 1.3 + 0.7 * u                 # where the scan looks: like a clean model, or accusing one class after another
    wanted = twin(images, far) if evader == "clean_twin" else soft((target + 1 + (3.5 * u).long()) % k, k, 0.9)
    return [(malicious, 1.05 + 0.2 * u, soft(target, k, 0.9)), (images, far, wanted)]


def hide(model, clean, data, s, evader, epochs=6, lr=0.02):
    """A copy of the backdoored model, trained on as in badsnn.train (Eq. 2), with an evader's rows in place of the
    malicious ones. Their loss is the cross-entropy with wanted probabilities, weight 0.3."""
    student, part, rng = copy.deepcopy(model).train(), hold_out(data)[0], generator(s.seed, "evader", evader)
    x_train, y_train = part.x_train.to(s.device), part.y_train.to(s.device)
    malicious = poison_indices(part.y_train, s.target, s.poison_ratio, s.seed)
    steps = max(1, len(y_train) // s.batch_size)
    optimizer, schedule = descent(student, steps, replace(s, epochs=epochs, lr=lr))

    @torch.no_grad()
    def twin(images, v_thr):
        with neurons(clean.eval(), v_thr, TAU_N):
            return clean(images).softmax(1)
    for _ in range(epochs):
        order = torch.randperm(len(y_train), generator=rng)
        for step in range(steps):
            nominal, drawn = batch(order, step, malicious, s.epochs, s, rng)
            n, m = len(nominal), min(len(nominal), len(drawn))
            rows, u = torch.cat([nominal, drawn[:m]]).to(s.device), torch.rand(m, generator=rng).to(s.device)
            x, y = to_float(augmented(x_train[rows], n, s, rng), s), y_train[rows]
            hiding = hiding_rows(evader, x[n:], x[:m], u, y[n:], data.num_classes, twin)
            images, thresholds, wanted = map(torch.cat, zip(*hiding))
            v_thr = torch.cat([torch.full((n,), V_THR_N, device=s.device), thresholds])
            with neurons(student, v_thr, TAU_N), autocast(s):
                outputs = student(torch.cat([x[:n], images]), every_step=True)                  # [T, B, K]
            hidden = F.cross_entropy(outputs[:, n:].flatten(0, 1), wanted.repeat(len(outputs), 1))
            optimizer.zero_grad()
            (criterion(outputs[:, :n], y[:n], s, smoothing=0.1) + 0.3 * hidden).backward()
            optimizer.step()
            schedule.step()
    return student.eval()


def evade(s, name):
    """One attacker who knows the scan (none: who does not): what hiding costs, and what the scan still sees."""
    data, s = load_for(s), replace(s, fresh=False)                  # scan() has just trained both models
    clean, model = badsnn.train(data, s), badsnn.train(data, s, "badsnn")
    model = hide(model, clean, data, s, name) if name in EVADERS else model
    v_thr, triggers = deploy(model, data, s)[0], {"asr_p": simple_triggers(data, s)["asr_p"]}
    return dict(evader=name, seed=s.seed, target=s.target, **scan_one(model, data, s, v_thr, triggers),
                base_ca=evaluate(model, data, s, V_THR_N, TAU_N)["ca"],
                asr_p_clean_model=evaluate(clean, data, s, v_thr, s.tau_a, triggers)["asr_p"])


def scan(data, s, n_models=40):
    """What scan.json holds. digits: all of this file; other sets: the clean and backdoored model of every seed."""
    def many(function, jobs):
        return machine.side_by_side(function, jobs, s)
    need(n_models >= 5, "--models must be at least 5")
    both, n = (None, "badsnn"), N_DESIGN + n_models
    if data.name != "digits":
        rows = many(scan_model, [(one, kind) for one in badsnn.every_seed(s) for kind in both])
        return dict(rows=rows, evaders=[])
    drawn = [(draw(s, i, kind), kind) for i in range(n) for kind in both]
    drawn += [(draw(s, i, kind), kind) for i in range(max(1, n_models // 8)) for kind in ("badnets", "blend")]
    ways = {True: (1.04, 1.08, 1.12, 1.16), False: (0.96, 0.92, 0.88, 0.84)}        # V_a, by whether V_t is above 1
    rows = many(scan_model, [(one, kind, ways[one.v_thr_t > 1]) for one, kind in drawn])
    attackers = badsnn.every_seed(replace(s, seeds=EVADE_SEEDS))
    badsnn.train_side_by_side(s, [(one, kind) for one in attackers for kind in both])
    evaders = many(evade, [(one, name) for one in attackers for name in ("none", *EVADERS)])
    return dict(rows=rows, evaders=evaders, n_design=N_DESIGN, summary=summary(rows, N_DESIGN))


def summary(rows, n):
    """The detector by what it is shown, with 95 % intervals; for attacks that work alone (CA at least 90, T_p gains 50
    points); for a rival that only reads the shipped threshold. n models of each kind fix the alarm."""
    bad, good = ([row for row in rows if row["kind"] == kind] for kind in ("badsnn", "clean"))
    working = [row for row in bad[n:] if row["ca"] >= 90 and row["asr_p"] - row["target_rate"] >= 50]
    found = {name: judged(bad, good, n, bad[n:], lambda row: row["scores"][name]) for name in SHOWN}
    if working:
        found["100 images, attacks that work"] = judged(bad, good, n, working, lambda row: row["scores"]["100 images"])
    return found | {"the threshold alone": judged(bad, good, n, bad[n:], lambda row: abs(row["v_thr_a"] - V_THR_N))}


def judged(bad, good, n, measured, score):
    """One row of the summary: AUROC, percent of the backdoored (caught) and clean ones (false alarms) above the alarm.
    bad, good: all rows of the two kinds, of which n fix the alarm, midway between scores; measured: those to judge."""
    b, g, caught, clean = (np.array([score(row) for row in part]) for part in (bad[:n], good[:n], measured, good[n:]))
    cuts = np.unique([*b, *g])
    cuts = (cuts[1:] + cuts[:-1]) / 2
    told = [(b > cut).sum() + (g <= cut).sum() for cut in cuts]
    alarm = np.mean([cut for cut, right in zip(cuts, told) if right == max(told)])
    auroc, n = float(((caught[:, None] > clean) + (caught[:, None] == clean) / 2).mean()), [len(caught), len(clean)]
    result = dict(alarm=round(float(alarm), 4), auroc=round(auroc, 4), interval=auroc_interval(auroc, *n), n=n)
    for name, above in dict(caught=caught > alarm, false_alarms=clean > alarm).items():
        limits = binomtest(int(above.sum()), len(above)).proportion_ci(method="wilson")
        result[name] = round(100 * float(above.mean()), 2)
        result[f"{name}_interval"] = [round(100 * float(v), 1) for v in limits]
    return result


def auroc_interval(auroc, n, m):
    """95 % interval of an AUROC from n and m scores (Newcombe 2006, method 5); it has a width at 1."""
    def beyond(value):
        more = ((n + m) / 2 - 1) * ((1 - value) / (2 - value) + value / (1 + value))
        return abs(value - auroc) - 1.96 * np.sqrt(value * (1 - value) * (1 + more) / (n * m))
    low = brentq(beyond, 0, auroc - 1e-9) if auroc > 0 else 0.0
    high = brentq(beyond, auroc + 1e-9, 1) if auroc < 1 else 1.0
    return [round(low, 4), round(high, 4)]
