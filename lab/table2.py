"""Table 2 (Sec. 4.3): every attack against every defence, and what three detectors say of each; defend() makes it.

BadSNN is shipped at its V_a (badsnn.deploy), the other attacks at the nominal threshold. A defence gets the network as
shipped; what it leaves is scored as shipped, and BadSNN also with the threshold set back.
"""
import copy
import time
from dataclasses import replace
from functools import partial

import torch
from sklearn.metrics import roc_auc_score

import badsnn
from badsnn import asr, evaluate, train
from data import augment, load_for, to_float
from kit.files import code_of, fingerprint, kept, mean_of
from kit.machine import autocast, say, side_by_side
from kit.sources import need
from kit.training import generator
from lab import baselines, defenses, detectors
from lif import TAU_N, V_THR_N, count_spikes, neurons
from models import frozen

CODE = code_of("*.py", "kit/*.py", "lab/baselines.py", "lab/de[ft]*.py", "lab/libraries.py", "lab/table2.py")
DEFENSES = {"none": lambda model, x, y, **options: model, "fine_tune": defenses.fine_tune,
            "clp": lambda model, x, y, **options: defenses.clp(model, x=x[:1]), "anp": defenses.anp,
            "tsbd": defenses.tsbd, "nad": defenses.nad}
IMAGES_ONLY = ("tsbd", "nad")       # TSBD resets convolutions, NAD compares stages: N-MNIST-Net has two of each


def defend(data, s, attacks=None, defender_at="S_a"):
    """Table 2 of a data set, a dict: attacks (None: all that fit the data) against all defences that do.
    defender_at: "S_a", a defence works on the network as shipped; "S_n", at the nominal setting, a network's own where
    nobody sets another. It is scored as shipped in both cases. Raises ValueError.
    """
    known = ("badsnn", *(baselines.EVENT_ATTACKS if data.events else baselines.IMAGE_ATTACKS))
    need(set(attacks or known) <= set(known), f"the attacks on {data.name} are {', '.join(known)}")
    need(defender_at in ("S_a", "S_n"), f"a defender trains at S_a or at S_n, not at {defender_at}")
    split_test(data, s)     # refuses too small a test set before anything is trained
    jobs = [(one, name, defender_at) for name in known if name in (attacks or known) for one in badsnn.every_seed(s)]
    kinds = [None, "badsnn"] if jobs[0][1] == "badsnn" else [None]
    badsnn.train_side_by_side(s, [(one, kind) for one in badsnn.every_seed(s) for kind in kinds])
    parts = side_by_side(attack_part, jobs, s)
    return dict(mean_of([part["beside"] for part in parts[:s.seeds]]), defender_at=defender_at,
                rows=[row for part in parts for row in part["rows"]],
                detectors=[row for part in parts for row in part["detectors"]])


