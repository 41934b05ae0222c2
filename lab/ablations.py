"""The studies behind Figs. 2, 3, 4 and 6 (Secs. 3.2 and 4.4), and two of our own: T_p's strength, and events.

A study is two functions: its variants, a list of settings, which refuses what it is not made for (ValueError); and the
rows of one variant, plain dicts. Variants of all studies run side by side. lab/report.py draws them.
"""
import itertools
from dataclasses import replace
from functools import partial

import torch

import badsnn
import trigger
from badsnn import asr, deploy, evaluate, every_seed, percentage, predict, simple_triggers, train, train_trigger
from data import hold_out, load_for, poison_indices, to_float
from kit.files import fingerprint
from kit.machine import say, side_by_side
from kit.sources import EVENT_SETS, need
from kit.training import generator
from lab import baselines
from lif import LIF, TAU_N, V_THR_N, count_spikes, neurons
from models import frozen

HEATMAP = dict(v_thr_t=(0.8, 1.2, 1.5), v_thr_a=(0.8, 0.9, 1.0, 1.05, 1.1, 1.15, 1.2, 1.3),
               tau_a=(0.3, 0.4, 0.5, 0.6, 0.7))
POISON_RATIOS = (0.02, 0.05, 0.1, 0.25, 0.5)
MAGNITUDES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
POWERS = (1.0, 1.5, 2.0, 4.0, 8.0, 16.0, 32.0)


def ablate(data, s, studies):
    """{study: dict(study, rows)} for names of STUDIES. Raises ValueError before anything is trained where a study is
    not made for these data or settings."""
    for study in studies:
        need(data.events == (study == "events"), f"{study} does not fit {data.name}: only events is about events")
    jobs = trained_first(s, [(study, one) for study in studies for one in STUDIES[study][0](s)])
    parts = side_by_side(study_rows, jobs, s)
    results = {}
    for study in studies:
        rows = [row for (name, _), part in zip(jobs, parts) if name == study for row in part]
        results[study] = dict(study=study, rows=rows)
        for row in rows:
            say("  ".join(f"{key} {value}" for key, value in row.items()))
    return results


def trained_first(s, jobs):
    """The jobs (study, settings), after the models that several of them need were trained: or two processes would."""
    models = [fingerprint(one.of("network", "training", "attack")) for _, one in jobs]
    shared = {model: one for model, (_, one) in zip(models, jobs) if models.count(model) > 1}
    badsnn.train_side_by_side(s, [(one, kind) for one in shared.values() for kind in (None, "badsnn")])
    return [(study, replace(one, fresh=s.fresh and model not in shared)) for (study, one), model in zip(jobs, models)]


def study_rows(study, s):
    return STUDIES[study][1](load_for(s), s)


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


def malicious_thresholds(s):
    need(s.neuron != "plif", "heatmap sets tau, which a PLIF learns; leave out --neuron plif")
    return [replace(s, v_thr_t=v, v_thr_t_low=None) for v in HEATMAP["v_thr_t"]]


def heatmap(data, s):
    """Fig. 3: CA, target_rate and ASR_p over the deployed (V_a, tau_a), for models trained with one malicious threshold
    below, just above or far above the nominal one. The paper does not state its tau_t; ours is the preset's."""
    model, t = train(data, s, "badsnn"), simple_triggers(data, s)["asr_p"]
    return [dict(v_thr_t=s.v_thr_t, tau_t=s.tau_t, v_thr=v, tau=tau, **evaluate(model, data, s, v, tau),
                 asr_p=asr(model, data, s, v, tau, t))
            for v, tau in itertools.product(HEATMAP["v_thr_a"], HEATMAP["tau_a"])]


def poison_ratios(s):
    return [replace(one, poison_ratio=ratio) for one in every_seed(s) for ratio in POISON_RATIOS]


def poison(data, s):
    """Fig. 4a: CA, target_rate and ASR_p against the poison ratio, every seed at its own V_a: is a bend noise?"""
    model, labels = train(data, s, "badsnn"), hold_out(data)[0].y_train
    n_poison = len(poison_indices(labels, s.target, s.poison_ratio, s.seed))
    v_thr, base_ca = deploy(model, data, s)[0], evaluate(model, data, s, V_THR_N, TAU_N)["ca"]
    return [dict(seed=s.seed, poison_ratio=s.poison_ratio, n_poison=n_poison, v_thr=v_thr, base_ca=base_ca,
                 **evaluate(model, data, s, v_thr, s.tau_a, {"asr_p": simple_triggers(data, s)["asr_p"]}))]


def magnitude(data, s):
    """Fig. 4b: ASR_o and the L2 norm of T_o's perturbation against the factor m on its output, the clean model beside
    it; and the mean L2 norm with which DeepFool takes images to the target, over those of 100 with which it does."""
    clean, model = train(data, s), train(data, s, "badsnn")
    v_thr = deploy(model, data, s)[0]
    t_o = train_trigger(model, data, s, v_thr)[0]
    need(t_o, "no training image could be blended into the target, so there is no T_o to study")
    x, same = data.x_test[data.y_test != s.target].to(s.device), evaluate(model, data, s, v_thr, s.tau_a)
    for key, net in (("l2_deepfool", model), ("l2_deepfool_clean_model", clean)):
        with neurons(net, v_thr, s.tau_a):
            norms = trigger.deepfool(net, to_float(x[:100], s), target=s.target).flatten(1).norm(dim=1)
        same[key] = round(norms[norms > 0].mean().item(), 2) if norms.any() else None
    rows = []
    for m in MAGNITUDES:
        t = partial(t_o, magnitude=m)
        rows.append(dict(magnitude=m, v_thr=v_thr, **same, asr_o=asr(model, data, s, v_thr, s.tau_a, t),
                         asr_o_clean_model=asr(clean, data, s, v_thr, s.tau_a, t), **trigger.sizes(t, x)))
    return rows


