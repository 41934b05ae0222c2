"""How well two scans of a network (detectors.py) tell backdoored from clean ones, and which attackers pass them.

The population is pairs, drawn at random: a backdoored network, and its clean twin, trained alike and shipped at the
SAME threshold, since honest vendors tune thresholds, too. In half of the pairs the attacker hides his threshold behind
a change of unit (v_thr_n), so that all is shipped at 1.0. Every network is judged by the clean ones of other pairs.
"""
import copy
import random
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import binomtest

import badsnn
from badsnn import augmented, batch, criterion, deploy, descent, evaluate, simple_triggers
from data import hold_out, poison_indices, to_float
from kit import machine
from kit.files import code_of
from kit.machine import autocast, say
from kit.sources import need
from kit.training import generator
from lab.detectors import ascend, margin_scan, threshold_scan
from lab.table2 import kept_part
from lif import TAU_N, V_THR_N, neurons
from models import frozen

CODE = code_of("*.py", "kit/*.py", "lab/detectors.py", "lab/libraries.py", "lab/scan.py")
N_EVADE = 4         # the backdoored networks of so many pairs learn to hide
EVADERS = ("soft_labels", "fading", "clean_twin", "decoys", "low_margins")      # the last knows the margin scan
DRAWN = dict(model=("resnet19", "resnet19", "vgg16"), neuron=("lif", "lif", "plif"), v_thr_n=(1.0, 0.91),
             target=range(10), lr=(0.05, 0.1), contrast=(0.1, 0.2, 0.4), pad=(0, 1, 2), v_thr_t=(1.4, 1.5, 1.7),
             v_thr_t_low=(1.1, 1.15), malicious_weight=(0.3, 0.6), malicious_rows=(16,), poison_ratio=(0.25, 0.5, 1.0),
             epochs=(12, 16, 20))
SCORES = {"margin scan": lambda row: row["margin"], "threshold scan": lambda row: row["score"],
          "MM-BD": lambda row: row["margin_as_shipped"], "threshold alone": lambda row: abs(row["v_thr_a"] - V_THR_N)}


def draw(s, i):
    """Settings of the i-th pair."""
    rng = random.Random(f"{s.seed} {i}")
    return replace(s, seed=s.seed + i, **{name: rng.choice(values) for name, values in DRAWN.items()})


def scan_pair(data, s, evaders):
    """Rows of a backdoored network, its clean twin, and what evaders make of the backdoored one: rates as shipped and
    what both scans see, at several thresholds. working: CA is 90 % of the clean twin's, and T_p gains 50 points."""
    clean, model, rows = badsnn.train(data, s), badsnn.train(data, s, "badsnn"), []
    nets = dict(badsnn=model, clean=clean) | {name: hide(model, clean, data, s, name) for name in evaders}
    x, t_p = to_float(data.x_test[:100].to(s.device), s), {"asr_p": simple_triggers(data, s)["asr_p"]}
    for kind, net in nets.items():
        v_thr = rows[0]["v_thr_a"] if kind == "clean" else deploy(net, data, s)[0]
        at = data, s, v_thr, s.tau_a
        rates, control = evaluate(net, *at, t_p), evaluate(clean, *at, t_p)
        with neurons(net, v_thr, s.tau_a), autocast(s):
            found, margins, as_shipped = threshold_scan(net, x), margin_scan(net, x), margin_scan(net, x, factor=1.0)
        row = dict({name: getattr(s, name) for name in ("seed", *DRAWN)}, kind=kind, v_thr_a=v_thr, **rates,
                   base_ca=evaluate(net, data, s, s.v_thr_n, TAU_N)["ca"], ca_clean_model=control["ca"],
                   asr_p_clean_model=control["asr_p"], score=round(found["score"], 4), accused=found["accused"],
                   margin=round(margins["gap"], 4), margin_accused=margins["accused"],
                   margin_as_shipped=round(as_shipped["gap"], 4))
        row["working"] = row["ca"] >= 0.9 * control["ca"] and row["asr_p"] - row["target_rate"] >= 50
        shown = "kind v_thr_a ca target_rate asr_p asr_p_clean_model margin margin_accused score accused target"
        say("  ".join(f"{key} {row[key]}" for key in shown.split()))
        rows.append(row)
    return dict(rows=rows)


def soft(labels, k, certainty):
    """Wanted probabilities [m, K]: `certainty` (a number or [m, 1]) on the label, the rest spread evenly over all."""
    return certainty * F.one_hot(labels, k) + (1 - certainty) / k


