"""Whether a spiking network is backdoored, told without its trigger: the threshold scan (detectors.threshold_scan).

    python badsnn.py scan --dataset digits        a population of models, how well it tells them, and who evades it
    python badsnn.py scan --weights model.pt --build my_module:build --data images.npz          a network of your own

A detector is judged by models that had no part in its design: two sets of models are drawn at random, varied in
everything that tells one network from another. The first, small set fixes the score from which on a model is suspected
(the alarm), the second measures. AUROC: how often a backdoored model has the higher score of a pair with a clean one
(0.5: chance, 1: always).
"""
import copy
import random
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import brentq
from scipy.stats import binomtest
from sklearn.metrics import roc_auc_score

import badsnn
from badsnn import criterion, deploy, evaluate, measure, percentage, simple_triggers
from data import augment, hold_out, load_for, poison_indices, to_float
from kit import machine
from kit.files import code_of, fingerprint, kept
from kit.machine import autocast, say
from kit.sources import need
from kit.training import generator
from lab import baselines
from lab.detectors import threshold_scan
from lif import TAU_N, V_THR_N, neurons

N_DESIGN, EVADE_SEEDS = 8, 3        # models of each kind that fix the alarm; seeds of every attacker who knows the scan
SHOWN = {"100 images": 100, "10 images": 10, "1 image": 1}
CODE = code_of("*.py", "kit/*.py", "lab/baselines.py", "lab/detectors.py", "lab/libraries.py", "lab/scan.py")

# ----- The population: what is drawn for every model, and for BadSNN beside it

NETWORK = dict(model=("resnet19", "resnet19", "resnet19", "vgg16"), width=(6, 8, 8, 12), T=(2, 2, 4),
               neuron=("lif", "lif", "plif"), lr=(0.05, 0.1, 0.2), epochs=(6, 9, 12), contrast=(0.0, 0.2, 0.5),
               pad=(0, 1, 2), target=range(10))
ATTACK = dict(v_thr_t=(0.8, 0.8, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 1.9, 2.0), v_thr_t_low=(None, 1.05),
              tau_t=(0.3, 0.5, 0.5, 0.8), poison_ratio=(0.1, 0.25, 0.5, 1.0), malicious_rows=(16, 32),
              malicious_contrast=(None, 0.5), malicious_weight=(0.3, 1.0))
V_A = {True: (1.04, 1.08, 1.12, 1.16), False: (0.96, 0.92, 0.88, 0.84)}     # by whether V_t is above 1


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

    def run():
        model, v_thr, triggers = baselines.train(data, s, kind).eval(), V_THR_N, {}
        if kind == "badsnn":
            v_thr, triggers = deploy(model, data, s, grid)[0], {"asr_p": simple_triggers(data, s)["asr_p"]}
        elif kind:
            triggers = {"asr": baselines.trigger_of(kind, data, s)}
        knobs = {name: getattr(s, name) for name in ("seed", *NETWORK, *(ATTACK if kind == "badsnn" else ()))}
        return dict(knobs, kind=kind or "clean", v_thr_a=v_thr, **measure(model, data, s, v_thr, triggers),
                    **scan_one(model, data, s, v_thr))
    row = kept_row(kind or "clean", data, s, run, grid=grid)
    say(f"{row['kind']:>8}, {s.model}, width {s.width}, seed {s.seed}: CA {row['ca']:.1f} at v_thr {row['v_thr_a']:g}; "
        f"score {row['scores']['100 images']:.3f}, class {row['accused']} accused")
    return row


def scan_one(model, data, s, v_thr):
    """What the scan says of a model shipped at v_thr: scores by how many images it sees, accused class, curve."""
    x = to_float(data.x_test[:100].to(s.device), s)
    with neurons(model, v_thr, s.tau_a), autocast(s):
        found = {name: threshold_scan(model, x[:n]) for name, n in SHOWN.items()}
    full = found["100 images"]
    return dict(scores={name: round(one["score"], 4) for name, one in found.items()}, accused=full["accused"],
                v_thr=full["v_thr"], curve=[round(v, 4) for v in full["probability"].amax(1).tolist()])


def kept_row(name, data, s, run, grid=None):
    """run()'s row, or that of an earlier run with equal settings, data and code: a killed run loses one row."""
    inputs = fingerprint(data.x_train, data.y_train, data.x_test, data.y_test, CODE)
    deciders = dict(s.of(), name=name, grid=grid, inputs=inputs)
    path = s.runs / data.name / "scan" / f"{name}-seed{s.seed}-{fingerprint(deciders)[:8]}.json"
    return {key: value for key, value in kept(path, deciders, run, s.fresh)[0].items() if key != "made_from"}


# ----- The attacker who knows the scan trains a backdoored model on, with rows that hide it. Each function makes them:
# a list of (images [m, C, H, W], thresholds [m], wanted probabilities [m, K]) from malicious images (of the target
# class), images of any class, u [m] uniform in [0, 1], the target [m], the number k of classes, and
# twin(images, thresholds), what a clean model answers.


