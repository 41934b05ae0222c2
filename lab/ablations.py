"""Section 4 of the paper, after Table 1: what stops the attack (Table 2), and the studies behind Figs. 2, 3, 4 and 6.

    python badsnn.py story                                     one attack and what stops it: story()
    python badsnn.py defend --dataset digits                   Table 2's rows of a data set: defend()
    python badsnn.py ablate --dataset digits --study power     studies, one or more: ablate(); STUDIES has them all

A study is a list of variants of the settings and a function that returns one variant's rows, plain dicts. Variants
run side by side; models that an earlier command has trained are read. report.py draws what is written here.
"""
import copy
import itertools
import sys
import time
from dataclasses import replace
from functools import partial

import torch
from sklearn.metrics import roc_auc_score

import badsnn
import baselines
import data as datasets
import defenses
import machine
import runs
import settings
import trigger
from badsnn import asr, deploy, evaluate, percentage, predict, simple_triggers, train, train_trigger
from data import augment, hold_out, poison_indices, to_float
from lif import LIF, TAU_N, V_THR_N, count_spikes, neurons
from kit.machine import autocast, say
from models import frozen
from kit.files import fingerprint


def all_of(data):
    return data.x_train, data.y_train, data.x_test, data.y_test


def split_test(data, s, per_class=10):
    """The defender's images x [N, C, H, W] in [0, 1] and labels y, so many of every class of the TEST set (or half of
    what its smallest class has), and the data without them. Raises ValueError where nothing is left to score."""
    fewest = data.y_test.bincount(minlength=data.num_classes)
    given = defenses.defender_images(data.y_test, per_class if fewest[fewest > 0].min() >= 2 * per_class else
                                     max(1, int(fewest[fewest > 0].min()) // 2), s.seed)
    rest = torch.ones(len(data.y_test), dtype=torch.bool)
    rest[given] = False
    if not (data.y_test[rest] != s.target).sum() >= 2 or not len(given):
        raise ValueError(f"{len(data.y_test)} test samples are too few to give some to the defender and score on the "
                         "others; raise --n-test")
    x = to_float(data.x_test[given].to(s.device), s)
    return x, data.y_test[given].to(s.device), replace(data, x_test=data.x_test[rest], y_test=data.y_test[rest])


# ---------------------------------------------------------------------------------------------------------
# One attack, and what stops it

def story(data, s):
    """The attack, and on its first seed three answers of a defender: the threshold set back, fine-tuning, and the
    threshold scan, which looks at the shipped model before it is used. Writes story.json and returns it."""
    started, fresh = time.time(), s.fresh
    result, _ = badsnn.attack(data, s)
    s, attacked, first = replace(s, fresh=False), time.time(), result["runs"][0]    # its models are there now

    def run():
        clean, model = train(data, s), train(data, s, "badsnn")
        x, y, scored = split_test(data, s)
        v_thr_a = first["at_chosen"]["v_thr"]
        t_o, _ = train_trigger(model, data, s, v_thr_a)
        triggers = {"asr_p": simple_triggers(data, s)["asr_p"]} | ({"asr_o": t_o} if t_o is not None else {})
        shipped = as_shipped(model, v_thr_a, s)
        answers = {"none": shipped, "restore": defenses.restore(shipped),
                   "fine_tune": defenses.fine_tune(shipped, x, y, augment=shifts(s), seed=s.seed),
                   "clean": as_shipped(clean, v_thr_a, s)}      # no answer, but the control on the same images
        rows = [dict(answer=name, **evaluate(net, scored, s, None, None),
                     **{key: asr(net, scored, s, None, None, t) for key, t in triggers.items()})
                for name, net in answers.items()]
        scan = {name: defenses.threshold_scan(net, x) for name, net in (("backdoored", shipped), ("clean", clean))}
        return dict(badsnn.describe(data, replace(s, seeds=1)), n_defender=len(y), rows=rows,
                    at_chosen=first["at_chosen"], base_ca=first["base_ca"], clean_ca=first["clean_ca"],
                    curve=first["rows"],
                    scan={name: dict(score=r["score"], accused=r["accused"]) for name, r in scan.items()})
    deciders = dict(s.of(), inputs=fingerprint(*all_of(data), result["made_from"], runs.code_of(*CODE)))
    told, _ = runs.kept(runs.folder_of(data, s) / "story.json", deciders, run, fresh)
    trained = sum(max(one["training_seconds"]) for one in result["runs"])
    phases = {"training, the longer of two side by side": trained} if trained < attacked - started else {}
    return dict(told, phases=phases | {"attack, all of it": attacked - started,     # no training: it was there before
                                       "answers of the defender": time.time() - attacked})


def as_shipped(model, v_thr_a, s):
    """A copy of the model with its neurons at the attacker's setting."""
    with neurons(model, v_thr_a, s.tau_a):
        return copy.deepcopy(model).eval()


def shifts(s, purpose="augmentation of the defender"):
    """The augmentation that a defender trains with, or None."""
    return (partial(augment, pad=s.pad, flip=s.flip, contrast=0.0, rng=runs.generator(s.seed, purpose))
            if s.augment else None)


# ---------------------------------------------------------------------------------------------------------
# Table 2 (Sec. 4.3): every attack against every defence

DEFENSES = {"none": lambda model, x, y, **options: model,
            "fine_tune": defenses.fine_tune,
            "clp": lambda model, x, y, **options: defenses.clp(model),
            "anp": defenses.anp,
            "tsbd": defenses.tsbd,
            "nad": defenses.nad,
            "restore": lambda model, x, y, **options: defenses.restore(model)}
IMAGES_ONLY = ("tsbd", "nad")       # TSBD resets convolutions, NAD compares stages: N-MNIST-Net has two of each


def defend(data, s, attacks=None):
    """Every attack (None: all that fit the data) against every defence, mean and spread over seeds; writes defend.json.
    Finished cells are kept in s.runs.

    BadSNN is deployed at its S_a (badsnn.deploy), the baselines at S_n; a defence sees the network as deployed. The
    defender holds 10 images of every class of the TEST set, which are never scored (the paper: 5 % of the set).
    """
    if machine.rank_and_ranks()[1] > 1:
        raise ValueError("defend runs in one process; its models can be trained by several with attack")
    split_test(data, s)     # refuses too small a test set before anything is trained
    attacks, variants = [a for a in settings.attacks_on(s) if a in (attacks or settings.attacks_on(s))], every_seed(s)
    badsnn.train_side_by_side(s, [(one, kind) for one in variants for kind in (None, "badsnn")
                                  if kind is None or kind in attacks])
    jobs = [(one, attack) for attack in attacks for one in variants]
    parts = machine.side_by_side(defend_attack, jobs, s, [f"{attack}, seed {one.seed}" for one, attack in jobs])
    alike = [with_one_trigger(parts[i:i + s.seeds]) for i in range(0, len(parts), s.seeds)]
    rows, detectors = ([row for of_attack in alike for row in map(over_seeds, zip(*(part[key] for part in of_attack)))]
                       for key in ("rows", "detectors"))
    untouched = {row["attack"]: row["ca"] for row in rows if row["defense"] == "none"}
    rows = [dict(row, destroyed=row["ca"] < untouched[row["attack"]] / 2) for row in rows]
    say("\nASR: T_o's for badsnn where there is one, else T_p's, on events T_s's. ASR and target_rate: percent "
        "predicted as the target, with and without the trigger.")
    clean = [without_backdoor(one) for one in variants]
    runs_of = [dict(attack=attack, seed=one.seed, **part) for (one, attack), part in zip(jobs, parts)]
    result = dict(badsnn.describe(data, s), **dict(runs.mean_of(clean), v_thr_d=rows[0]["v_thr"], rows=rows,
                  detectors=detectors, runs=runs_of, seconds=round(sum(p["seconds"] for p in [*parts, *clean]), 1)))
    runs.write_json(runs.folder_of(data, s) / "defend.json", result)
    return result


def without_backdoor(s):
    """What stands beside Table 2 for one seed: the clean model's CA on the images that are scored, and its scan."""
    data = datasets.load_for(s)
    x, y, scored = split_test(data, s)
    clean = train(data, replace(s, fresh=False))
    return dict(n_defender=len(y), clean_ca=evaluate(clean, scored, s, V_THR_N, TAU_N)["ca"],
                scan_clean_model=defenses.threshold_scan(clean, x)["score"],
                seconds=sum(row["seconds"] for row in clean.history))


def with_one_trigger(parts):
    """Of one attack's parts, a seed each, those with T_o, if any has it: no mean is of T_o's and T_p's rows."""
    names = [part["rows"][0]["trigger"] for part in parts]
    return [part for part, name in zip(parts, names) if name == ("T_o" if "T_o" in names else names[0])]


def over_seeds(rows):
    """One cell's mean over seeds, and its spread where there are several; the same for the cells inside it."""
    inside = {key: over_seeds([row[key] for row in rows]) for key, value in rows[0].items() if isinstance(value, dict)}
    return runs.mean_of(rows) | inside | (dict(spread=runs.spread_of(rows)) if len(rows) > 1 else {})


def defend_attack(s, attack):
    """Table 2's rows of one attack and seed: rows, detectors, and the seconds that training and defences took."""
    data = datasets.load_for(s)
    x, y, scored = split_test(data, s)
    trained = replace(s, fresh=False)           # defend() has just trained these two
    clean, model = train(data, trained), train(data, trained if attack == "badsnn" else s, attack)
    seconds = sum(epoch["seconds"] for epoch in model.history)
    v_thr, tau, triggers = V_THR_N, TAU_N, None
    if attack == "badsnn":
        v_thr, tau = deploy(model, data, s)[0], s.of("deployment")["tau_a"]
        t_o = None if data.events else train_trigger(model, data, s, v_thr)[0]
        triggers = {"T_o": t_o} if t_o is not None else {}
        triggers["T_s" if data.events else "T_p"] = simple_triggers(data, s)["asr_p"]
        model = as_shipped(model, v_thr, s)
    else:
        triggers = {attack: baselines.BASELINES[attack](model.eval(), s)}
    say(f"\n{attack}, deployed at v_thr {v_thr:g}; the defender has {len(y)} of {len(data.y_test)} test images\n"
        f"{'defense':>10} {'CA':>6} {'target_rate':>11} {'ASR':>6} {'ASR_p':>6} {'pruned':>6} {'sec':>6}")
    decides = dict(replace(s, seeds=1).of(), inputs=fingerprint(
        model, clean, x, y, scored.x_test, scored.y_test, list(triggers), list(triggers.values()), runs.code_of(*CODE)))

    def cell(name, run):
        path = s.runs / data.name / "cells" / f"{attack}-{name}-seed{s.seed}-{fingerprint(decides)[:8]}.json"
        return runs.kept(path, decides, run, s.fresh, quiet=True)[0]
    rows = []
    for defense in (name for name in DEFENSES if not (data.events and name in IMAGES_ONLY)):
        row = cell(defense, lambda: defend_cell(attack, defense, model, clean, triggers, x, y, scored, s, (v_thr, tau)))
        rows.append(row)
        asr_p, pruned = (f"{row[key]:6.1f}" if row[key] is not None else f"{'-':>6}" for key in ("asr_p", "pruned"))
        say(f"{defense:>10} {row['ca']:6.1f} {row['target_rate']:11.1f} {row['asr']:6.1f} {asr_p} {pruned} "
            f"{row['seconds']:6.1f}" + "  destroyed: CA below half of the undefended" * (row["ca"] < rows[0]["ca"] / 2))
    detectors = [cell(f"{name}-detectors", lambda: detect(attack, name, model, t, x, scored, s))
                 for name, t in triggers.items()]
    for d in detectors:
        say(f"{'detectors':>10} {d['trigger']}: AUROC of STRIP {d['strip_auroc']:.3f}, of the spike count "
            f"{d['spikes_auroc']:.3f} ({d['spikes_clean']:,.0f} spikes, triggered {d['spikes_triggered']:,.0f}); "
            f"the threshold scan scores {d['scan_score']:.2f} for {'the' if d['scan_right'] else 'not the'} target")
    return dict(rows=rows, detectors=detectors, seconds=seconds + sum(row["seconds"] for row in rows))


def defend_cell(attack, defense, model, clean, triggers, x, y, scored, s, deployed_at):
    """One cell of Table 2: repairs the model with the defender's images x, y and scores it at its own setting."""
    def repair(net):
        with autocast(s, cache_enabled=False):      # the weights change
            return DEFENSES[defense](net, x, y, augment=shifts(s, f"augmentation of {defense}"), seed=s.seed)

    def scores(net):
        return dict(evaluate(net, scored, s, None, None),
                    asr=asr(net, scored, s, None, None, next(iter(triggers.values()))))
    started, repaired = time.time(), repair(model)
    v_thr, tau = (V_THR_N, TAU_N) if defense == "restore" else deployed_at
    rates = [asr(repaired, scored, s, None, None, t) for t in triggers.values()]
    row = dict(attack=attack, defense=defense, trigger=next(iter(triggers)), v_thr=v_thr, tau=tau,
               **evaluate(repaired, scored, s, None, None), asr=rates[0],
               asr_p=rates[-1] if attack == "badsnn" else None,
               pruned=float(defenses.pruned_channels(model, repaired)) if defense in ("clp", "anp") else None)
    if attack == "badsnn":      # the defender who also sets the threshold back; a clean model shipped, repaired alike
        row.update(restored=scores(defenses.restore(repaired)),
                   clean_model=scores(repair(as_shipped(clean, deployed_at[0], s))))
    if defense == "none":       # the control: the same trigger, the same setting, a model without backdoor
        row["asr_clean_model"] = (row["clean_model"]["asr"] if attack == "badsnn" else
                                  asr(clean, scored, s, v_thr, tau, next(iter(triggers.values()))))
    return dict(row, seconds=round(time.time() - started, 1))


def detect(attack, name, model, t, x, scored, s, most=256):
    """AUROC of two detectors for triggered against clean test images of other classes (0.5: no better than chance), and
    what the threshold scan, which sees no trigger, says of the model."""
    clean = to_float(scored.x_test[scored.y_test != s.target][:most].to(s.device), s)
    both, truth = torch.cat([clean, t(clean)]), [0] * len(clean) + [1] * len(clean)
    with autocast(s):
        scores = dict(strip_auroc=-defenses.strip(model, both, x, seed=s.seed),
                      spikes_auroc=defenses.spike_deviation(model, both, x))
        with frozen(model):
            spikes = count_spikes(model, both).chunk(2)
        scan = defenses.threshold_scan(model, x)
    return dict(attack=attack, trigger=name, scan_score=round(scan["score"], 4),
                scan_right=float(scan["accused"] == s.target),
                **{key: round(roc_auc_score(truth, v.cpu().numpy()), 4) for key, v in scores.items()},
                spikes_clean=round(spikes[0].mean().item(), 1), spikes_triggered=round(spikes[1].mean().item(), 1))


# ---------------------------------------------------------------------------------------------------------
# The figures (Secs. 3.2 and 4.4), one study each

def ablate(data, s, studies):
    """Runs studies, the variants of all of them side by side, and writes DATASET/STUDY.json for each."""
    variants = {study: STUDIES[study][0](s) for study in studies}
    deciders = {study: dict(s.of(), variants=[one.of() for one in variants[study]],
                            inputs=fingerprint(*all_of(data), runs.code_of(*CODE))) for study in studies}
    paths = {study: runs.folder_of(data, s) / f"{study}.json" for study in studies}
    wanted = [study for study in studies if s.fresh or not runs.earlier(paths[study], deciders[study])]
    for study in (study for study in studies if study not in wanted):
        say(f"study {study}: finished earlier, see {paths[study]}; --fresh runs it again")
    jobs = [(study, one) for study in wanted for one in variants[study]]
    models = [fingerprint(one.of("network", "training", "attack"), one.frames) for _, one in jobs]
    shared = {model: one for model, (_, one) in zip(models, jobs) if models.count(model) > 1}
    # first what several variants need, or two processes would train the same model at the same time
    badsnn.train_side_by_side(s, [(one, kind) for one in shared.values() for kind in (None, "badsnn")])
    jobs = [(study, replace(one, fresh=s.fresh and model not in shared)) for (study, one), model in zip(jobs, models)]
    names = [", ".join([study, *(f"{key} {v}" for key, v in one.of().items() if v != s.of()[key])])
             for study, one in jobs]
    parts = machine.side_by_side(study_rows, jobs, s, names)
    for study in wanted:
        mine = [part for (name, _), part in zip(jobs, parts) if name == study]
        rows = [row for rows, _ in mine for row in rows]
        for row in rows:
            say("  ".join(f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}"
                          for key, value in row.items()))
        runs.kept(paths[study], deciders[study], lambda: dict(
            badsnn.describe(data, s), study=study, rows=rows,
            seconds=round(sum(seconds for _, seconds in mine), 1)), fresh=True)


def study_rows(study, s):
    """The rows of one variant, and the seconds that it took."""
    started = time.time()
    return STUDIES[study][1](datasets.load_for(s), s), time.time() - started


def every_seed(s):
    """The settings of every seed."""
    return [replace(s, seed=seed) for seed in range(s.seed, s.seed + s.seeds)]


def threshold(data, s):
    """Fig. 2: a clean model's accuracy and spikes per sample against v_thr, without and with both readings of T_p."""
    model, t_p = train(data, s), simple_triggers(data, s)
    triggers = {"none": None, "T_p": t_p["asr_p"], "T_p re-normalised": t_p["asr_p_renormalized"]}
    return [dict(v_thr=round(v, 2), trigger=name,
                 ca=percentage(predict(model, data.x_test, s, v, TAU_N, t) == data.y_test),
                 spikes=spikes_per_sample(model, data.x_test, s, v, TAU_N, t))
            for v in torch.linspace(0.5, 1.5, 11).tolist() for name, t in triggers.items()]


@torch.no_grad()
def spikes_per_sample(model, x, s, v_thr, tau, t=None):
    """Mean number of spikes per sample, summed over T and all neurons, on up to 500 samples of x."""
    counts = []
    with neurons(model, v_thr, tau), frozen(model):
        for batch in x[:500].split(100):
            batch = to_float(batch.to(s.device), s)
            counts.append(count_spikes(model, batch if t is None else t(batch)))
    return round(torch.cat(counts).mean().item(), 1)


HEATMAP = dict(v_thr_t=(0.8, 1.2, 1.5), v_thr_a=(0.8, 0.9, 1.0, 1.05, 1.1, 1.15, 1.2, 1.3),
               tau_a=(0.3, 0.4, 0.5, 0.6, 0.7))


def malicious_thresholds(s):
    return [replace(s, v_thr_t=v, v_thr_t_low=None) for v in HEATMAP["v_thr_t"]]


def heatmap(data, s):
    """Fig. 3: CA, target_rate and ASR_p over the deployed (V_a, tau_a), for models trained with one malicious
    threshold below, just above or far above the nominal one. The paper does not state its tau_t; ours is
    the preset's."""
    model, t = train(data, s, "badsnn"), simple_triggers(data, s)["asr_p"]
    return [dict(v_thr_t=s.v_thr_t, tau_t=s.tau_t, v_thr=v, tau=tau, **evaluate(model, data, s, v, tau),
                 asr_p=asr(model, data, s, v, tau, t))
            for v, tau in itertools.product(HEATMAP["v_thr_a"], HEATMAP["tau_a"])]


POISON_RATIOS = (0.02, 0.05, 0.1, 0.25, 0.5)


def poison_ratios(s):
    return [replace(one, poison_ratio=ratio, n_poison=None) for one in every_seed(s) for ratio in POISON_RATIOS]


def poison(data, s):
    """Fig. 4a: CA, target_rate and ASR_p against the poison ratio, every seed at its own V_a: is a bend noise?"""
    model, labels = train(data, s, "badsnn"), hold_out(data, s.hold_out)[0].y_train
    v_thr = deploy(model, data, s)[0]
    return [dict(seed=s.seed, poison_ratio=s.poison_ratio,
                 n_poison=len(poison_indices(labels, s.target, s.poison_ratio, s.seed)),
                 v_thr=v_thr, base_ca=evaluate(model, data, s, V_THR_N, TAU_N)["ca"],
                 **evaluate(model, data, s, v_thr, s.tau_a),
                 asr_p=asr(model, data, s, v_thr, s.tau_a, simple_triggers(data, s)["asr_p"]))]


POWERS = (1.5, 2.0, 4.0, 8.0, 16.0, 32.0)


def power(data, s):
    """T_p's strength q, which the paper does not give, in both readings, at the model's V_a: ASR_p and that of its
    clean model. `read` is the accuracy that the clean model keeps on the triggered images at S_n: how much of them
    is left to see."""
    clean, model, rows = train(data, s), train(data, s, "badsnn"), []
    v_thr = deploy(model, data, s)[0]
    untriggered = evaluate(model, data, s, v_thr, s.tau_a)
    for q, reading in itertools.product(POWERS, ("asr_p", "asr_p_renormalized")):
        t = simple_triggers(data, replace(s, q=q))[reading]
        rows.append(dict(seed=s.seed, q=q, renormalize=reading != "asr_p", v_thr=v_thr, **untriggered,
                         asr_p=asr(model, data, s, v_thr, s.tau_a, t),
                         asr_p_clean_model=asr(clean, data, s, v_thr, s.tau_a, t),
                         read=percentage(predict(clean, data.x_test, s, V_THR_N, TAU_N, t) == data.y_test)))
    return rows


def some_trigger(model, data, s):
    v_thr = deploy(model, data, s)[0]
    t_o, _ = train_trigger(model, data, s, v_thr)
    if t_o is None:
        raise ValueError("no training image could be blended into the target, so there is no T_o to study")
    return v_thr, t_o


def magnitude(data, s):
    """Fig. 4b: ASR_o and the L2 norm of T_o's perturbation against the factor m on its output, the clean model beside
    it; and the mean L2 norm with which DeepFool reaches the target, over those of 100 images where it does."""
    clean, model = train(data, s), train(data, s, "badsnn")
    v_thr, t_o = some_trigger(model, data, s)
    untriggered, x = evaluate(model, data, s, v_thr, s.tau_a), data.x_test[data.y_test != s.target].to(s.device)
    rows, nearest = [], {}
    for key, net in (("l2_deepfool", model), ("l2_deepfool_clean_model", clean)):
        with neurons(net, v_thr, s.tau_a):
            delta, found = trigger.deepfool(net, to_float(x[:100], s), target=s.target, with_success=True)
        nearest[key] = round(delta[found].flatten(1).norm(dim=1).mean().item(), 2) if found.any() else None
    for m in (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0):
        t = partial(t_o, magnitude=m)
        rows.append(dict(magnitude=m, v_thr=v_thr, **untriggered, **nearest,
                         asr_o=asr(model, data, s, v_thr, s.tau_a, t),
                         asr_o_clean_model=asr(clean, data, s, v_thr, s.tau_a, t), **trigger.sizes(t, x)))
    return rows


def trigger_presets(s):
    return [replace(s, lambdas=(1.0, adversarial, 1.0), budget=budget, nominal_weight=nominal)
            for adversarial, budget, nominal in ((0.1, None, 0.0), (1.0, None, 0.0), (1.0, 0.1, 0.0), (1.0, 0.1, 0.3))]


def trigger_choice(data, s):
    """T_o's weights, budget and magnitude m, on held-out TRAINING images: the presets come from here."""
    clean, model, held = train(data, s), train(data, s, "badsnn"), hold_out(data, s.hold_out)[1]
    v_thr, t_o = some_trigger(model, data, s)
    x = held.x_test[held.y_test != s.target].to(s.device)
    l2_p = trigger.sizes(simple_triggers(data, s)["asr_p"], x)["l2"]
    return [dict(lambda_adv=s.lambdas[1], budget=s.budget, nominal_weight=s.nominal_weight, magnitude=m, v_thr=v_thr,
                 n=len(x), l2_p=l2_p,
                 **trigger.sizes(t, x), asr_o=asr(model, held, s, v_thr, s.tau_a, t),
                 asr_o_clean_model=asr(clean, held, s, v_thr, s.tau_a, t))
            for m in (0.5, 0.6, 0.7, 0.8, 0.9, 1.0) for t in [partial(t_o, magnitude=m)]]


def both_neurons(s):
    return [replace(one, neuron=neuron) for neuron in ("lif", "plif") for one in every_seed(s)]


def plif(data, s):
    """Fig. 6: LIF against PLIF, whose tau is learned, over the deployed thresholds; clean models of the same kind
    beside them."""
    clean, model, t = train(data, s), train(data, s, "badsnn"), simple_triggers(data, s)["asr_p"]
    learned = [float(torch.as_tensor(m.decay()).detach()) for m in model.modules() if isinstance(m, LIF)]
    return [dict(neuron=s.neuron, seed=s.seed, mean_tau=round(sum(learned) / len(learned), 3), v_thr=v,
                 **evaluate(model, data, s, v, s.tau_a), asr_p=asr(model, data, s, v, s.tau_a, t),
                 asr_p_clean_model=asr(clean, data, s, v, s.tau_a, t)) for v in s.v_thr_a]


RECIPES = {"older: batch 128, loss of the mean, T = 4":
           dict(batch_size=128, loss="ce", label_smoothing=0.0, growing_T=(0, 0)),
           "ours: TET loss, batch 64, T = 1, 2, 4": {}, "ours without shifts": dict(pad=0),
           "ours without shifts, few steps for longer": dict(pad=0, growing_T=(0.8, 1))}


def recipes(s):
    """An older training recipe, ours, and ours for short trainings, with the same number of epochs."""
    for name in RECIPES["older: batch 128, loss of the mean, T = 4"] | {"pad": 0}:
        if getattr(s, name) != getattr(settings.preset(s.dataset), name):
            raise ValueError(f"recipe sets {settings.flag(name)} itself; leave it out")
    return list(dict.fromkeys(replace(s, **change) for change in RECIPES.values()))     # cifar100 has no shifts


def recipe(data, s):
    """Time to accuracy of a clean model: CA on held-out training images after every epoch, against the minutes of
    training so far, on one core or what the machine gives."""
    name = max((n for n in RECIPES if replace(s, **RECIPES[n]) == s), key=lambda n: len(RECIPES[n]))
    history = train(data, s).history
    minutes = itertools.accumulate(epoch["seconds"] / 60 for epoch in history)
    return [dict(recipe=name, seed=s.seed, epoch=epoch["epoch"], T=epoch["T"], minutes=round(m, 3), ca=epoch["ca"])
            for epoch, m in zip(history, minutes)]


def event_variants(s):
    """Every seed as the preset has it, with binary frames, and with the surrogate of N-MNIST-Net's source (its reset,
    through which no gradient flows, is left out); and, where T can be chosen, one seed with 10 steps."""
    variants = [replace(one, **change) for change in ({}, dict(frames="binary"), dict(neuron="lif_atan"))
                for one in every_seed(s)] + [replace(s, T=10)] * (s.dataset in datasets.EVENT_SETS)
    return list(dict.fromkeys(variants))


def events(data, s):
    """T_s fairly: BadSNN with the beta of the paper and others, and with a trigger that adds events (Remark 1), at the
    model's own V_a, at the paper's least and greatest; the clean model under the same trigger beside it, and on the
    preset the attacks that poison. `silent` is the share of triggered samples on which the network answers nothing."""
    clean, rows, other = train(data, s), [], data.y_test != s.target
    clean_ca = evaluate(clean, data, s, V_THR_N, TAU_N)["ca"]
    per_step = [round(n / s.T) for n in (400, 1200, 4000)]
    added = {f"{n * s.T} events": partial(trigger.seeded_event_trigger, n=n, seed=s.seed) for n in per_step}
    t_s = {f"beta {beta:g}": partial(trigger.seeded_spike_trigger, beta=beta, seed=s.seed)
           for beta in (0.0, 0.03, 0.1, 0.3)}

    def add(attack, model, v_thr, tau, triggers):
        untriggered = dict(evaluate(model, data, s, v_thr, tau), clean_ca=clean_ca)
        for name, t in triggers.items():
            guess = predict(model, data.x_test[other], s, v_thr, tau, t)
            rows.append(dict(seed=s.seed, frames=s.frames, T=s.T, neuron=s.neuron, attack=attack, trigger=name,
                             v_thr=v_thr, **untriggered, asr=percentage(guess == s.target),
                             silent=percentage(guess == -1), asr_clean_model=asr(clean, data, s, v_thr, tau, t)))
    if (s.frames, s.T, s.neuron) == ("counts", 4, "lif"):
        for name in settings.EVENT_ATTACKS:
            model = train(data, s, name)
            add(name, model, V_THR_N, TAU_N, {name: baselines.BASELINES[name](model, s)})
    model = train(data, s, "badsnn")
    own = deploy(model, data, s)[0]
    for attack, v_thr in (("badsnn, own V_a", own), ("badsnn, V_a 1.1", 1.1), ("badsnn, V_a 1.2", 1.2)):
        add(attack, model, v_thr, s.tau_a, t_s | added)
    return rows


STUDIES = {"threshold": (lambda s: [s], threshold), "heatmap": (malicious_thresholds, heatmap),
           "poison": (poison_ratios, poison), "magnitude": (lambda s: [s], magnitude), "power": (every_seed, power),
           "trigger": (trigger_presets, trigger_choice), "plif": (both_neurons, plif),
           "events": (event_variants, events), "recipe": (recipes, recipe)}
CODE = (*badsnn.CODE, defenses, sys.modules[__name__])      # what decides the results of this file
