"""The studies behind Figs. 2, 3, 4 and 6 (Secs. 3.2 and 4.4), and two of our own: T_p's strength, and events."""
import itertools
from dataclasses import replace
from functools import partial

import torch

import trigger
from badsnn import asr, deploy, evaluate, every_seed, percentage, predict, simple_triggers, train, train_trigger
from data import hold_out, load_for, poison_indices, to_float
from kit.files import fingerprint
from kit.machine import say, side_by_side
from kit.sources import EVENT_SETS, need
from kit.training import generator
from lif import LIF, TAU_N, count_spikes, neurons

HEATMAP = dict(v_thr_t=(0.8, 1.2, 1.5), v_thr_a=(0.8, 0.9, 1.0, 1.05, 1.1, 1.15, 1.2, 1.3),
               tau_a=(0.3, 0.4, 0.5, 0.6, 0.7))
POISON_RATIOS = (0.02, 0.05, 0.1, 0.25, 0.5)
MAGNITUDES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
POWERS = (1.0, 1.5, 2.0, 4.0, 8.0, 16.0, 32.0)


def ablate(data, s, study):
    """What STUDY.json holds, a dict. Raises ValueError before anything is trained where a study is not made for these
    data or settings. Variants run side by side: no two of them may train the same model."""
    need(data.events == (study == "events"), f"{study} does not fit {data.name}: only events is about events")
    jobs = [(study, one) for one in variants(study, s)]
    rows = [row for part in side_by_side(study_rows, jobs, s) for row in part]
    for row in rows:
        say("  ".join(f"{key} {value}" for key, value in row.items()))
    return dict(study=study, rows=rows)


def study_rows(study, s):
    return STUDIES[study](load_for(s), s)


def variants(study, s):
    """The settings of a study's networks. Raises ValueError for settings that it is not made for."""
    need(s.neuron == "lif" or study not in ("plif", "events"), f"{study} compares neurons; leave out --neuron")
    need(s.neuron != "plif" or study != "heatmap", "heatmap sets tau, which a PLIF learns; leave out --neuron plif")
    changes = dict(heatmap=[dict(v_thr_t=v, v_thr_t_low=None) for v in HEATMAP["v_thr_t"]],
                   poison=[dict(poison_ratio=ratio) for ratio in POISON_RATIOS],
                   plif=[dict(neuron="lif"), dict(neuron="plif")],
                   events=[dict(), dict(frames="binary")])
    seeds = every_seed(s) if study in ("poison", "power", "plif", "events") else [s]
    found = [replace(one, **change) for change in changes.get(study, [{}]) for one in seeds]
    if study == "events" and s.dataset in EVENT_SETS:
        found.append(replace(s, T=10))
    return list(dict.fromkeys(found))


def threshold(data, s):
    """Fig. 2: a clean model's accuracy and spikes per sample (of 500) against v_thr, for both readings of T_p."""
    model, t_p, rows = train(data, s), simple_triggers(data, s), []
    triggers = {"none": lambda x: x, "T_p": t_p["asr_p"], "T_p re-normalised": t_p["asr_p_renormalized"]}
    x = to_float(data.x_test[:500].to(s.device), s)
    for v, (name, t) in itertools.product(torch.linspace(0.5, 1.5, 11).tolist(), triggers.items()):
        with neurons(model, v, TAU_N):
            spikes = torch.cat([count_spikes(model, t(images)) for images in x.split(100)])
        rows.append(dict(v_thr=round(v, 2), trigger=name, spikes=round(spikes.mean().item(), 1),
                         ca=percentage(predict(model, data.x_test, s, v, TAU_N, t) == data.y_test)))
    return rows


def heatmap(data, s):
    """Fig. 3: over the deployed (V_a, tau_a), of a model trained with one malicious threshold."""
    model, t = train(data, s, "badsnn"), simple_triggers(data, s)["asr_p"]
    return [dict(v_thr_t=s.v_thr_t, tau_t=s.tau_t, v_thr=v, tau=tau, **evaluate(model, data, s, v, tau),
                 asr_p=asr(model, data, s, v, tau, t))
            for v, tau in itertools.product(HEATMAP["v_thr_a"], HEATMAP["tau_a"])]


def poison(data, s):
    """Fig. 4a: CA, target_rate and ASR_p against the poison ratio, every seed at its own V_a: is a bend noise?"""
    model, labels = train(data, s, "badsnn"), hold_out(data)[0].y_train
    n_poison = len(poison_indices(labels, s.target, s.poison_ratio, s.seed))
    v_thr, t = deploy(model, data, s)[0], {"asr_p": simple_triggers(data, s)["asr_p"]}
    return [dict(seed=s.seed, poison_ratio=s.poison_ratio, n_poison=n_poison, v_thr=v_thr,
                 **evaluate(model, data, s, v_thr, s.tau_a, t))]