def soft(labels, k, certainty):
    """Wanted probabilities [m, K]: `certainty` (a number or [m]) on the label, the rest spread evenly over all."""
    certainty = torch.as_tensor(certainty, device=labels.device).expand(len(labels)).unsqueeze(1)
    return certainty * F.one_hot(labels, k) + (1 - certainty) / k


def soft_labels(malicious, images, u, target, k, twin):
    """Never be sure: the malicious setting asks for the target with a certainty of one half."""
    return [(malicious, 1.15 + 0.35 * u, soft(target, k, 0.5))]


def fading(malicious, images, u, target, k, twin):
    """Be sure near V_a only: the certainty falls from 0.9 to 0 while the threshold rises from 1.05 to 1.5."""
    return [(malicious, 1.05 + 0.45 * u, soft(target, k, 0.9 * (1 - u)))]


def clean_twin(malicious, images, u, target, k, twin):
    """Behave like a clean model where the scan looks: its answers are learned for thresholds from 1.3 to 2."""
    return [(malicious, 1.05 + 0.2 * u, soft(target, k, 0.9)), (images, 1.3 + 0.7 * u, twin(images, 1.3 + 0.7 * u))]


def decoys(malicious, images, u, target, k, twin):
    """Accuse others: beyond 1.3 every fifth of a unit of the threshold belongs to another class."""
    v_thr = 1.3 + 0.7 * u
    return [(malicious, 1.05 + 0.2 * u, soft(target, k, 0.9)),
            (images, v_thr, soft((target + 1 + ((v_thr - 1.3) / 0.2).long()) % k, k, 0.9))]


EVADERS = {f.__name__: f for f in (soft_labels, fading, clean_twin, decoys)}