def split_test(data, s, per_class=10):
    """The defender's images x [N, C, H, W] in [0, 1] and labels y, so many of every class of the TEST set (or half of
    what its smallest class has; the paper: 5 % of the set), and the data without them, which are scored."""
    fewest = int(data.y_test.unique(return_counts=True)[1].min())
    given = defenses.defender_images(data.y_test, min(per_class, max(1, fewest // 2)), s.seed)
    rest = torch.ones(len(data.y_test), dtype=torch.bool)
    rest[given] = False
    need(len(given) >= 2 and (data.y_test[rest] != s.target).sum() >= 2, f"{len(data.y_test)} test samples are too few "
         "to give some to the defender and score on the others; raise --n-test")
    x = to_float(data.x_test[given].to(s.device), s)
    return x, data.y_test[given].to(s.device), replace(data, x_test=data.x_test[rest], y_test=data.y_test[rest])


def kept_part(name, data, s, code, run, **decides):
    """run()'s result for one seed, kept in s.runs: a killed run goes on after the last one of them."""
    deciders = dict(replace(s, seeds=1).of(), **decides, inputs=fingerprint(
        data.x_train, data.y_train, data.x_test, data.y_test, code))
    path = s.runs / data.name / f"{name}-seed{s.seed}-{fingerprint(deciders)[:8]}.json"
    return kept(path, deciders, run, s.fresh)[0]


def attack_part(s, *which):
    """One job: an attack, and where its defenders train; for one seed."""
    data = load_for(s)
    return kept_part(f"table2/{'-'.join(which)}", data, s, CODE, partial(run_attack, data, s, *which), which=which)


def run_attack(data, s, attack, defender_at):
    """Table 2's part of one attack and seed: rows, detectors, and what stands beside the table."""
    trained, (x, y, scored) = replace(s, fresh=False), split_test(data, s)
    clean = train(data, trained)                # defend() has just trained these two
    model = train(data, trained, attack) if attack == "badsnn" else baselines.train(data, s, attack)
    v_thr, triggers = shipped_with(model, data, s, attack)
    say(f"{attack}, shipped at v_thr {v_thr:g}; of each defence: model, threshold, trigger, CA, target_rate, ASR")
    s = s if attack == "badsnn" else replace(s, tau_a=TAU_N)
    shipped, control = as_shipped(model, v_thr, s), as_shipped(clean, v_thr, s)
    rows = []
    for defense in [name for name in DEFENSES if not (data.events and name in IMAGES_ONLY)]:
        for kind, net in (("attacked", shipped), ("clean", control)):
            if kind == "attacked" or attack == "badsnn" or defense == "none":
                same = dict(attack=attack, defense=defense, seed=s.seed, defender_at=defender_at, model=kind)
                rows += rows_of(same, net, v_thr, triggers, x, y, scored, s)
    beside = dict(n_defender=len(y), clean_ca=evaluate(clean, scored, s, V_THR_N, TAU_N)["ca"],
                  scan_clean_model=detectors.threshold_scan(clean, x)["score"])
    found = [dict(attack=attack, trigger=name, seed=s.seed, **detect(shipped, t, x, scored, s))
             for name, t in triggers.items()]
    return dict(rows=rows, detectors=found, beside=beside)


def shipped_with(model, data, s, attack):
    """(the threshold that an attack's model is shipped with, its triggers by name)."""
    if attack != "badsnn":
        return V_THR_N, {attack: baselines.trigger_of(attack, data, s)}
    v_thr, t_p = badsnn.deploy(model, data, s)[0], badsnn.simple_triggers(data, s)["asr_p"]
    t_o = None if data.events else badsnn.train_trigger(model, data, s, v_thr)[0]
    return v_thr, ({"T_o": t_o} if t_o else {}) | {"T_s" if data.events else "T_p": t_p}


def rows_of(same, net, v_thr, triggers, x, y, scored, s):
    """One defence of one shipped model: a row per setting and trigger. same: what its rows share, as defense."""
    started = time.time()
    repaired = repair(same["defense"], defenses.restore(net) if same["defender_at"] == "S_n" else net, x, y, s)
    pruned = defenses.pruned_channels(net, repaired) if same["defense"] in ("clp", "anp") else None
    same, rows = dict(same, pruned=pruned, seconds=round(time.time() - started, 1)), []
    settings = {"shipped": (v_thr, as_shipped(repaired, v_thr, s))}
    if same["attack"] == "badsnn":              # for the others they are the same
        settings["nominal"] = V_THR_N, defenses.restore(repaired)
    for setting, (threshold, model) in settings.items():
        rates = evaluate(model, scored, s, None, None)
        for name, t in triggers.items():
            rows.append(dict(same, setting=setting, trigger=name, v_thr=threshold, **rates,
                             asr=asr(model, scored, s, None, None, t)))
            say("{defense:>9} {model:>8} {setting:>7} {trigger:>11} {ca:6.1f} {target_rate:5.1f} {asr:5.1f}"
                .format(**rows[-1]))
    return rows


def repair(defense, net, x, y, s):
    """What a defence makes of a network with the defender's images x, y, shifted and mirrored as in training."""
    rng = generator(s.seed, f"augmentation of {defense}")
    with autocast(s, cache_enabled=False):      # the weights change
        return DEFENSES[defense](net, x, y, augment=partial(augment, pad=s.pad, flip=s.flip, contrast=0, rng=rng),
                                 seed=s.seed)


def as_shipped(model, v_thr, s):
    """A copy of the model with its neurons at (v_thr, s.tau_a)."""
    with neurons(model, v_thr, s.tau_a):
        return copy.deepcopy(model).eval()


def detect(model, t, x, scored, s, most=256):
    """AUROC of two detectors for triggered against clean test images of other classes (0.5: no better than chance), and
    what the threshold scan, which sees no trigger, says of the model. x: the defender's images."""
    clean = to_float(scored.x_test[scored.y_test != s.target][:most].to(s.device), s)
    both, truth = torch.cat([clean, t(clean)]), [0] * len(clean) + [1] * len(clean)
    with autocast(s), frozen(model):
        judged = dict(strip_auroc=-detectors.strip(model, both, x, seed=s.seed),
                      spikes_auroc=detectors.spike_deviation(model, both, x))
        spikes, scan = count_spikes(model, both).chunk(2), detectors.threshold_scan(model, x)
    areas = {name: round(roc_auc_score(truth, score.cpu().numpy()), 4) for name, score in judged.items()}
    return dict(areas, spikes_clean=round(spikes[0].mean().item(), 1), scan_score=round(scan["score"], 4),
                spikes_triggered=round(spikes[1].mean().item(), 1), scan_right=float(scan["accused"] == s.target))
