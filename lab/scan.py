"""The threshold scan as a detector (ours): whether a spiking network is backdoored, told without its trigger.

    python badsnn.py scan --dataset digits        a population of models, how well it tells them, and who evades it
    python badsnn.py scan --weights model.pt --build my_module:build --data images.npz          a network of your own

defenses.threshold_scan changes the thresholds of a model and looks at its answers to clean images. A detector is judged
by models that had no part in its design: two sets of models are drawn at random, varied in everything that tells one
network from another. The first, small set fixes the score from which on a model is suspected (the alarm); the second
measures. AUROC: how often a backdoored model has the higher score of a pair with a clean one (0.5: chance, 1: always).
"""
import importlib
import random
import sys
import time
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_images
from sklearn.metrics import roc_auc_score

import badsnn
import baselines
import data as datasets
import defenses
import libraries
import machine
import runs
import studies
from badsnn import asr, criterion, deploy, evaluate, percentage, simple_triggers, train
from data import augment, hold_out, need, poison_indices, to_float
from lif import TAU_N, V_THR_N, neurons
from kit.machine import autocast, say
from kit.files import fingerprint

N_DESIGN, EVADE_SEEDS = 8, 3        # models of each kind that fix the alarm; seeds of every attacker who knows the scan
CODE = (*studies.CODE, sys.modules[__name__])

# ---------------------------------------------------------------------------------------------------------
# The population

def draw(s, i, kind):
    """Settings of the i-th model of a kind: None (clean), "badsnn", or another attack. What decides a network is drawn
    at random in the same way for all kinds, and for BadSNN the attack's own settings as well."""
    rng = random.Random(f"{s.seed} {i} {kind}")
    network = dict(seed=s.seed + i, model=rng.choice(("resnet19", "resnet19", "resnet19", "vgg16")),
                   width=rng.choice((6, 8, 8, 12)), T=rng.choice((2, 2, 4)), neuron=rng.choice(("lif", "lif", "plif")),
                   loss=rng.choice(("tet", "ce")), lr=rng.choice((0.05, 0.1, 0.2)), epochs=rng.choice((6, 9, 12)),
                   label_smoothing=rng.choice((0.0, 0.1)), contrast=rng.choice((0.0, 0.2, 0.5)),
                   pad=rng.choice((0, 1, 2)), growing_T=(0.4, 0.7) if rng.random() < 0.5 else (0, 0),
                   target=rng.randrange(10))
    v_thr_t = 0.8 if rng.random() < 0.2 else round(rng.uniform(1.1, 2.0), 2)
    attack = dict(v_thr_t=v_thr_t, v_thr_t_low=rng.choice((None, 1.05)) if v_thr_t > 1 else None, warmup=1,
                  tau_t=rng.choice((0.3, 0.5, 0.5, 0.8)), poison_ratio=rng.choice((0.1, 0.25, 0.5, 1.0)),
                  malicious_rows=rng.choice((16, 32)), malicious_contrast=rng.choice((None, 0.5)),
                  malicious_weight=rng.choice((0.3, 1.0)))
    return replace(s, **network, **(attack if kind == "badsnn" else {}))


def scan_model(s, kind, grid=None):
    """Trains a model of a kind, ships it as its attacker would (at a V_a of the grid), and scans it: a row."""
    data = datasets.load_for(s)

    def run():
        model, v_thr = train(data, s, kind).eval(), V_THR_N
        if kind == "badsnn":
            v_thr = deploy(model, data, s, grid)[0]
        shipped = studies.as_shipped(model, v_thr, s)
        row = dict(s.of("network"), kind=kind or "clean", seed=s.seed, epochs=s.epochs, loss=s.loss, v_thr_a=v_thr,
                   label_smoothing=s.label_smoothing, contrast=s.contrast, **evaluate(shipped, data, s, None, None))
        if kind == "badsnn":
            t = simple_triggers(data, s)["asr_p"]
            row.update(target=s.target, v_thr_t=s.v_thr_t, tau_t=s.of("attack")["tau_t"], poison_ratio=s.poison_ratio,
                       asr_p=asr(shipped, data, s, None, None, t))
        elif kind:
            row.update(target=s.target, asr=asr(shipped, data, s, None, None, baselines.BASELINES[kind](model, s)))
        return row | scanned(shipped, data, s)
    row = kept_row(kind or "clean", data, s, run, kind=kind, grid=grid)
    say(f"{row['kind']:>8}, {s.model}, width {s.width}, seed {s.seed}: CA {row['ca']:.1f} at v_thr {row['v_thr_a']:g}; "
        f"score {row['scores']['100 images']:.3f}, class {row['accused']} accused")
    return row