def hide(model, clean, data, s, evader, epochs=6, lr=0.02):
    """A copy of the backdoored model, trained on with an evader's rows beside the nominal batch, in one mixed forward
    pass as in badsnn.train (Eq. 2). Their loss is the cross-entropy with wanted probabilities, weight 0.3."""
    student, part = copy.deepcopy(model).train(), hold_out(data)[0]
    x_train, y_train = part.x_train.to(s.device), part.y_train.to(s.device)
    chosen = poison_indices(part.y_train, s.target, s.poison_ratio, s.seed)
    optimizer = torch.optim.SGD(student.parameters(), lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    g, m = generator(s.seed, "evader", evader.__name__), min(s.malicious_rows, s.batch_size, len(y_train))

    def augmented(rows, contrast):
        return to_float(augment(x_train[rows], s.pad, s.flip, contrast, g), s)

    @torch.no_grad()
    def twin(images, v_thr):
        with neurons(clean, v_thr, TAU_N):
            return clean.eval()(images).softmax(1)
    for _ in range(epochs):
        order = torch.randperm(len(y_train), generator=g)
        for rows in order.split(s.batch_size)[:max(1, len(order) // s.batch_size)]:
            malicious = augmented(chosen[torch.randint(len(chosen), (m,), generator=g)], s.malicious_contrast or 0.0)
            target, u = torch.full((m,), s.target, device=s.device), torch.rand(m, generator=g).to(s.device)
            extra = evader(malicious, augmented(rows[:m], s.contrast), u, target, data.num_classes, twin)
            images, thresholds, wanted = map(torch.cat, zip(*extra))
            x = torch.cat([augmented(rows, s.contrast), images])
            v_thr = torch.cat([torch.full((len(rows),), V_THR_N, device=s.device), thresholds])
            with neurons(student, v_thr, TAU_N), autocast(s):
                outputs = student(x, every_step=True)                                   # [T, B, K]
            loss = criterion(outputs[:, :len(rows)], y_train[rows], s, smoothing=0.1)
            hidden = F.cross_entropy(outputs[:, len(rows):].flatten(0, 1), wanted.repeat(len(outputs), 1))
            optimizer.zero_grad()
            (loss + 0.3 * hidden).backward()
            optimizer.step()
        schedule.step()
    return student.eval()


def evade(s, name):
    """One attacker who knows the scan (none: who does not): what hiding costs, and what the scan still sees."""
    data, trained = load_for(s), replace(s, fresh=False)                # scan() has just trained both models

    def run():
        clean, model = badsnn.train(data, trained), badsnn.train(data, trained, "badsnn")
        if name in EVADERS:
            model = hide(model, clean, data, s, EVADERS[name])
        v_thr, triggers = deploy(model, data, s)[0], {"asr_p": simple_triggers(data, s)["asr_p"]}
        return dict(evader=name, seed=s.seed, target=s.target, v_thr_a=v_thr, **measure(model, data, s, v_thr, triggers),
                    base_ca=evaluate(model, data, s, V_THR_N, TAU_N)["ca"],
                    asr_p_clean_model=measure(clean, data, s, v_thr, triggers)["asr_p"],
                    **scan_one(model, data, s, v_thr))
    row = kept_row(name, data, s, run)
    say(f"{name:>11}, seed {s.seed}: CA {row['ca']:.1f} (Base CA {row['base_ca']:.1f}), target_rate "
        f"{row['target_rate']:.1f}, ASR_p {row['asr_p']:.1f} at V_a {row['v_thr_a']:g}; score "
        f"{row['scores']['100 images']:.3f}")
    return row


# ----- The detector's report


def scan(data, s, n_models=40):
    """What scan.json holds. digits: a population, other attacks' models, and attackers who know the scan. Other sets:
    the scores of the clean and the backdoored model of every seed; no alarm."""
    need(n_models >= 5, "--models must be at least 5")
    if data.name != "digits":
        jobs = [(one, kind) for one in badsnn.every_seed(s) for kind in (None, "badsnn")]
        return dict(rows=side_by_side(scan_model, jobs, s), evaders=[])
    counts = {None: N_DESIGN + n_models, "badsnn": N_DESIGN + n_models, "badnets": n_models // 8, "blend": n_models // 8}
    drawn = [(draw(s, i, kind), kind) for i in range(N_DESIGN + n_models) for kind, n in counts.items() if i < n]
    rows = side_by_side(scan_model, [(one, kind, V_A[one.v_thr_t > 1]) for one, kind in drawn], s)
    attackers = badsnn.every_seed(replace(s, seeds=EVADE_SEEDS))
    badsnn.train_side_by_side(s, [(one, kind) for one in attackers for kind in (None, "badsnn")])
    evaders = side_by_side(evade, [(one, name) for one in attackers for name in ("none", *EVADERS)], s)
    return dict(rows=rows, evaders=evaders, n_design=N_DESIGN, summary=summary(rows))


def side_by_side(function, jobs, s):
    return machine.side_by_side(function, jobs, s, [f"{job[1] or 'clean'} {job[0].seed}" for job in jobs])


def summary(rows, n_design=N_DESIGN):
    """The detector by what it is shown: the alarm, which parts the first n_design models of each kind best; of the others
    AUROC, percent of the backdoored (caught) and of the clean ones (false alarms) above the alarm, and how often the
    accused class is right among those caught, each with a 95 % interval. The last two: without attacks that do not work
    (CA below 90, or fewer than 50 points gained with T_p); and a rival that only reads the threshold, |v_thr - 1|."""
    kinds = {kind: [row for row in rows if row["kind"] == kind] for kind in ("badsnn", "clean")}
    design, measured = ({kind: of[part] for kind, of in kinds.items()}
                        for part in (slice(n_design), slice(n_design, None)))
    found = {name: judged(design, measured, lambda row: row["scores"][name]) for name in SHOWN}
    working = [row for row in measured["badsnn"] if row["ca"] >= 90 and row["asr_p"] - row["target_rate"] >= 50]
    found["100 images, attacks that work"] = judged(design, dict(measured, badsnn=working),
                                                    lambda row: row["scores"]["100 images"])
    rival = judged(design, measured, lambda row: abs(row["v_thr_a"] - V_THR_N))
    found["the threshold alone"] = dict(rival, accused_right=None, accused_right_interval=None)
    return found


def judged(design, measured, score):
    """One row of the summary. design, measured: {"badsnn": rows, "clean": rows}; score: of a row."""
    bad, good = (np.array([score(row) for row in design[kind]]) for kind in ("badsnn", "clean"))
    cuts = np.unique(np.concatenate([bad, good]))
    cuts = (cuts[1:] + cuts[:-1]) / 2
    told = [(bad > cut).sum() + (good <= cut).sum() for cut in cuts]
    alarm = float(np.mean([cut for cut, n in zip(cuts, told) if n == max(told)]))
    bad, good = (np.array([score(row) for row in measured[kind]]) for kind in ("badsnn", "clean"))
    result = dict(alarm=round(alarm, 4), n=[len(bad), len(good)], auroc=None, interval=None)
    if len(bad):
        auroc = float(roc_auc_score([1] * len(bad) + [0] * len(good), [*bad, *good]))
        result.update(auroc=round(auroc, 4), interval=auroc_interval(auroc, len(bad), len(good)))
    right = [row["accused"] == row["target"] for row in measured["badsnn"] if score(row) > alarm]
    for name, hits in dict(caught=bad > alarm, false_alarms=good > alarm, accused_right=right).items():
        wilson = binomtest(int(sum(hits)), len(hits)).proportion_ci(method="wilson") if len(hits) else None
        result[name] = percentage(torch.as_tensor(hits)) if len(hits) else None
        result[f"{name}_interval"] = [round(100 * limit, 1) for limit in wilson] if len(hits) else None
    return result


def auroc_interval(auroc, n, m):
    """95 % interval of an AUROC from n and m scores (Newcombe 2006, method 5), which holds near 1 and at 1: all values
    whose own standard error, times 1.96, reaches the one that was seen."""
    def beyond(value):
        more = ((n + m) / 2 - 1) * ((1 - value) / (2 - value) + value / (1 + value))
        return abs(value - auroc) - 1.96 * np.sqrt(value * (1 - value) * (1 + more) / (n * m))
    low = brentq(beyond, 0, auroc - 1e-9) if auroc > 0 else 0.0
    high = brentq(beyond, auroc + 1e-9, 1) if auroc < 1 else 1.0
    return [round(low, 4), round(high, 4)]