def magnitude(data, s):
    """Fig. 4b: ASR_o and the L2 norm of T_o's perturbation against the factor m on its output, the clean model beside
    it; and the mean L2 norm with which DeepFool takes images to the target, over those of 100 with which it does."""
    clean, model = train(data, s), train(data, s, "badsnn")
    v_thr = deploy(model, data, s)[0]
    at = data, s, v_thr, s.tau_a
    t_o = train_trigger(model, data, s, v_thr)[0]
    need(t_o, "no training image could be blended into the target, so there is no T_o to study")
    x, same, rows = data.x_test[data.y_test != s.target].to(s.device), evaluate(model, *at), []
    for key, net in (("l2_deepfool", model), ("l2_deepfool_clean_model", clean)):
        with neurons(net, v_thr, s.tau_a):
            norms = trigger.deepfool(net, to_float(x[:100], s), target=s.target).flatten(1).norm(dim=1)
        same[key] = round(norms[norms > 0].mean().item(), 2) if norms.any() else None
    for m in MAGNITUDES:
        t = partial(t_o, magnitude=m)
        rows.append(dict(magnitude=m, v_thr=v_thr, **same, **trigger.sizes(t, x), asr_o=asr(model, *at, t),
                         asr_o_clean_model=asr(clean, *at, t)))
    return rows


def power(data, s):
    """T_p's strength q in both readings, at the model's V_a. `read`: the accuracy that the clean model keeps at S_n."""
    clean, model, rows = train(data, s), train(data, s, "badsnn"), []
    v_thr = deploy(model, data, s)[0]
    at = data, s, v_thr, s.tau_a
    untriggered = evaluate(model, *at)
    for q, reading in itertools.product(POWERS, ("asr_p", "asr_p_renormalized")):
        t = simple_triggers(data, replace(s, q=q))[reading]
        rows.append(dict(seed=s.seed, q=q, renormalize=reading != "asr_p", v_thr=v_thr, **untriggered,
                         asr_p=asr(model, *at, t), asr_p_clean_model=asr(clean, *at, t),
                         read=percentage(predict(clean, data.x_test, s, s.v_thr_n, TAU_N, t) == data.y_test)))
    return rows


def plif(data, s):
    """Fig. 6: LIF against PLIF, whose tau is learned, over the deployed thresholds, beside clean models alike."""
    clean, model, t = train(data, s), train(data, s, "badsnn"), simple_triggers(data, s)["asr_p"]
    learned = [float(torch.as_tensor(m.decay()).detach()) for m in model.modules() if isinstance(m, LIF)]
    return [dict(neuron=s.neuron, seed=s.seed, mean_tau=round(sum(learned) / len(learned), 3), v_thr=v,
                 **evaluate(model, data, s, v, s.tau_a), asr_p=asr(model, data, s, v, s.tau_a, t),
                 asr_p_clean_model=asr(clean, data, s, v, s.tau_a, t)) for v in s.v_thr_a]


def event_trigger(frames, n, seed=0):
    """Remark 1 (Sec. 3.2): frames [B, T, 2, H, W] with n single events more in every step, at random places."""
    rng = generator(seed, "added events", fingerprint(frames))
    places = torch.randint(frames[0, 0].numel(), (*frames.shape[:2], n), generator=rng).to(frames.device)
    added = trigger.floats(frames).new_ones(places.shape)
    return frames.flatten(2).scatter_add(2, places, added).view_as(frames)


def events(data, s):
    """T_s fairly: BadSNN with several betas, and with a trigger that adds events, at the model's own V_a and at two of
    the paper's. `silent`: percent of triggered samples left unanswered."""
    clean, model = train(data, s), train(data, s, "badsnn")
    triggers, rows, x = {}, [], data.x_test[data.y_test != s.target]
    for beta in (0.0, 0.03, 0.1, 0.3):
        triggers[f"beta {beta:g}"] = partial(trigger.seeded_spike_trigger, beta=beta, seed=s.seed)
    for per_step in [round(n / s.T) for n in (400, 1200, 4000)]:
        triggers[f"{per_step * s.T} events"] = partial(event_trigger, n=per_step, seed=s.seed)
    for name, v_thr in (("own V_a", deploy(model, data, s)[0]), ("V_a 1.1", 1.1), ("V_a 1.2", 1.2)):
        at, same = (data, s, v_thr, s.tau_a), dict(seed=s.seed, frames=s.frames, T=s.T, neuron=s.neuron, v_thr=v_thr)
        same |= dict(evaluate(model, *at), attack=f"badsnn, {name}")
        for name, t in triggers.items():
            guess = predict(model, x, s, v_thr, s.tau_a, t)
            rows.append(dict(same, trigger=name, asr=percentage(guess == s.target), silent=percentage(guess == -1),
                             asr_clean_model=asr(clean, *at, t)))
    return rows


STUDIES = {"threshold": threshold, "heatmap": heatmap, "poison": poison, "magnitude": magnitude, "power": power,
           "plif": plif, "events": events}
