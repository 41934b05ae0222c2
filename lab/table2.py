"""Table 2 (Sec. 4.3): every attack against every defence, and what three detectors say of each; defend() makes it.

BadSNN is shipped at its V_a (badsnn.deploy), the other attacks at the nominal threshold. What a defence leaves is
scored as shipped, and BadSNN also with the threshold set back.
"""
import copy
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
from sklearn.metrics import roc_auc_score

import badsnn
from badsnn import asr, evaluate, train
from data import augment, load_for, to_float
from kit.files import code_of, mean_of
from kit.machine import autocast, say, side_by_side
from kit.sources import need
from kit.training import generator
from lab import baselines, defenses, detectors
from lab.results import kept
from lif import TAU_N, V_THR_N, neurons
from models import frozen

CODE = code_of("*.py", "kit/*.py", "lab/baselines.py", "lab/de[ft]*.py", "lab/libraries.py", "lab/table2.py")
DEFENSES = {"none": lambda model, x, y, **options: model, "fine_tune": defenses.fine_tune,
            "clp": lambda model, x, y, **options: defenses.clp(model), "anp": defenses.anp, "tsbd": defenses.tsbd,
            "nad": defenses.nad}
IMAGES_ONLY = ("tsbd", "nad")       # TSBD resets convolutions, NAD compares stages: N-MNIST-Net has two of each


def defend(data, s, attacks=None, defender_at="S_a"):
    """Table 2 of a data set, a dict: attacks (None: all that fit the data) against all defences that do, which work on
    the network as shipped (defender_at "S_a") or at the nominal setting ("S_n"). Raises ValueError."""
    known = ("badsnn", *(baselines.EVENT_ATTACKS if data.events else baselines.IMAGE_ATTACKS))
    need(not dist.is_initialized(), "a defence is the work of one process: run defend without torchrun")
    need(set(attacks or known) <= set(known), f"the attacks on {data.name} are {', '.join(known)}")
    need(defender_at in ("S_a", "S_n"), f"a defender trains at S_a or at S_n, not at {defender_at}")
    split_test(data, s)     # refuses too small a test set before anything is trained
    attacks, seeds = [name for name in known if name in (attacks or known)], badsnn.every_seed(s)
    kinds = [None, "badsnn"] if "badsnn" in attacks else [None]
    badsnn.train_side_by_side(s, [(one, kind) for one in seeds for kind in kinds])
    jobs = [(one, f"table2/{name}-{defender_at}", [CODE], run_attack, dict(attack=name, defender_at=defender_at))
            for name in attacks for one in seeds]
    parts = side_by_side(kept_part, jobs, s)
    return dict(mean_of([part["beside"] for part in parts[:s.seeds]]), defender_at=defender_at,
                rows=[row for part in parts for row in part["rows"]],
                detectors=[row for part in parts for row in part["detectors"]])


