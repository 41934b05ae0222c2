"""Section 4 of the paper, after Table 1: Table 2 (defences) and the studies behind Figs. 2, 3, 4 and 6.

    python badsnn.py defend --dataset digits                   Table 2's rows of a data set: defend()
    python badsnn.py ablate --dataset digits --study power     one study: ablate(); STUDIES says which there are

Each function trains what it needs with badsnn.train, which reads what an earlier run has finished, and returns rows: plain
dicts, written to DATASET/defend.json or DATASET/STUDY.json and drawn by report.py.
"""
import copy
import itertools
import math
import sys
import time
from dataclasses import replace
from functools import partial

import torch
from sklearn.metrics import roc_auc_score
from tqdm.auto import tqdm

import badsnn
import defenses
import runs
import settings
import trigger
from badsnn import asr, evaluate, norms, percent, percentage, predict, simple_triggers, train, train_trigger
from data import augment, poison_indices, to_float
from lif import LIF, TAU_N, V_THR_N, count_spikes, neurons
from models import NEURONS, frozen
from runs import autocast, fingerprint, say

# ---------------------------------------------------------------------------------------------------------
# Table 2 (Sec. 4.3): every attack against every defence

DEFENSES = {"none": lambda model, x, y, **options: model,
            "fine_tune": defenses.fine_tune,
            "clp": lambda model, x, y, **options: defenses.clp(model),
            "anp": defenses.anp,
            "tsbd": defenses.tsbd,
            "nad": defenses.nad,
            "restore": lambda model, x, y, **options: defenses.restore(model)}