def power(data, s):
    """T_p's strength q, which the paper does not give, in both readings, at the model's V_a; q = 1 is the loss of
    contrast alone. `read`: the accuracy that the clean model keeps at S_n, how much of an image is left to see."""
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


def both_neurons(s):
    need(s.neuron == "lif", "plif compares neurons; leave out --neuron")
    return [replace(one, neuron=neuron) for neuron in ("lif", "plif") for one in every_seed(s)]


def plif(data, s):
    """Fig. 6: LIF against PLIF, whose tau is learned, over the deployed thresholds, beside clean models alike."""
    clean, model, t = train(data, s), train(data, s, "badsnn"), simple_triggers(data, s)["asr_p"]
    learned = [float(torch.as_tensor(m.decay()).detach()) for m in model.modules() if isinstance(m, LIF)]
    return [dict(neuron=s.neuron, seed=s.seed, mean_tau=round(sum(learned) / len(learned), 3), v_thr=v,
                 **evaluate(model, data, s, v, s.tau_a), asr_p=asr(model, data, s, v, s.tau_a, t),
                 asr_p_clean_model=asr(clean, data, s, v, s.tau_a, t)) for v in s.v_thr_a]


def event_trigger(frames, n, seed=0):
    """What Remark 1 (Sec. 3.2) says in words: a trigger that raises the activity. Adds n single events per step, in
    pixels and polarities that the seed and the frames decide. Event frames [B, T, 2, H, W] -> the same, not clipped."""
    rng = generator(seed, "added events", fingerprint(frames))
    places = torch.randint(frames[0, 0].numel(), (*frames.shape[:2], n), generator=rng).to(frames.device)
    added = trigger.floats(frames).new_ones(places.shape)
    return frames.flatten(2).scatter_add(2, places, added).view_as(frames)


def event_variants(s):
    """Every seed as the preset has it, with binary frames, and with the surrogate of N-MNIST-Net's source (its reset,
    through which no gradient flows, is left out); and, where T can be chosen, one seed with 10 steps."""
    need(s.neuron == "lif", "events compares neurons; leave out --neuron")
    variants = [replace(one, **change) for change in ({}, dict(frames="binary"), dict(neuron="lif_atan"))
                for one in every_seed(s)]
    if s.dataset in EVENT_SETS:
        variants.append(replace(s, T=10))
    return list(dict.fromkeys(variants))


def events(data, s):
    """T_s fairly: BadSNN with the beta of the paper and others, and with a trigger that adds events, at the model's own
    V_a, at the paper's least and greatest; on the preset also the attacks that poison."""
    clean, model = train(data, s), train(data, s, "badsnn")
    triggers = {f"beta {beta:g}": partial(trigger.seeded_spike_trigger, beta=beta, seed=s.seed)
                for beta in (0.0, 0.03, 0.1, 0.3)}
    for per_step in [round(n / s.T) for n in (400, 1200, 4000)]:
        triggers[f"{per_step * s.T} events"] = partial(event_trigger, n=per_step, seed=s.seed)
    rows, own = [], deploy(model, data, s)[0]
    if (s.frames, s.T, s.neuron) == ("counts", 4, "lif"):
        for name in baselines.EVENT_ATTACKS:
            poisoned, t = baselines.train(data, s, name), baselines.trigger_of(name, data, s)
            rows += event_rows(name, poisoned, clean, data, replace(s, tau_a=TAU_N), V_THR_N, {name: t})
    for attack, v_thr in (("badsnn, own V_a", own), ("badsnn, V_a 1.1", 1.1), ("badsnn, V_a 1.2", 1.2)):
        rows += event_rows(attack, model, clean, data, s, v_thr, triggers)
    return rows


def event_rows(attack, model, clean, data, s, v_thr, triggers):
    """A row per trigger: ASR, the clean model's under the same trigger, and the share of triggered samples on which the
    network answers nothing, `silent`; in percent."""
    x, rows = data.x_test[data.y_test != s.target], []
    same = dict(seed=s.seed, frames=s.frames, T=s.T, neuron=s.neuron, attack=attack, v_thr=v_thr,
                **evaluate(model, data, s, v_thr, s.tau_a), clean_ca=evaluate(clean, data, s, V_THR_N, TAU_N)["ca"])
    for name, t in triggers.items():
        guess = predict(model, x, s, v_thr, s.tau_a, t)
        rows.append(dict(same, trigger=name, asr=percentage(guess == s.target), silent=percentage(guess == -1),
                         asr_clean_model=asr(clean, data, s, v_thr, s.tau_a, t)))
    return rows


STUDIES = {"threshold": (lambda s: [s], threshold), "heatmap": (malicious_thresholds, heatmap),
           "poison": (poison_ratios, poison), "magnitude": (lambda s: [s], magnitude), "power": (every_seed, power),
           "plif": (both_neurons, plif), "events": (event_variants, events)}