def split_test(data, s):
    """The defender's images x [N, C, H, W] in [0, 1] and labels y, ten of every class of the TEST set (or half of what
    its smallest class has; the paper: 5 % of the set), and the data without them, which are scored."""
    rest, classes = torch.ones(len(data.y_test), dtype=torch.bool), data.y_test.unique(return_counts=True)
    per_class = min(10, max(1, int(classes[1].min()) // 2))
    for label in classes[0].tolist():
        rows = (data.y_test == label).nonzero().flatten()
        order = torch.randperm(len(rows), generator=generator(s.seed, "images of the defender", label))
        rest[rows[order[:per_class]]] = False
    need((~rest).sum() >= 2 and (data.y_test[rest] != s.target).sum() >= 2, f"{len(rest)} test samples are too few to "
         "give some to the defender and score on the others; raise --n-test")
    x = to_float(data.x_test[~rest].to(s.device), s)
    return x, data.y_test[~rest].to(s.device), replace(data, x_test=data.x_test[rest], y_test=data.y_test[rest])


def kept_part(s, name, code, run, decides):
    """run(data, s, **decides) for one seed, kept in s.runs: a killed run goes on after the last one of them."""
    data = load_for(s)
    path = s.runs / data.name / f"{name}-seed{s.seed}.json"
    return kept(path, data, replace(s, seeds=1), code, partial(run, data, s, **decides), **decides)[0]


def run_attack(data, s, attack, defender_at):
    """Table 2's part of one attack and seed: rows, detectors, and what stands beside the table."""
    trained, (x, y, scored) = replace(s, fresh=False), split_test(data, s)
    clean = train(data, trained)                # defend() has just trained the clean and BadSNN's network
    if attack == "badsnn":
        model = train(data, trained, attack)
        v_thr, t_p = badsnn.deploy(model, data, s)[0], badsnn.simple_triggers(data, s)["asr_p"]
        t_o = None if data.events else badsnn.train_trigger(model, data, s, v_thr)[0]
        triggers = ({"T_o": t_o} if t_o else {}) | {"T_s" if data.events else "T_p": t_p}
    else:
        model, s = baselines.train(data, s, attack), replace(s, tau_a=TAU_N)
        v_thr, triggers = s.v_thr_n, {attack: baselines.trigger_of(attack, data, s)}
    shipped, rows, about = as_shipped(model, v_thr, s), [], dict(attack=attack, seed=s.seed)
    for defense in [name for name in DEFENSES if not (data.events and name in IMAGES_ONLY)]:
        same = dict(about, defense=defense, defender_at=defender_at)
        rows += rows_of(dict(same, model="attacked"), shipped, v_thr, triggers, x, y, scored, s)
        if attack == "badsnn" or defense == "none":
            rows += rows_of(dict(same, model="clean"), as_shipped(clean, v_thr, s), v_thr, triggers, x, y, scored, s)
    beside = dict(n_defender=len(y), clean_ca=evaluate(clean, scored, s, s.v_thr_n, TAU_N)["ca"],
                  scan_clean_model=detectors.threshold_scan(clean, x)["score"])
    found = [dict(about, trigger=name, **detect(shipped, t, x, scored, s)) for name, t in triggers.items()]
    return dict(rows=rows, detectors=found, beside=beside)


def rows_of(same, net, v_thr, triggers, x, y, scored, s):
    """One defence of one shipped model: a row per setting and trigger. same: what its rows share, as defense."""
    start, rows = defenses.restore(net) if same["defender_at"] == "S_n" else net, []
    repaired = repair(same["defense"], start, x, y, s)
    settings = {"shipped": (v_thr, s.tau_a)}
    if same["attack"] == "badsnn":              # for the others they are the same
        settings["nominal"] = V_THR_N, TAU_N
    for setting, at in settings.items():
        rates = evaluate(repaired, scored, s, *at)
        for name, t in triggers.items():
            rates["asr"] = asr(repaired, scored, s, *at, t)
            rows.append(dict(same, setting=setting, trigger=name, v_thr=at[0], **rates))
            say("  ".join(f"{key} {value}" for key, value in rows[-1].items()))
    return rows


def repair(defense, net, x, y, s):
    """What a defence makes of a network with the defender's images x, y, shifted and mirrored as in training."""
    moved = partial(augment, pad=s.pad, flip=s.flip, contrast=0, rng=generator(s.seed, f"augmentation of {defense}"))
    with autocast(s, cache_enabled=False):      # the weights change
        return DEFENSES[defense](net, x, y, augment=moved, seed=s.seed)


def as_shipped(model, v_thr, s):
    """A copy of the model with its neurons at (v_thr, s.tau_a)."""
    with neurons(model, v_thr, s.tau_a):
        return copy.deepcopy(model).eval()


def detect(model, t, x, scored, s):
    """AUROC of two detectors for triggered against clean test images of other classes (0.5: no better than chance), and
    what the threshold scan, which sees no trigger, says of the model. x: the defender's images."""
    clean = to_float(scored.x_test[scored.y_test != s.target][:256].to(s.device), s)
    both, truth = torch.cat([clean, t(clean)]), [0] * len(clean) + [1] * len(clean)
    with autocast(s), frozen(model):
        judged = dict(strip_auroc=-detectors.strip(model, both, x, seed=s.seed),
                      spikes_auroc=detectors.spike_deviation(model, both, x))
        scan = detectors.threshold_scan(model, x)
    areas = {name: round(roc_auc_score(truth, score.cpu().numpy()), 4) for name, score in judged.items()}
    return dict(areas, scan_score=round(scan["score"], 4), scan_right=float(scan["accused"] == s.target))