def defend(data, s, attacks=("badsnn", *settings.ATTACKS)):
    """Every attack against every defence, on one seed; writes defend.json. Finished cells are kept in s.runs and not run again.

    BadSNN is deployed at S_a = (v_thr_d, tau_a), the baselines at S_n; a defence sees the network as it is deployed. The defender
    holds a share of the TEST set, which is never scored: the paper's 5 %, or as much as gives 10 images per class.
    """
    if data.events:
        raise ValueError(f"defend is about images, as Table 2 is, and {s.dataset} holds events")
    if runs.rank_and_ranks()[1] > 1:
        raise ValueError("defend runs in one process; its models can be trained by several with attack")
    n = len(data.y_test)
    held = min(n // 2, max(math.ceil(0.05 * n), 10 * data.num_classes))
    order = torch.randperm(n, generator=torch.Generator().manual_seed(s.seed))
    x, y = to_float(data.x_test[order[:held]].to(s.device), s), data.y_test[order[:held]].to(s.device)
    scored = replace(data, x_test=data.x_test[order[held:]], y_test=data.y_test[order[held:]])
    clean, rows, detectors = train(data, s), [], []
    seconds = sum(epoch["seconds"] for epoch in clean.history)      # of the training and the defences, in this run or an earlier one
    for attack in attacks:
        model = train(data, s, attack)
        seconds += sum(epoch["seconds"] for epoch in model.history)
        model, triggers = deployed(attack, model, data, s)
        decides = dict(s.of("data", "network", "training", "attack", "deployment", "triggers", "defences"),
                       inputs=fingerprint(model, clean, x, y, scored.x_test, scored.y_test, list(triggers),
                                          *[t for t in triggers.values() if hasattr(t, "keywords")],
                                          runs.code_of(*CODE)))
        say(f"\n{attack}, deployed at v_thr {s.v_thr_d if attack == 'badsnn' else V_THR_N:g}; the defender has {held} of {n} test images\n"
            f"{'defense':>10} {'CA':>6} {'target_rate':>11} {'ASR':>6} {'ASR_p':>6} {'sec':>6}")

        def kept_cell(name, run):
            return runs.kept(s.runs / data.name / "cells" / f"{attack}-{name}-seed{s.seed}.json", decides, run, s.fresh, quiet=True)[0]
        for defense in DEFENSES:
            row = kept_cell(defense, lambda: defend_cell(attack, defense, model, clean, triggers, x, y, scored, s))
            undefended = row if defense == "none" else rows[-list(DEFENSES).index(defense)]
            row["destroyed"] = row["ca"] < undefended["ca"] / 2
            rows.append(row)
            seconds += row["seconds"]
            say(f"{defense:>10} {row['ca']:6.1f} {row['target_rate']:11.1f} {row['asr']:6.1f} {percent(row['asr_p'])} {row['seconds']:6.1f}"
                + "  destroyed: CA below half of the undefended" * row["destroyed"])
        for name, t in triggers.items():
            detectors.append(kept_cell(f"{name}-detectors", lambda: detect(attack, name, model, t, x, scored, s)))
            say(f"{'detectors':>10} {name}: AUROC of STRIP {detectors[-1]['strip_auroc']:.3f}, of the spike count "
                f"{detectors[-1]['spikes_auroc']:.3f} ({detectors[-1]['spikes_clean']:,.0f} spikes, triggered "
                f"{detectors[-1]['spikes_triggered']:,.0f})")
    say("\nASR: T_o's for badsnn (ASR_p: T_p's). ASR and target_rate: percent predicted as the target, with and without the trigger.")
    runs.write_json(s.results / data.name / "defend.json",
                    dict(badsnn.describe(data, s), **s.of("deployment", "baselines", "defences"), n_defender=held,
                         clean_ca=evaluate(clean, scored, s, V_THR_N, TAU_N)["ca"], rows=rows, detectors=detectors,
                         seconds=round(seconds, 1)))


def deployed(attack, model, data, s):
    """The attacked model as it is shipped, its neurons at the deployed setting, and its triggers by name, the reported one first,
    T_p last. T_p is in the better reading of Eq. 3: the attacker takes what works."""
    if attack != "badsnn":
        return model.eval(), {attack: trigger.BASELINES[attack](model, s.seed)}
    t_o, _ = train_trigger(model, data, s)
    t_p = dict(zip(("T_p", "T_p re-normalised"), simple_triggers(data, s).values()))
    best = max(t_p, key=lambda name: asr(model, data, s, s.v_thr_d, s.tau_a, t_p[name]))
    triggers = {best: t_p[best]} if t_o is None else {"T_o": t_o, best: t_p[best]}
    with neurons(model, s.v_thr_d, s.tau_a):
        return copy.deepcopy(model).eval(), triggers


def defend_cell(attack, defense, model, clean, triggers, x, y, scored, s):
    """One cell of Table 2: repairs the model with the defender's images x, y and scores it at its own neuron setting."""
    started = time.time()
    generator = torch.Generator().manual_seed(s.seed)
    shift = partial(augment, pad=s.pad, flip=s.flip, contrast=0.0, generator=generator) if s.augment else None
    tuned = dict(lr=s.defense_lr) if defense in ("fine_tune", "nad") else {}
    with torch.autocast(torch.device(s.device).type, torch.bfloat16, enabled=s.amp == "on", cache_enabled=False):   # weights change
        repaired = DEFENSES[defense](model, x, y, augment=shift, seed=s.seed, **tuned)
    v_thr, tau = (s.v_thr_d, s.tau_a) if attack == "badsnn" and defense != "restore" else (V_THR_N, TAU_N)
    rates = [asr(repaired, scored, s, None, None, t) for t in triggers.values()]
    row = dict(attack=attack, defense=defense, trigger=next(iter(triggers)), v_thr=v_thr, tau=tau,
               **evaluate(repaired, scored, s, None, None), asr=rates[0], asr_p=rates[-1] if attack == "badsnn" else None)
    if defense == "none":       # the control: the same trigger, the same setting, a model without backdoor
        row["asr_clean_model"] = asr(clean, scored, s, v_thr, tau, next(iter(triggers.values())))
    return dict(row, seconds=round(time.time() - started, 1))


def detect(attack, name, model, t, x, scored, s, most=256):
    """AUROC of both detectors for triggered against clean test images of other classes (0.5: no better than chance)."""
    clean = to_float(scored.x_test[scored.y_test != s.target][:most].to(s.device), s)
    both, truth = torch.cat([clean, t(clean)]), [0] * len(clean) + [1] * len(clean)
    with autocast(s):
        scores = dict(strip_auroc=-defenses.strip(model, both, x, seed=s.seed), spikes_auroc=defenses.spike_deviation(model, both, x))
        with frozen(model):
            spikes = count_spikes(model, both).chunk(2)
    return dict(attack=attack, trigger=name, **{key: round(roc_auc_score(truth, score.cpu().numpy()), 4) for key, score in scores.items()},
                spikes_clean=round(spikes[0].mean().item(), 1), spikes_triggered=round(spikes[1].mean().item(), 1))


# ---------------------------------------------------------------------------------------------------------
# The figures (Secs. 3.2 and 4.4), one study each

def ablate(data, s, study):
    """Runs one study and writes DATASET/STUDY.json."""
    if data.events:
        raise ValueError(f"--study {study} is about images, and {s.dataset} holds events")

    def run():
        started = time.time()
        rows = STUDIES[study](data, s)
        for row in rows:
            say("  ".join(f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()))
        return dict(badsnn.describe(data, s), **s.of("deployment"), study=study, rows=rows, seconds=round(time.time() - started, 1))
    path = s.results / data.name / f"{study}.json"
    deciders = dict(s.of(), inputs=fingerprint(data.x_train, data.y_train, data.x_test, data.y_test, runs.code_of(*CODE)))
    if runs.kept(path, deciders, run, s.fresh)[1]:
        say(f"study {study}: finished earlier, see {path}; --fresh runs it again")


def seeds_of(s):
    """The settings of every seed."""
    return [replace(s, seed=seed) for seed in range(s.seed, s.seed + s.seeds)]


def study_threshold(data, s):
    """Fig. 2: a clean model's accuracy and spikes per sample against v_thr, without and with both readings of T_p."""
    model, t_p = train(data, s), simple_triggers(data, s)
    triggers = {"none": None, "T_p": t_p["asr_p"], "T_p re-normalised": t_p["asr_p_renormalized"]}
    return [dict(v_thr=round(v_thr, 2), trigger=name, ca=percentage(predict(model, data.x_test, s, v_thr, TAU_N, t) == data.y_test),
                 spikes=spikes_per_sample(model, data.x_test, s, v_thr, TAU_N, t))
            for v_thr in torch.linspace(0.5, 1.5, 11).tolist() for name, t in triggers.items()]


@torch.no_grad()
def spikes_per_sample(model, x, s, v_thr, tau, t=None):
    """Mean number of spikes per sample, summed over T and all neurons, on up to 500 samples of x."""
    counts = []
    with neurons(model, v_thr, tau), frozen(model):
        for batch in x[:500].split(100):
            batch = to_float(batch.to(s.device), s)
            counts.append(count_spikes(model, batch if t is None else t(batch)))
    return round(torch.cat(counts).mean().item(), 1)


def study_magnitude(data, s):
    """Fig. 4b: ASR_o and the L2 norm of T_o's perturbation against the factor m on its output, at v_thr_o; clean model beside it."""
    clean, backdoored = train(data, s), train(data, s, "badsnn")
    t_o, _ = train_trigger(backdoored, data, s)
    if t_o is None:
        raise ValueError("no training image could be blended into the target, so there is no T_o to scale")
    untriggered, rows = evaluate(backdoored, data, s, s.v_thr_o, s.tau_a), []
    x = to_float(data.x_test[data.y_test != s.target].to(s.device), s)
    for m in (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0):
        t = partial(t_o, magnitude=m)
        rows.append(dict(magnitude=m, v_thr=s.v_thr_o, **untriggered, asr_o=asr(backdoored, data, s, s.v_thr_o, s.tau_a, t),
                         asr_o_clean_model=asr(clean, data, s, s.v_thr_o, s.tau_a, t), **norms(t(x) - x)))
    return rows


HEATMAP = dict(v_thr_t=(0.8, 1.2, 1.5), v_thr_a=(0.8, 0.9, 1.0, 1.05, 1.1, 1.15, 1.2, 1.3), tau_a=(0.3, 0.4, 0.5, 0.6, 0.7))


def study_heatmap(data, s):
    """Fig. 3: CA, target_rate and ASR_p over the deployed (V_a, tau_a), for models trained with a malicious threshold below, just
    above and far above the nominal one. The paper does not state its tau_t; ours is the preset's."""
    rows = []
    for v_thr_t in HEATMAP["v_thr_t"]:
        variant = replace(s, v_thr_t=v_thr_t)
        model, t = train(data, variant, "badsnn"), simple_triggers(data, s)["asr_p"]
        for v_thr, tau in tqdm(list(itertools.product(HEATMAP["v_thr_a"], HEATMAP["tau_a"])), desc=f"v_thr_t {v_thr_t}", disable=None):
            rows.append(dict(v_thr_t=v_thr_t, tau_t=s.tau_t, v_thr=v_thr, tau=tau, **evaluate(model, data, s, v_thr, tau),
                             asr_p=asr(model, data, s, v_thr, tau, t)))
    return rows


POISON_RATIOS = (0.01, 0.02, 0.03, 0.04, 0.05)


def study_poison(data, s):
    """Fig. 4a: CA, target_rate and ASR_p against the poison ratio, at v_thr_d, every seed by itself: is a jagged curve noise?"""
    rows = []
    for one, poison_ratio in itertools.product(seeds_of(s), POISON_RATIOS):
        variant = replace(one, poison_ratio=poison_ratio)
        model = train(data, variant, "badsnn")
        rows.append(dict(seed=one.seed, poison_ratio=poison_ratio,
                         n_poison=len(poison_indices(data.y_train, s.target, poison_ratio, one.seed)), v_thr=s.v_thr_d,
                         base_ca=evaluate(model, data, s, V_THR_N, TAU_N)["ca"], **evaluate(model, data, s, s.v_thr_d, s.tau_a),
                         asr_p=asr(model, data, s, s.v_thr_d, s.tau_a, simple_triggers(data, variant)["asr_p"])))
    return rows


POWERS = (1.5, 2.0, 4.0, 8.0, 16.0, 32.0)


def study_power(data, s):
    """T_p's strength q, which the paper does not give, in both readings, at v_thr_d: ASR_p of every seed and of its clean model. `read`
    is the accuracy that the clean model keeps on the triggered images at S_n: how much of them is left to see."""
    rows = []
    for one in seeds_of(s):
        clean, model = train(data, one), train(data, one, "badsnn")
        untriggered = evaluate(model, data, s, s.v_thr_d, s.tau_a)
        for q, reading in itertools.product(POWERS, ("asr_p", "asr_p_renormalized")):
            t = simple_triggers(data, replace(one, q=q))[reading]
            rows.append(dict(seed=one.seed, q=q, renormalize=reading != "asr_p", v_thr=s.v_thr_d, **untriggered,
                             asr_p=asr(model, data, s, s.v_thr_d, s.tau_a, t),
                             asr_p_clean_model=asr(clean, data, s, s.v_thr_d, s.tau_a, t),
                             read=percentage(predict(clean, data.x_test, s, V_THR_N, TAU_N, t) == data.y_test)))
    return rows


def study_trigger(data, s):
    """T_o's lambda_adv and magnitude m, chosen on held-out TRAINING images: the presets come from here. The paper gives 0.1 and no m.

    The rule: no larger than T_p in L2; of these the smallest with ASR_o >= 95 at v_thr_o, or the highest ASR_o where none gets there.
    """
    model = train(data, s, "badsnn")
    other = (data.y_train != s.target).nonzero().flatten()
    held = other[torch.randperm(len(other), generator=torch.Generator().manual_seed(s.seed))[s.n_o:s.n_o + 400]]   # after train_trigger's
    if not len(held):
        raise ValueError(f"--n-o {s.n_o} leaves no training image of another class to choose on")
    validation = replace(data, x_test=data.x_train[held], y_test=data.y_train[held])
    x, rows = to_float(validation.x_test.to(s.device), s), []
    l2_p = norms(simple_triggers(data, s)["asr_p"](x) - x)["l2"]
    for lambda_adv in (0.1, 0.3, 1.0):
        t_o, _ = train_trigger(model, data, replace(s, lambdas=(1.0, lambda_adv, 1.0)))
        if t_o is None:
            raise ValueError("no training image could be blended into the target, so there is no T_o to choose")
        for m in (0.6, 0.7, 0.8, 0.9, 1.0):
            t = partial(t_o, magnitude=m)
            rows.append(dict(lambda_adv=lambda_adv, magnitude=m, v_thr=s.v_thr_o, n=len(held), **norms(t(x) - x), l2_p=l2_p,
                             asr_o=asr(model, validation, s, s.v_thr_o, s.tau_a, t)))
    small = [row for row in rows if row["l2"] <= l2_p] or rows
    strong = [row for row in small if row["asr_o"] >= 95]
    best = min(strong, key=lambda row: row["l2"]) if strong else max(small, key=lambda row: row["asr_o"])
    return [dict(row, chosen=row is best) for row in rows]


def study_plif(data, s):
    """Fig. 6: LIF against PLIF, whose tau is learned, over the deployed thresholds; clean models of the same kind beside them."""
    rows = []
    for neuron, one in itertools.product(NEURONS, seeds_of(s)):
        variant = replace(one, neuron=neuron)
        clean, model, t = train(data, variant), train(data, variant, "badsnn"), simple_triggers(data, s)["asr_p"]
        learned = [float(torch.as_tensor(m.decay()).detach()) for m in model.modules() if isinstance(m, LIF)]
        for v_thr in s.v_thr_a:
            rows.append(dict(neuron=neuron, seed=one.seed, mean_tau=round(sum(learned) / len(learned), 3), v_thr=v_thr,
                             **evaluate(model, data, s, v_thr, s.tau_a), asr_p=asr(model, data, s, v_thr, s.tau_a, t),
                             asr_p_clean_model=asr(clean, data, s, v_thr, s.tau_a, t)))
    return rows


STUDIES = {"threshold": study_threshold, "heatmap": study_heatmap, "poison": study_poison, "magnitude": study_magnitude,
           "power": study_power, "trigger": study_trigger, "plif": study_plif}
CODE = (*badsnn.CODE, defenses, sys.modules[__name__])      # what decides the results of this file