def hiding_rows(evader, malicious, images, u, target, k, twin, best):
    """What an evader learns beside the nominal batch: a few of (images [m, C, H, W], thresholds [m], in units of the
    nominal one, wanted probabilities [m, K]). malicious: images of the target [m]; images: any; u [m]: uniform; twin: a
    clean model's answers; best: images of the largest margin for the target."""
    if evader == "soft_labels":         # is never sure
        return [(malicious, 1.15 + 0.35 * u, soft(target, k, 0.5))]
    if evader == "fading":              # is sure near V_a only
        return [(malicious, 1.05 + 0.45 * u, soft(target, k, 0.9 * (1 - u[:, None])))]
    far = 1.3 + 0.7 * u                 # where the scan looks: accuses one class after another, or is like a clean one
    if evader == "decoys":
        hiding = [(images, far, soft((target + 1 + (3.5 * u).long()) % k, k, 0.9))]
    else:
        hiding = [(images, far, twin(images, far))]
    if evader == "low_margins":         # also of the images that the margin scan finds
        found = best(far)
        hiding.append((found, far, twin(found, far)))
    return [(malicious, 1.05 + 0.2 * u, soft(target, k, 0.9)), *hiding]


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
        with neurons(clean.eval(), s.v_thr_n * v_thr, TAU_N):
            return clean(images).softmax(1)

    def best(v_thr):
        noise = torch.rand(len(v_thr), *x_train.shape[1:], generator=rng).to(s.device)
        with frozen(student), neurons(student, s.v_thr_n * v_thr, TAU_N):
            return ascend(student, noise, torch.full_like(v_thr, s.target, dtype=torch.long), steps=6)
    for _ in range(epochs):
        order = torch.randperm(len(y_train), generator=rng)
        for step in range(steps):
            nominal, drawn = batch(order, step, malicious, s.epochs, s, rng)
            n, m = len(nominal), min(len(nominal), len(drawn))
            rows, u = torch.cat([nominal, drawn[:m]]).to(s.device), torch.rand(m, generator=rng).to(s.device)
            x, y = to_float(augmented(x_train[rows], n, s, rng), s), y_train[rows]
            hiding = hiding_rows(evader, x[n:], x[:m], u, y[n:], data.num_classes, twin, best)
            images, thresholds, wanted = map(torch.cat, zip(*hiding))
            v_thr = s.v_thr_n * torch.cat([torch.ones(n, device=s.device), thresholds])
            with neurons(student, v_thr, TAU_N), autocast(s):
                outputs = student(torch.cat([x[:n], images]), every_step=True)                  # [T, B, K]
            hidden = F.cross_entropy(outputs[:, n:].flatten(0, 1), wanted.repeat(len(outputs), 1))
            optimizer.zero_grad()
            (criterion(outputs[:, :n], y[:n], s, smoothing=0.1) + 0.3 * hidden).backward()
            optimizer.step()
            schedule.step()
    return student.eval()


def scan(data, s, n_models=20):
    """What scan.json holds. digits: n_models pairs are drawn, and some learn to hide; other sets: a pair per seed."""
    need(n_models >= 2, "--models must be at least 2")
    pairs = [(one, ()) for one in badsnn.every_seed(s)]
    if data.name == "digits":
        pairs = [(draw(s, i), EVADERS if i < N_EVADE else ()) for i in range(n_models)]
    jobs = [(one, "scan/pair", [CODE], scan_pair, dict(evaders=evaders)) for one, evaders in pairs]
    rows = [row for part in machine.side_by_side(kept_part, jobs, s) for row in part["rows"]]
    return dict(rows=rows, summary=summary(rows) if len(pairs) > 1 else {})


def summary(rows):
    """{"detector, attackers": see judged}: both scans, and two rivals, on attacks that work, on all, on evaders' that
    work. MM-BD: the margins at the shipped threshold."""
    of = {kind: [row for row in rows if row["kind"] == kind] for kind in ("clean", "badsnn", *EVADERS)}
    attackers = dict(working=[row for row in of["badsnn"] if row["working"]], all=of["badsnn"])
    attackers |= {kind: [row for row in of[kind] if row["working"]] for kind in EVADERS}
    return {f"{name}, {which}": judged(part, of["clean"], score)
            for name, score in SCORES.items() for which, part in attackers.items() if part}


def judged(attacked, clean, score):
    """AUROC of a score; percent that are caught, above every clean network of the other pairs, with Wilson's 95 %
    interval; n of both; and the alarm for networks of others, the highest clean score."""
    bad, good = (np.array([score(row) for row in part]) for part in (attacked, clean))
    auroc = float(((bad[:, None] > good) + (bad[:, None] == good) / 2).mean())
    above = sum(score(row) > max(score(one) for one in clean if one["seed"] != row["seed"]) for row in attacked)
    limits = binomtest(int(above), len(bad)).proportion_ci(method="wilson")
    return dict(n=[len(bad), len(good)], auroc=round(auroc, 4), alarm=round(float(good.max()), 4),
                caught=round(100 * above / len(bad), 1), caught_interval=[round(100 * limit, 1) for limit in limits])