def kept_row(name, data, s, run, **deciders):
    """run()'s row, or that of an earlier run with equal settings, data, code and deciders."""
    deciders = dict(s.of(), **deciders, inputs=fingerprint(*studies.all_of(data), runs.code_of(*CODE)))
    path = s.runs / data.name / "scan" / f"{name}-seed{s.seed}-{fingerprint(deciders)[:8]}.json"
    return runs.kept(path, deciders, run, s.fresh, quiet=True)[0]


def scanned(model, data, s):
    """Scores of a shipped model from several kinds of images, the accused class, the curve, the seconds of a scan."""
    clean, g = to_float(data.x_test[:100].to(s.device), s), runs.generator(0, "images of the scan")
    inputs = {"100 images": clean, "10 images": clean[:10], "1 image": clean[:1],
              "photographs": photographs(clean[:20], g),
              "noise": torch.rand(clean[:20].shape, generator=g).to(s.device),
              "a grey image": torch.full_like(clean[:1], 0.5)}
    started = time.time()
    with autocast(s):
        full = defenses.threshold_scan(model, inputs.pop("100 images"))
        seconds = time.time() - started
        scores = {name: round(defenses.threshold_scan(model, x)["score"], 4) for name, x in inputs.items()}
    return dict(scores={"100 images": round(full["score"], 4), **scores, "late": round(full["late"], 4)},
                accused=full["accused"], v_thr=full["v_thr"], seconds=round(seconds, 2),
                curve=[round(v, 4) for v in full["probability"].amax(1).tolist()])


def photographs(like, generator):
    """Crops of the two photographs that ship with scikit-learn, as many and as large as the images `like` [N, C, H, W],
    at a quarter of their resolution where they are large enough: unlabelled images of another kind."""
    height, width = (min(4 * n, most - 1) for n, most in zip(like.shape[2:], (427, 640)))
    pictures = [torch.from_numpy(image.copy()).permute(2, 0, 1) / 255 for image in load_sample_images().images]
    crops = []
    for k in range(len(like)):
        picture = pictures[k % len(pictures)]
        top, left = (int(torch.randint(n - size, (), generator=generator))
                     for n, size in zip(picture.shape[1:], (height, width)))
        crops.append(F.adaptive_avg_pool2d(picture[:, top:top + height, left:left + width], like.shape[2:]))
    return torch.stack(crops)[:, :like.shape[1]].to(like.device)


# ---------------------------------------------------------------------------------------------------------
# The attacker who knows the scan trains a backdoored model on, with rows that hide it. Each function below makes them:
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
    student, part = studies.as_shipped(model, V_THR_N, replace(s, tau_a=TAU_N)).train(), hold_out(data, s.hold_out)[0]
    x_train, y_train = part.x_train.to(s.device), part.y_train.to(s.device)
    chosen = poison_indices(part.y_train, s.target, s.poison_ratio, s.seed, s.n_poison)
    optimizer = torch.optim.SGD(student.parameters(), lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    g, k = runs.generator(s.seed, "evader", evader.__name__), data.num_classes
    m = min(s.malicious_rows, s.batch_size, len(y_train))

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
            extra = evader(malicious, augmented(rows[:m], s.contrast), u, target, k, twin)
            x = torch.cat([augmented(rows, s.contrast), *(images for images, _, _ in extra)])
            v_thr = torch.cat([torch.full((len(rows),), V_THR_N, device=s.device), *(v for _, v, _ in extra)])
            with neurons(student, v_thr, TAU_N), autocast(s):
                outputs = student(x, every_step=True)                                   # [T, B, K]
            wanted = torch.cat([p for _, _, p in extra]).repeat(len(outputs), 1)
            loss = criterion(s.loss, outputs[:, :len(rows)], y_train[rows], s.label_smoothing)
            loss = loss + 0.3 * F.cross_entropy(outputs[:, len(rows):].flatten(0, 1), wanted)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    return student.eval()


def evade(s, name):
    """One attacker who knows the scan (none: who does not): what hiding costs, and what the scan still sees."""
    data, trained = datasets.load_for(s), replace(s, fresh=False)       # scan() has just trained both models

    def run():
        clean, model, t = train(data, trained), train(data, trained, "badsnn"), simple_triggers(data, s)["asr_p"]
        model = hide(model, clean, data, s, EVADERS[name]) if name in EVADERS else model
        v_thr = deploy(model, data, s)[0]
        shipped = studies.as_shipped(model, v_thr, s)
        return dict(evader=name, seed=s.seed, target=s.target, v_thr_a=v_thr, **evaluate(shipped, data, s, None, None),
                    base_ca=evaluate(model, data, s, V_THR_N, TAU_N)["ca"], asr_p=asr(shipped, data, s, None, None, t),
                    asr_p_clean_model=asr(clean, data, s, v_thr, TAU_N, t), **scanned(shipped, data, s))
    row = kept_row(name, data, s, run, evader=name)
    say(f"{name:>11}, seed {s.seed}: CA {row['ca']:.1f} (Base CA {row['base_ca']:.1f}), target_rate "
        f"{row['target_rate']:.1f}, ASR_p {row['asr_p']:.1f} at V_a {row['v_thr_a']:g}; scores "
        + ", ".join(f"{row['scores'][key]:.3f} ({key})" for key in ("100 images", "late")))
    return row


# ---------------------------------------------------------------------------------------------------------
# The detector's report

def scan(data, s, n_models=40):
    """Scans models and writes scan.json. digits: a population (see draw), other attacks' models, and attackers who know
    the scan. Other sets: the scores of the clean and the backdoored model of every seed; no alarm."""
    started = time.time()
    if data.name == "digits":
        counts = {None: N_DESIGN + n_models, "badsnn": N_DESIGN + n_models, "badnets": n_models // 8,
                  "blend": n_models // 8}
        steps = (0.04, 0.08, 0.12, 0.16)
        drawn = [(draw(s, i, kind), kind) for i in range(N_DESIGN + n_models) for kind, n in counts.items() if i < n]
        jobs = [(one, kind, [round(1 + (step if one.v_thr_t > 1 else -step), 2) for step in steps])
                for one, kind in drawn]
        attackers = studies.every_seed(replace(s, seeds=EVADE_SEEDS))
        hidden = [(one, name) for one in attackers for name in ("none", *EVADERS)]
        badsnn.train_side_by_side(s, [(one, kind) for one in attackers for kind in (None, "badsnn")])
    else:
        jobs, hidden = [(one, kind) for one in studies.every_seed(s) for kind in (None, "badsnn")], []
    rows = machine.side_by_side(scan_model, jobs, s, [f"{job[1] or 'clean'} {job[0].seed}" for job in jobs])
    evaders = machine.side_by_side(evade, hidden, s, [f"{name} {one.seed}" for one, name in hidden])
    result = dict(rows=rows, evaders=evaders)
    if hidden:
        of = {kind: [row for row in rows if row["kind"] == kind] for kind in ("clean", "badsnn")}
        design = of["clean"][:N_DESIGN] + of["badsnn"][:N_DESIGN]
        measured = of["clean"][N_DESIGN:] + of["badsnn"][N_DESIGN:]
        result.update(n_design=N_DESIGN, summary={name: summary(design, measured, name) for name in rows[0]["scores"]})
    result["seconds"] = round(time.time() - started, 1)
    runs.write_json(runs.folder_of(data, s) / "scan.json", result)
    return result


def summary(design, measured, name, draws=1000):
    """The detector on one kind of images: the alarm, which parts the design models best; on the others AUROC with
    a 95 % interval (bootstrap over models), percent of the backdoored and of the clean models that raise the alarm, and
    how often the accused class is right among those that were caught."""
    def split(rows):
        return (np.array([row["scores"][name] for row in rows if row["kind"] == kind]) for kind in ("badsnn", "clean"))
    (bad, good), (caught, clean) = split(design), split(measured)
    cuts = np.unique(np.concatenate([bad, good]))
    cuts = (cuts[1:] + cuts[:-1]) / 2
    told = [(bad > cut).sum() + (good <= cut).sum() for cut in cuts]
    alarm = float(np.mean([cut for cut, n in zip(cuts, told) if n == max(told)]))
    rng = np.random.default_rng(0)

    def auroc(bad, good):
        return roc_auc_score([1] * len(bad) + [0] * len(good), [*bad, *good])
    boot = [auroc(rng.choice(caught, len(caught)), rng.choice(clean, len(clean))) for _ in range(draws)]
    right = [row["accused"] == row["target"] for row in measured
             if row["kind"] == "badsnn" and row["scores"][name] > alarm]
    return dict(alarm=round(alarm, 4), auroc=round(auroc(caught, clean), 4), n=[len(caught), len(clean)],
                interval=[round(float(np.quantile(boot, q)), 4) for q in (0.025, 0.975)],
                caught=percentage(torch.as_tensor(caught > alarm)),
                false_alarms=percentage(torch.as_tensor(clean > alarm)),
                accused_right=percentage(torch.as_tensor(right)) if right else None)


# ---------------------------------------------------------------------------------------------------------
# A network of one's own

def own(weights, build, images, known):
    """Scans the network that build ("package.module:function", called without arguments) makes, with the weights of a
    state_dict file, on images of an .npz file. Only tensors are read from it; the building code is yours and is run.
    known: the scan.json that says where models lie whose nature is known. Raises ValueError; prints, and returns the
    scan's result."""
    module, _, name = build.partition(":")
    sys.path.insert(0, "")
    try:
        model = getattr(importlib.import_module(module), name)()
    except Exception as error:      # the code is yours, and so are its errors
        raise ValueError(f"--build {build}: {error!r}; wanted: module:function, a function without arguments") from None
    need(isinstance(model, torch.nn.Module), f"--build {build} returned no torch.nn.Module")
    try:
        state = torch.load(weights, weights_only=True, map_location="cpu")
    except OSError as error:
        raise ValueError(f"--weights {weights}: {error}") from None
    except Exception:       # torch.load has many: zip, pickle, key, type and runtime errors
        raise ValueError(f"--weights {weights}: not a file of tensors, as torch.save(model.state_dict(), ...) makes; "
                         "anything else in it is not read, because reading it could run code") from None
    try:
        model.load_state_dict(state["model"] if "model" in state else state)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(f"--weights {weights} does not fit what --build makes: {str(error).splitlines()[0]}") from None
    x = images_of(images)
    _, unknown = libraries.neurons_of(model)
    try:
        with torch.no_grad():
            result = defenses.threshold_scan(model.eval(), x)
    except ValueError:
        raise
    except Exception as error:      # the code is yours, and so are its errors
        raise ValueError(f"the network does not take images {list(x.shape)}: {error!r}") from None
    need(result["score"] == result["score"], "the network's answers are no numbers (NaN)")
    at = runs.read_json(known)["summary"]["100 images"]
    say(f"{'v_thr':>7} {'class':>5} {'share':>6} {'probability':>11} {'entropy':>8}")
    for v, share, p, h in zip(result["v_thr"], result["share"], result["probability"], result["entropy"]):
        top = int(p.argmax())
        say(f"{v:7.3f} {top:5} {share[top]:6.2f} {p[top]:11.3f} {h:8.3f}")
    suspicious = result["score"] > at["alarm"]
    say(f"\nscore {result['score']:.3f}; of the digits models in {known}, {at['caught']:g} % of "
        f"the backdoored and {at['false_alarms']:g} % of the clean ones are above {at['alarm']:.3f}.\n" + (
            f"SUSPICIOUS: with another threshold the network becomes sure of class {result['accused']}. Do not use it "
            "as it is: set its threshold back to that of its training, fine-tune it on images you trust, and scan it."
            if suspicious else "Nothing suspicious. That is no proof: an attacker who knows the scan can pass it."))
    if unknown:
        say(f"These modules were left alone; if one of them is a neuron, the scan means nothing: {', '.join(unknown)}")
    return result


def images_of(path, most=100):
    """Up to 100 images of an .npz file, its x_test, x_train or x: uint8 [N, H, W, C], or floats [N, C, H, W] in [0, 1].
    Returns floats [N, C, H, W]. Raises ValueError."""
    try:
        with np.load(path, allow_pickle=False) as file:
            name = next((name for name in ("x_test", "x_train", "x") if name in file.files), None)
            need(name, f"{path}: no x_test, x_train or x in it")
            x = torch.from_numpy(file[name][:most])
    except Exception as error:      # np.load has many: zip, value, key and type errors
        raise ValueError(f"--data {path}: {str(error).splitlines()[0]}; wanted: an .npz file of images") from None
    need(x.dim() == 4 and x.numel(), f"{path}: images are [N, H, W, C] or [N, C, H, W], not {list(x.shape)}")
    if x.dtype == torch.uint8:
        return (x if x.shape[1] in (1, 3) else x.permute(0, 3, 1, 2)).float() / 255
    need(x.is_floating_point() and 0 <= x.min() and x.max() <= 1, f"{path}: floats must lie in [0, 1]")
    return x.float()
