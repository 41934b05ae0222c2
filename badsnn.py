"""BadSNN (Miah, Vu and Bi): a backdoor put into a spiking network through its neurons. The experiments of the paper.

Threat model (Sec. 3.1). The attacker trains the network and ships it: weights AND neuron setting. No training image is
changed and no label either. The victim checks the accuracy, then uses the network on inputs that the attacker can touch.

    1. train    all samples under the nominal setting S_n = (v_thr 1.0, tau 0.5); in the same step a few samples of the
                target class also under a malicious setting S_t = (1.5, 0.5)          Eq. 2       train()
    2. deploy   a setting S_a in between, such as v_thr = 1.10                        Eq. 8       attack(), choose()
    3. trigger  a simple transformation of the input                                  Eqs. 3-7    trigger.py

    python badsnn.py attack --dataset digits        Table 1's row of a data set, with the controls that the paper lacks
    python badsnn.py defend --dataset digits        Table 2's rows: five attacks, five defences, and the one that costs nothing
    python badsnn.py ablate --study threshold       Figs. 2, 3, 4 and 6
    python badsnn.py report                         figures and the README's tables from results/

Metrics, in percent. CA: accuracy on clean test samples. ASR: share of triggered test samples predicted as the target.
target_rate: the same share without any trigger. Both leave out samples whose true class is the target, and an ASR means
nothing without the CA and the target_rate of the same setting. Base CA: CA at S_n. Clean CA: of a model without backdoor.
"""
import argparse
import contextlib
import copy
import ctypes
import hashlib
import itertools
import json
import math
import os
import re
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm

import data as datasets
import defenses
from data import augment, poison_indices
from lif import LIF, TAU_N, V_THR_N, check_setting, count_spikes, neurons
from models import NEURONS, WIDTHS, build_model, frozen
from trigger import (
    UNet,
    badnets,
    blend,
    check_trigger,
    clean_label,
    deepfool,
    optimized_trigger,
    pgd,
    power_trigger,
    spike_trigger,
    train_unet,
    wanet,
    wanet_field,
    wanted_perturbations,
)

T_O_SETTINGS = ("v_thr_o", "adversarial_setting", "lambdas", "epochs_o", "n_o")

# Table 1's settings per data set, then ours (the paper gives no epochs, learning rates or q).
IMAGES = dict(model="resnet19", v_thr_t=1.5, tau_t=0.5, poison_ratio=0.05, q=2.0, epochs=30, batch_size=128, lr=0.1,
              optimizer="sgd", loss="ce", pad=4, flip=False, contrast=0.0, malicious_rows=8, malicious_weight=0.3, warmup=2,
              lambdas=(1.0, 0.1, 1.0), epochs_o=8, v_thr_o=1.1, magnitude=1.0, margin=8.0, v_thr_d=1.1, defense_lr=0.01,
              v_thr_a=(1.0, 1.05, 1.1, 1.15, 1.2))
EVENTS = dict(IMAGES, model="nmnist_net", poison_ratio=0.03, epochs=30, batch_size=32, lr=1e-3, optimizer="adam", loss="mse", pad=1)
PRESETS = {
    # contrast: T_p makes images grey and pale, and what a network says of grey is chance unless it has seen some in training
    "digits": dict(IMAGES, epochs=16, batch_size=32, pad=1, contrast=0.6, malicious_rows=32, lambdas=(1.0, 1.0, 1.0),
                   q=32.0, epochs_o=32, magnitude=0.9, v_thr_o=1.125, v_thr_d=1.125, margin=4.0, defense_lr=0.1,
                   v_thr_a=(1.0, 1.05, 1.1, 1.125, 1.15, 1.2)),
    "cifar10": dict(IMAGES, poison_ratio=0.02, flip=True, epochs=20, lambdas=(1.0, 1.0, 1.0), epochs_o=16, v_thr_t=1.2, v_thr_o=1.07,
                    v_thr_d=1.07, v_thr_a=(1.0, 1.05, 1.06, 1.07, 1.08, 1.1, 1.15, 1.2)),
    "cifar100": dict(IMAGES, model="vgg16", poison_ratio=0.01, flip=True),
    "gtsrb": dict(IMAGES, model="vgg16", poison_ratio=0.05, tau_t=0.8, epochs=20, lambdas=(1.0, 1.0, 1.0), epochs_o=16, magnitude=0.7,
                  v_thr_d=1.2),
    "nmnist": EVENTS,
    "ndigits": dict(EVENTS, poison_ratio=0.05, epochs=15),
}


# ---------------------------------------------------------------------------------------------------------
# Training

def train(data, a, attack=None):
    """Trains a network on data.x_train and returns it. attack: None for a clean model, "badsnn" for dual-spike training (Eq. 2), or
    one of BASELINES, which poison the data.

    a: the settings (see get_args). One row per epoch is printed. After every epoch a checkpoint is written to
    a.runs/DATASET/; if one with the same settings is there, training goes on where it stopped, or is skipped.
    """
    name = {None: "clean model", "badsnn": "backdoored model"}.get(attack, f"{attack} model")
    dual = attack == "badsnn"
    model = fresh_model(data, a)
    if attack == "wanet":
        model.register_buffer("field", wanet_field(data.x_train.shape[2:], seed=a.seed).to(a.device))      # saved with the weights
    malicious = poison_indices(data.y_train, a.target, a.poison_ratio, a.seed) if dual else None
    steps_per_epoch = max(1, len(data.y_train) // a.batch_size)
    if a.optimizer == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), lr=a.lr, momentum=0.9, weight_decay=5e-4)
    else:
        optimizer = torch.optim.Adam(model.parameters(), lr=a.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, a.lr, total_steps=a.epochs * steps_per_epoch,
                                                   pct_start=0.15, cycle_momentum=False)

    reference = train(data, a) if attack == "clean_label" else None
    if attack in BASELINES:     # a mark as faint as Blended's is not learned from images that lose contrast at random
        a = SimpleNamespace(**{**vars(a), "contrast": 0.0})
    config = training_config(name, data, a, attack, model, reference)
    path = checkpoint_path(config, a)
    history = []
    if a.resume and path.exists():
        state = read_checkpoint(path, config)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        history = state["history"]
    model.history, model.seconds_before = history, sum(row["seconds"] for row in history)      # the rows that are printed
    if len(history) == a.epochs:
        say(f"{name}, seed {a.seed}: finished earlier, read from {path}")
        return model
    x_train, y_train, about = poison(data, a, attack, reference)
    parameters = sum(p.numel() for p in model.parameters())
    say(f"{name}, seed {a.seed}: {a.model}, width {a.width}, T = {a.T}, {parameters:,} parameters, {len(data.y_train):,} samples"
        + (f", of them {len(malicious)} of class {a.target} malicious" if dual else about)
        + (f"; resumed after epoch {len(history)}" if history else ""))
    say(f"{'epoch':>9} {'loss':>7} {'acc':>6} {'mal_acc':>7} {'CA':>6} {'target_rate':>11} {'sec':>6} {'ETA':>6}")

    rank, ranks = rank_and_ranks()
    wrapped = DistributedDataParallel(model) if ranks > 1 else model
    x_train, y_train = x_train.to(a.device), y_train.to(a.device)
    monitor = SimpleNamespace(**{**vars(data), "x_test": data.x_test[:1000], "y_test": data.y_test[:1000]})
    for epoch in range(len(history), a.epochs):
        # every epoch draws from its own generators: a resumed run is the run that was never interrupted
        shuffle = torch.Generator().manual_seed(1000 * a.seed + epoch)              # the same on every rank
        local = torch.Generator().manual_seed(1_000_000 * (rank + 1) + 1000 * a.seed + epoch)
        torch.manual_seed(1_000_000 * (rank + 1) + 1000 * a.seed + epoch)           # dropout
        order = torch.randperm(len(y_train), generator=shuffle)
        model.train()
        total, started = torch.zeros(5, device=a.device), time.time()
        for step in tqdm(range(steps_per_epoch), desc=f"epoch {epoch + 1}", leave=False, disable=None if rank == 0 else True):
            # 1. a nominal batch, and a few malicious rows drawn with replacement from D_t^p
            rows = order[step * a.batch_size:(step + 1) * a.batch_size]
            n_total = len(rows)
            if dual and epoch >= a.warmup:
                drawn = malicious[torch.randint(len(malicious), (a.malicious_rows,), generator=shuffle)]
                drawn = drawn[rank::ranks]
            else:
                drawn = rows[:0]
            rows = rows[rank::ranks]
            n = len(rows)
            rows = torch.cat([rows, drawn]).to(a.device)
            x, y = x_train[rows], y_train[rows]
            if attack == "wanet":
                x, y = wanet_batch(x, y, a, model.field, local)
            if a.augment:
                x = augment(x, a.pad, a.flip, a.contrast, local)
            # 2. ONE forward pass over both: every sample has its own neuron setting, S_n or S_t
            v_thr = torch.tensor([V_THR_N] * n + [a.v_thr_t] * len(drawn), device=a.device)
            tau = torch.tensor([TAU_N] * n + [a.tau_t] * len(drawn), device=a.device)
            with neurons(model, v_thr, tau), autocast(a):
                logits = wrapped(to_float(x, a))
            # 3. Eq. 2: nominal loss of all samples, malicious loss of D_t^p
            loss = criterion(a.loss, logits[:n], y[:n])
            if len(drawn):
                loss = loss + a.malicious_weight * criterion(a.loss, logits[n:], y[n:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            guess = logits.detach().argmax(1)
            total += torch.stack([loss.detach() * n_total, (guess[:n] == y[:n]).sum() * ranks, (guess[n:] == y[n:]).sum() * ranks,
                                  torch.tensor(n_total, device=a.device), torch.tensor(len(drawn) * ranks, device=a.device)])
        loss, right, right_mal, seen, seen_mal = (sum_over_ranks(total) / ranks).tolist()
        now = evaluate(model, monitor, a, V_THR_N, TAU_N)
        row = dict(epoch=epoch + 1, loss=loss / seen, acc=100 * right / seen, ca=now["ca"], target_rate=now["target_rate"],
                   mal_acc=100 * right_mal / seen_mal if seen_mal else None, seconds=time.time() - started)
        history.append(row)
        eta = row["seconds"] * (a.epochs - epoch - 1)
        say(f"{epoch + 1:>5}/{a.epochs:<3} {row['loss']:7.3f} {row['acc']:6.1f} {percent(row['mal_acc'], 7)} {row['ca']:6.1f} "
            f"{row['target_rate']:11.1f} {row['seconds']:6.1f} {timedelta(seconds=round(eta))!s:>7}")
        if epoch >= a.warmup and (row["ca"] < 150 / data.num_classes or row["target_rate"] > 90):
            say("  warning: collapsed? at the nominal setting the model " + (
                "answers the target to nearly everything" if row["target_rate"] > 90 else "is near chance"))
        write_checkpoint(path, dict(config=config, model=model.state_dict(), optimizer=optimizer.state_dict(),
                                    schedule=schedule.state_dict(), history=history))
    return model


# Table 2's other attacks. They poison a share (--baseline-ratio) of ALL training samples; the network always runs at S_n.
BASELINES = {"badnets": lambda model, seed: badnets,
             "blend": lambda model, seed: partial(blend, seed=seed),
             "wanet": lambda model, seed: partial(wanet, field=model.field),
             "clean_label": lambda model, seed: clean_label}


def poison(data, a, attack, reference):
    """The training set of a baseline attack: x, y (uint8, int64) and a sentence for the log. Other attacks get it unchanged.

    BadNets and Blended mark samples of any class and relabel them as the target. Clean-label marks samples of the target class only,
    after PGD against `reference`, a clean model, has made them hard to learn; labels stay right. WaNet: see wanet_batch.
    # differs from the sources: PGD's reference is our clean spiking network, not an adversarially trained ResNet-18
    """
    x, y, count = data.x_train, data.y_train, round(a.baseline_ratio * len(data.y_train))
    if attack not in BASELINES or attack == "wanet":
        return x, y, f", of every batch {100 * a.baseline_ratio:g} % warped, twice as many as noise" if attack == "wanet" else ""
    candidates, about = torch.arange(len(y)), f", of them {count} poisoned"
    if attack == "clean_label":
        candidates = (y == a.target).nonzero().flatten()
        about = f", of them {count} of class {a.target} poisoned"
        if count > len(candidates):     # 5 % of the whole set may be more than there are of the target class
            count = max(1, round(a.baseline_ratio * len(candidates)))
            about = f", of them {count} poisoned: {100 * a.baseline_ratio:g} % of class {a.target}, too small for that share of the set"
    chosen = candidates[torch.randperm(len(candidates), generator=torch.Generator().manual_seed(a.seed))[:count]]
    images = to_float(x[chosen].to(a.device), a)
    if attack == "clean_label":
        parts = zip(images.split(128), y[chosen].to(a.device).split(128))
        images = torch.cat([pgd(reference, part, labels, seed=a.seed + i) for i, (part, labels) in enumerate(parts)])
    marked = BASELINES[attack](reference, a.seed)(images)
    x, y = x.clone(), y.clone()
    x[chosen], y[chosen] = to_uint8(marked).cpu(), a.target
    return x, y, about


def wanet_batch(x, y, a, field, generator):
    """WaNet's poisoning of one batch (x uint8, y): a share is warped and relabelled, twice as many are warped with extra noise
    and keep their label, so that only the exact field means the target."""
    expected = a.baseline_ratio * len(x)      # small batches: rounded up or down at random, right on average
    n = int(expected + torch.rand((), generator=generator).item())
    noise = torch.rand(min(2 * n, len(x) - n), *field.shape[1:], generator=generator).to(x.device) * 2 - 1
    images = to_float(x[:n + len(noise)], a)
    warped = torch.cat([wanet(images[:n], field), wanet(images[n:], field, noise=noise)])
    x = torch.cat([to_uint8(warped), x[n + len(noise):]])
    return x, torch.cat([torch.full_like(y[:n], a.target), y[n:]])


def fresh_model(data, a):
    """A network with the weights that the seed gives, on the device of the settings a."""
    torch.manual_seed(a.seed)
    return build_model(a.model, data.num_classes, a.T, a.width, a.neuron, data.mean, data.std).to(a.device)


def criterion(name, logits, y):
    """Cross-entropy, or (event networks, as in Sneaky Spikes) the squared error between firing rates and the one-hot label."""
    return F.cross_entropy(logits, y) if name == "ce" else F.mse_loss(logits, F.one_hot(y, logits.shape[1]).float())


def to_float(x, a):
    """uint8 as stored -> what networks and triggers take: images in [0, 1]; event counts as they are, or clamped to [0, 1]."""
    if x.dim() == 4:
        return x.float() / 255
    return x.float().clamp(max=1) if a.frames == "binary" else x.float()


def to_uint8(x):
    """Images in [0, 1] -> uint8 as stored, the inverse of to_float."""
    return x.mul(255).round().byte()


def autocast(a):
    """bfloat16 arithmetic where the hardware has it (--amp). The neuron itself always computes in float32."""
    return torch.autocast(a.device.type, torch.bfloat16, enabled=a.amp)


# ---------------------------------------------------------------------------------------------------------
# Evaluation

@torch.no_grad()        # not inference_mode, whose tensors would have every kernel of the neuron compiled once more
def predict(model, x, a, v_thr, tau, trigger=None):
    """Predicted classes [N] of stored samples x [N, ...] (uint8), all neurons at (v_thr, tau), triggered if asked."""
    model.eval()
    classes = []
    with neurons(model, v_thr, tau), autocast(a):
        for batch in x.split(a.eval_batch):
            clean = to_float(batch.to(a.device), a)
            inputs = clean
            if trigger is not None:
                with torch.autocast(a.device.type, enabled=False):
                    inputs = trigger(clean)
                check_trigger(clean, inputs)
            classes.append(model(inputs).argmax(1).cpu())
    return torch.cat(classes)


def evaluate(model, data, a, v_thr, tau):
    """CA and target_rate in percent on the clean test set, at one neuron setting."""
    guess = predict(model, data.x_test, a, v_thr, tau)
    return dict(ca=share(guess == data.y_test), target_rate=attack_success_rate(guess, data.y_test, a.target))


def attack_success_rate(guess, labels, target):
    """Percent predicted as the target among samples whose true class is another. guess, labels: [N]."""
    return share(guess[labels != target] == target)


def share(hits):
    return round(100 * hits.float().mean().item(), 2) if len(hits) else float("nan")


def asr(model, data, a, v_thr, tau, trigger):
    """ASR in percent: only samples of other classes are triggered and counted."""
    other = data.y_test != a.target
    return share(predict(model, data.x_test[other], a, v_thr, tau, trigger) == a.target)


# ---------------------------------------------------------------------------------------------------------
# attack: Table 1

def attack(data, a):
    """Clean model, backdoored model, and the sweep over the deployed threshold V_a; mean over seeds. Writes attack.json."""
    path = a.results / result_name(data.name) / "attack.json"
    done = finished_result(path, dict(settings(data, a), v_thr_a=a.v_thr_a, tau_a=a.tau_a)) if a.resume else None
    if done:
        done.update(margin=a.margin, chosen=choose(done["rows"], done["base_ca"], a.margin))
        print_attack(done)
        write_json(path, done)
        say(f"finished earlier, read from {path}; --fresh runs it again")
        return
    started, runs, before = time.time(), [], 0.0
    for seed in range(a.seed, a.seed + a.seeds):
        b = SimpleNamespace(**{**vars(a), "seed": seed})
        clean = train(data, b)
        backdoored = train(data, b, "badsnn")
        before += clean.seconds_before + backdoored.seconds_before      # what an earlier run has spent on them
        generator, about_t_o = (None, None) if data.events else train_trigger(backdoored, data, b)
        if generator is not None and rank_and_ranks()[0] == 0:
            save_examples(generator, data, b)
        rows = [attack_row(clean, backdoored, generator, data, b, v_thr) for v_thr in a.v_thr_a]
        runs.append(dict(seed=seed, clean_ca=evaluate(clean, data, b, V_THR_N, TAU_N)["ca"],
                         base_ca=evaluate(backdoored, data, b, V_THR_N, TAU_N)["ca"], rows=rows, t_o=about_t_o))
    rows = [mean_of([run["rows"][i] for run in runs]) for i in range(len(a.v_thr_a))]
    base_ca = mean_of(runs)["base_ca"]
    n_poison = len(poison_indices(data.y_train, a.target, a.poison_ratio, a.seed))
    result = dict(settings(data, a), v_thr_a=a.v_thr_a, tau_a=a.tau_a, n_poison=n_poison,
                  clean_ca=mean_of(runs)["clean_ca"], base_ca=base_ca, rows=rows, chosen=choose(rows, base_ca, a.margin),
                  margin=a.margin, runs=runs, seconds=round(time.time() - started + before, 1))
    print_attack(result)
    write_json(path, result)


def train_trigger(model, data, a):
    """T_o (Sec. 3.3.2) against the backdoored model, from training images only. Returns the U-Net and what was measured on the way;
    the U-Net is None where no image could be blended. Kept in a.runs/DATASET/ and read from there the next time.

    DeepFool, the blending's labels and, with --adversarial-setting S_a, the adversarial loss see the model at (v_thr_o, tau_a).
    # differs from the paper: Eq. 6 says S_n for the adversarial loss; at S_n a backdoored model hardly ever answers the target
    """
    other = (data.y_train != a.target).nonzero().flatten()
    chosen = other[torch.randperm(len(other), generator=torch.Generator().manual_seed(a.seed))[:a.n_o]]
    x, started = to_float(data.x_train[chosen].to(a.device), a), time.time()
    torch.manual_seed(a.seed)
    generator = UNet(data.num_classes, tuple(x.shape[2:])).to(a.device)
    config = dict(name="trigger T_o", dataset=result_name(data.name), model=fingerprint(*model.state_dict().values()), seed=a.seed,
                  images=fingerprint(x), **{key: getattr(a, key) for key in ("target", "q", "tau_a", *T_O_SETTINGS)})
    path = checkpoint_path(config, a)
    if a.resume and path.exists():
        state = read_checkpoint(path, config)
        generator.load_state_dict(state["generator"])
        return generator.eval() if state["about"]["n_blended"] else None, state["about"]
    with neurons(model, a.v_thr_o, a.tau_a):
        kept, wanted = wanted_perturbations(model, x, a.q, data.mean, data.std, a.target)
        _, success = deepfool(model, x[:100], 3, 20, with_success=True)
        near = deepfool(model, x[:100], max_iter=20, target=a.target)
    about = dict(n_images=len(x), n_blended=len(kept), deepfool_success=share(success), l2_wanted=norms(wanted)["l2"],
                 l2_targeted_deepfool=norms(near[near.flatten(1).any(1)])["l2"], losses=None)
    if len(kept):
        with neurons(model, *((a.v_thr_o, a.tau_a) if a.adversarial_setting == "S_a" else (V_THR_N, TAU_N))):
            about["losses"] = train_unet(generator, model, kept, wanted, a.target, data.std, a.lambdas, a.epochs_o, seed=a.seed)
        sim, adv, wmse = about["losses"][-1]
        say(f"trigger T_o, seed {a.seed}: {len(kept)} of {len(x)} training images blended at v_thr {a.v_thr_o:g}; U-Net: L_sim {sim:.2f}, "
            f"L_adv {adv:.2f}, L_wmse {wmse:.3f}; {time.time() - started:.0f} s")
    else:
        say(f"trigger T_o, seed {a.seed}: none of {len(x)} training images could be blended into the target; left out")
    write_checkpoint(path, dict(config=config, generator=generator.state_dict(), about=about))
    return generator.eval() if len(kept) else None, about


def save_examples(generator, data, a):
    """Eight test images of eight classes with both triggers, for Fig. 5: results/DATASET/triggers.npz, uint8 [8, H, W, 3]."""
    classes = [k for k in range(data.num_classes) if k != a.target and (data.y_test == k).any()][:8]
    x = to_float(torch.stack([data.x_test[data.y_test == k][0] for k in classes]).to(a.device), a)
    images = dict(clean=x, t_p=main_triggers(data, a)["asr_p"](x), t_o=optimized_trigger(x, generator, a.target, a.magnitude))
    path = a.results / result_name(data.name) / "triggers.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".tmp")
    with open(part, "wb") as file:
        np.savez_compressed(file, **{k: to_uint8(v).permute(0, 2, 3, 1).cpu().numpy() for k, v in images.items()})
    os.replace(part, path)


def norms(delta):
    """Mean L2 and Linf per image of perturbations [N, C, H, W], in pixel units."""
    if not len(delta):
        return dict(l2=None, linf=None)
    delta = delta.flatten(1)
    return dict(l2=round(delta.norm(dim=1).mean().item(), 2), linf=round(delta.abs().amax(1).mean().item(), 3))


def attack_row(clean, backdoored, generator, data, a, v_thr):
    """One deployed setting: the backdoored model with and without triggers, and the clean model under the same trigger."""
    tau, row = a.tau_a, dict(v_thr=v_thr, tau=a.tau_a)
    now, control = evaluate(backdoored, data, a, v_thr, tau), evaluate(clean, data, a, v_thr, tau)
    row.update(ca=now["ca"], target_rate=now["target_rate"],
               ca_clean_model=control["ca"], target_rate_clean_model=control["target_rate"])
    triggers = main_triggers(data, a)
    row["asr_o"] = None
    for key, trigger in triggers.items():
        row[key], row[f"{key}_clean_model"] = (asr(model, data, a, v_thr, tau, trigger) for model in (backdoored, clean))
    if generator is not None:
        t_o = partial(optimized_trigger, generator=generator, target=a.target, magnitude=a.magnitude)
        row["asr_o"], row["asr_o_clean_model"] = (asr(model, data, a, v_thr, tau, t_o) for model in (backdoored, clean))
        x = to_float(data.x_test[data.y_test != a.target].to(a.device), a)
        for name, x_trig in (("o", t_o(x)), ("p", triggers["asr_p"](x))):
            row.update({f"{norm}_{name}": size for norm, size in norms(x_trig - x).items()}, **{f"psnr_{name}": psnr(x_trig, x)})
        faded = min(1.0, row["l2_o"] / row["l2_p"])           # control: T_p faded to T_o's L2
        row["asr_p_faded"] = asr(backdoored, data, a, v_thr, tau, lambda x: x + faded * (triggers["asr_p"](x) - x))
    return row


def psnr(x_trig, x):
    """Mean peak signal-to-noise ratio in dB of triggered images [N, C, H, W] against the clean ones."""
    return round((-10 * (x_trig - x).square().flatten(1).mean(1).clamp(min=1e-10).log10()).mean().item(), 1)


def main_triggers(data, a):
    """The triggers that need no training, by the name of their column: T_p or T_s, and the control that goes with it."""
    if data.events:
        def noise(beta):
            return lambda x: spike_trigger(x, beta, torch.Generator().manual_seed(a.seed))
        return {"asr_p": noise(a.beta), "asr_clip_only": noise(0.0)}
    return {"asr_p": lambda x: power_trigger(x, a.q, data.mean, data.std),
            "asr_p_renormalized": lambda x: power_trigger(x, a.q, data.mean, data.std, renormalize=True)}


def readings(data, a):
    """T_p in both readings of Eq. 3, by the name that figures and tables give it."""
    return dict(zip(("T_p", "T_p re-normalised"), main_triggers(data, a).values()))


def choose(rows, base_ca, margin):
    """The attacker's setting by Eq. 8: among the rows with CA >= base_ca - margin the one with the largest ASR - target_rate,
    where ASR is the mean over the triggers: ASR_p (on images in the better reading of Eq. 3; the attacker takes what works) and ASR_o.

    As in the paper the choice is made on the test set; with so few candidates the bias is small. None if no row qualifies.
    """
    fit = [row for row in rows if row["ca"] >= base_ca - margin and row["v_thr"] != V_THR_N]

    def gain(row):
        asr_p, asr_o = max(row["asr_p"], row.get("asr_p_renormalized", 0)), row.get("asr_o")
        return (asr_p if asr_o is None else (asr_p + asr_o) / 2) - row["target_rate"]
    return max(fit, key=gain)["v_thr"] if fit else None


def mean_of(runs):
    """Mean over runs of every number in a list of equal dicts; other values are taken from the first."""
    def mean(values):
        numbers = [v for v in values if isinstance(v, float)]
        return round(sum(numbers) / len(numbers), 2) if numbers else values[0]
    return {key: runs[0][key] if key in ("v_thr", "tau") else mean([run.get(key) for run in runs]) for key in runs[0]}


def print_attack(r):
    """Prints the result of attack() as Table 1's row, with its controls."""
    say(f"\n{r['dataset']}: {r['model']}, width {r['width']}, {r['n_train']:,} training and {r['n_test']:,} test samples, "
        f"{r['seeds']} seed{'s' * (r['seeds'] > 1)}{'; ' + r['note'] if r['note'] else ''}")
    strength = f"q = {r['q']:g}" if r["q"] else f"beta = {r['beta']:g}"
    say(f"Clean CA {r['clean_ca']:.1f}   Base CA {r['base_ca']:.1f}   target {r['target']}, P = {100 * r['poison_ratio']:g} % of the class "
        f"({r['n_poison']} samples), S_t = ({r['v_thr_t']:g}, {r['tau_t']:g}), {strength}")
    control, title = ("asr_clip_only", "clip only") if r["q"] is None else ("asr_p_renormalized", "renorm.")
    say(f"{'':>13} | {'backdoored model':^47} | {'clean model, same trigger':^35}")
    say(f"{'v_thr':>6} {'tau':>6} | {'CA':>7} {'target_rate':>12} {'ASR_p':>7} {title:>10} {'ASR_o':>7} | "
        f"{'CA':>7} {'target_rate':>11} {'ASR_p':>7} {'ASR_o':>7}")
    for row in r["rows"]:
        say(f"{row['v_thr']:6.3f} {row['tau']:6.2f} | {row['ca']:7.1f} {row['target_rate']:12.1f} {row['asr_p']:7.1f} {row[control]:10.1f} "
            f"{percent(row['asr_o'], 7)} | {row['ca_clean_model']:7.1f} {row['target_rate_clean_model']:11.1f} "
            f"{row['asr_p_clean_model']:7.1f} {percent(row.get('asr_o_clean_model'), 7)}{'  <- chosen' * (row['v_thr'] == r['chosen'])}")
    sizes = [row for row in r["rows"] if row["v_thr"] == r["chosen"] and row.get("l2_o")]
    for row in sizes:
        say(f"Mean L2 (Linf, PSNR) of T_p: {row['l2_p']:.2f} ({row['linf_p']:.2f}, {row['psnr_p']:.1f} dB), of T_o: {row['l2_o']:.2f} "
            f"({row['linf_o']:.2f}, {row['psnr_o']:.1f} dB); T_p faded to T_o's L2 reaches {row['asr_p_faded']:.1f} %.")
    say("ASR, target_rate: percent predicted as the target, with and without the trigger, among samples of other classes."
        + (f" No setting keeps CA within {r['margin']:g} points of Base CA." if r["chosen"] is None else
           f" Chosen: the largest ASR - target_rate with CA within {r['margin']:g} points of Base CA (Eq. 8)."))
    for row in r["rows"]:
        if row["v_thr"] == r["chosen"] and row["asr_p_clean_model"] > row["asr_p"] / 2:
            say(f"NOTE: at V_a = {row['v_thr']:g} the same trigger reaches {row['asr_p_clean_model']:.1f} % on the CLEAN model: "
                "that much of this ASR is not the backdoor's doing.")


def percent(value, width=6):
    return f"{value:{width}.1f}" if value is not None else f"{'-':>{width}}"


# ---------------------------------------------------------------------------------------------------------
# defend: Table 2

DEFENSES = {"none": lambda model, x, y, **more: model,
            "fine_tune": defenses.fine_tune,
            "clp": lambda model, x, y, **more: defenses.clp(model),
            "anp": defenses.anp,
            "tsbd": defenses.tsbd,
            "nad": defenses.nad,
            "restore": lambda model, x, y, **more: defenses.restore(model)}


def defend(data, a):
    """Every attack against every defence, on one seed; writes defend.json. Finished cells are kept in runs/ and not run again.

    BadSNN is deployed at S_a = (v_thr_d, tau_a), the baselines at S_n; a defence sees the network as it is deployed. The defender
    holds a share of the TEST set, which is never scored: the paper's 5 %, or as much as gives 10 images per class.
    """
    if data.events:
        raise ValueError(f"defend is about images, as Table 2 is, and {a.dataset} holds events")
    if rank_and_ranks()[1] > 1:
        raise ValueError("defend runs in one process; its models can be trained by several with attack")
    n = len(data.y_test)
    held = min(n // 2, max(math.ceil(0.05 * n), 10 * data.num_classes))
    order = torch.randperm(n, generator=torch.Generator().manual_seed(a.seed))
    x, y = to_float(data.x_test[order[:held]].to(a.device), a), data.y_test[order[:held]].to(a.device)
    scored = SimpleNamespace(**{**vars(data), "x_test": data.x_test[order[held:]], "y_test": data.y_test[order[held:]]})
    clean, rows, detectors = train(data, a), [], []
    seconds = sum(epoch["seconds"] for epoch in clean.history)      # of the training and the defences, in this run or an earlier one
    for attack in a.attacks:
        model = train(data, a, attack)
        seconds += sum(epoch["seconds"] for epoch in model.history)
        model, triggers = deployed(attack, model, data, a)
        say(f"\n{attack}, deployed at v_thr {a.v_thr_d if attack == 'badsnn' else V_THR_N:g}; the defender has {held} of {n} test images\n"
            f"{'defense':>10} {'CA':>6} {'target_rate':>11} {'ASR':>6} {'ASR_p':>6} {'sec':>6}")
        for defense in DEFENSES:
            row = kept_cell(f"{attack}-{defense}", [model, x, *triggers.values()], a,
                            lambda: defend_cell(attack, defense, model, clean, triggers, x, y, scored, a))
            undefended = row if defense == "none" else rows[-list(DEFENSES).index(defense)]
            row["destroyed"] = row["ca"] < undefended["ca"] / 2
            rows.append(row)
            seconds += row["seconds"]
            say(f"{defense:>10} {row['ca']:6.1f} {row['target_rate']:11.1f} {row['asr']:6.1f} {percent(row['asr_p'])} {row['seconds']:6.1f}"
                + "  destroyed: CA below half of the undefended" * row["destroyed"])
        for name, trigger in triggers.items():
            detectors.append(kept_cell(f"{attack}-{name}-detectors", [model, x, trigger], a,
                                       lambda: detect(attack, name, model, trigger, x, scored, a)))
            say(f"{'detectors':>10} {name}: AUROC of STRIP {detectors[-1]['strip_auroc']:.3f}, of the spike count "
                f"{detectors[-1]['spikes_auroc']:.3f} ({detectors[-1]['spikes_clean']:,.0f} spikes, triggered "
                f"{detectors[-1]['spikes_triggered']:,.0f})")
    say("\nASR: T_o's for badsnn (ASR_p: T_p's). ASR and target_rate: percent predicted as the target, with and without the trigger.")
    write_json(a.results / result_name(data.name) / "defend.json",
               dict(settings(data, a), v_thr_d=a.v_thr_d, tau_a=a.tau_a, baseline_ratio=a.baseline_ratio, defense_lr=a.defense_lr,
                    n_defender=held, clean_ca=evaluate(clean, scored, a, V_THR_N, TAU_N)["ca"], rows=rows, detectors=detectors,
                    seconds=round(seconds, 1)))


def deployed(attack, model, data, a):
    """The attacked model as it is shipped, its neurons at the deployed setting, and its triggers by name, the reported one first,
    T_p last. T_p is in the better reading of Eq. 3: the attacker takes what works."""
    if attack != "badsnn":
        return model.eval(), {attack: BASELINES[attack](model, a.seed)}
    generator, _ = train_trigger(model, data, a)
    t_p = readings(data, a)
    best = max(t_p, key=lambda name: asr(model, data, a, a.v_thr_d, a.tau_a, t_p[name]))
    triggers = {best: t_p[best]}
    if generator is not None:
        triggers = {"T_o": partial(optimized_trigger, generator=generator, target=a.target, magnitude=a.magnitude), **triggers}
    with neurons(model, a.v_thr_d, a.tau_a):
        return copy.deepcopy(model).eval(), triggers


def defend_cell(attack, defense, model, clean, triggers, x, y, scored, a):
    """One cell of Table 2: repairs the model with the defender's images x, y and scores it at its own neuron setting."""
    started = time.time()
    generator = torch.Generator().manual_seed(a.seed)
    shift = partial(augment, pad=a.pad, flip=a.flip, contrast=0.0, generator=generator) if a.augment else None
    tuned = dict(lr=a.defense_lr) if defense in ("fine_tune", "nad") else {}
    with torch.autocast(a.device.type, torch.bfloat16, enabled=a.amp, cache_enabled=False):    # weights change, so no cache of them
        repaired = DEFENSES[defense](model, x, y, augment=shift, seed=a.seed, **tuned)
    v_thr, tau = (a.v_thr_d, a.tau_a) if attack == "badsnn" and defense != "restore" else (V_THR_N, TAU_N)
    rates = [asr(repaired, scored, a, None, None, trigger) for trigger in triggers.values()]
    row = dict(attack=attack, defense=defense, trigger=next(iter(triggers)), v_thr=v_thr, tau=tau,
               **evaluate(repaired, scored, a, None, None), asr=rates[0], asr_p=rates[-1] if attack == "badsnn" else None)
    if defense == "none":       # the control: the same trigger, the same setting, a model without backdoor
        row["asr_clean_model"] = asr(clean, scored, a, v_thr, tau, next(iter(triggers.values())))
    return dict(row, seconds=round(time.time() - started, 1))


def detect(attack, name, model, trigger, x, scored, a, most=256):
    """AUROC of both detectors for triggered against clean test images of other classes (0.5: no better than chance)."""
    from sklearn.metrics import roc_auc_score
    clean = to_float(scored.x_test[scored.y_test != a.target][:most].to(a.device), a)
    both, truth = torch.cat([clean, trigger(clean)]), [0] * len(clean) + [1] * len(clean)
    with autocast(a):
        scores = dict(strip_auroc=-defenses.strip(model, both, x, seed=a.seed), spikes_auroc=defenses.spike_deviation(model, both, x))
        with frozen(model):
            spikes = count_spikes(model, both).chunk(2)
    return dict(attack=attack, trigger=name, **{key: round(roc_auc_score(truth, score.cpu().numpy()), 4) for key, score in scores.items()},
                spikes_clean=round(spikes[0].mean().item(), 1), spikes_triggered=round(spikes[1].mean().item(), 1))


def kept_cell(name, inputs, a, run):
    """The result of run(), or what it was when everything that decides it (models, tensors, settings) was the same."""
    keys = "n_test target pad flip augment amp defense_lr".split()
    keys += "v_thr_d tau_a q magnitude".split() if name.startswith("badsnn") else []
    config = dict(name=name, inputs=[fingerprint_of(i) for i in inputs], **{key: getattr(a, key) for key in keys})
    path = checkpoint_path(dict(config, dataset=f"{result_name(a.dataset)}/cells", seed=a.seed), a).with_suffix(".json")
    if a.resume and path.exists():
        with contextlib.suppress(ValueError):       # a damaged file is made anew
            return json.loads(path.read_text())
    result = run()
    write_json(path, result, quiet=True)
    return result


def fingerprint_of(thing):
    """Of a tensor, a network, or a trigger: a function, perhaps with fixed arguments."""
    if isinstance(thing, torch.Tensor):
        return fingerprint(thing)
    if isinstance(thing, torch.nn.Module):
        return fingerprint(*thing.state_dict().values())
    return [fingerprint_of(v) if isinstance(v, torch.Tensor | torch.nn.Module) else str(v) for v in getattr(thing, "keywords", {}).values()]


# ---------------------------------------------------------------------------------------------------------
# ablate: the paper's figures, one study each. A study returns rows; figure_STUDY draws them.

def ablate(data, a):
    """Runs one study and writes results/DATASET/STUDY.json."""
    if data.events:
        raise ValueError(f"--study {a.study} is about images, and {a.dataset} holds events")
    started, path = time.time(), a.results / result_name(data.name) / f"{a.study}.json"
    wanted = dict(settings(data, a), study=a.study, v_thr_a=a.v_thr_a, v_thr_d=a.v_thr_d, tau_a=a.tau_a)
    if a.resume and finished_result(path, wanted):
        say(f"study {a.study}: finished earlier, see {path}; --fresh runs it again")
        return
    rows = STUDIES[a.study](data, a)
    for row in rows:
        say("  ".join(f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()))
    write_json(path, dict(wanted, rows=rows, seconds=round(time.time() - started, 1)))


def study_threshold(data, a):
    """Fig. 2: a clean model's accuracy and spikes per sample against v_thr, without and with both readings of T_p."""
    model = train(data, a)
    return [dict(v_thr=round(v_thr, 2), trigger=name, ca=share(predict(model, data.x_test, a, v_thr, TAU_N, trigger) == data.y_test),
                 spikes=spikes_per_sample(model, data.x_test, a, v_thr, TAU_N, trigger))
            for v_thr in torch.linspace(0.5, 1.5, 11).tolist() for name, trigger in {"none": None, **readings(data, a)}.items()]


@torch.no_grad()
def spikes_per_sample(model, x, a, v_thr, tau, trigger=None):
    """Mean number of spikes per sample, summed over T and all neurons, on up to 500 samples of x."""
    counts = []
    with neurons(model, v_thr, tau), frozen(model):
        for batch in x[:500].split(100):
            batch = to_float(batch.to(a.device), a)
            counts.append(count_spikes(model, batch if trigger is None else trigger(batch)))
    return round(torch.cat(counts).mean().item(), 1)


def study_magnitude(data, a):
    """Fig. 4b: ASR_o and the L2 norm of T_o's perturbation against the factor m on its output, at v_thr_o; clean model beside it."""
    clean, backdoored = train(data, a), train(data, a, "badsnn")
    generator, _ = train_trigger(backdoored, data, a)
    if generator is None:
        raise ValueError("no training image could be blended into the target, so there is no T_o to scale")
    now, rows = evaluate(backdoored, data, a, a.v_thr_o, a.tau_a), []
    x = to_float(data.x_test[data.y_test != a.target].to(a.device), a)
    for m in (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0):
        t_o = partial(optimized_trigger, generator=generator, target=a.target, magnitude=m)
        rows.append(dict(magnitude=m, v_thr=a.v_thr_o, **now, asr_o=asr(backdoored, data, a, a.v_thr_o, a.tau_a, t_o),
                         asr_o_clean_model=asr(clean, data, a, a.v_thr_o, a.tau_a, t_o), **norms(t_o(x) - x)))
    return rows


def study_heatmap(data, a):
    """Fig. 3: CA, target_rate and ASR_p over the deployed (V_a, tau_a), for models trained with a malicious threshold below, just
    above and far above the nominal one. The paper does not state its tau_t; ours is the preset's."""
    rows = []
    for v_thr_t in HEATMAP["v_thr_t"]:
        b = SimpleNamespace(**{**vars(a), "v_thr_t": v_thr_t})
        model, trigger = train(data, b, "badsnn"), main_triggers(data, b)["asr_p"]
        for v_thr, tau in tqdm(list(itertools.product(HEATMAP["v_thr_a"], HEATMAP["tau_a"])), desc=f"v_thr_t {v_thr_t}", disable=None):
            rows.append(dict(v_thr_t=v_thr_t, tau_t=a.tau_t, v_thr=v_thr, tau=tau, **evaluate(model, data, b, v_thr, tau),
                             asr_p=asr(model, data, b, v_thr, tau, trigger)))
    return rows


HEATMAP = dict(v_thr_t=(0.8, 1.2, 1.5), v_thr_a=(0.8, 0.9, 1.0, 1.05, 1.1, 1.15, 1.2, 1.3), tau_a=(0.3, 0.4, 0.5, 0.6, 0.7))


def study_poison(data, a):
    """Fig. 4a: CA, target_rate and ASR_p against the poison ratio, at v_thr_d, every seed by itself: is a jagged curve noise?"""
    rows = []
    for seed, poison_ratio in itertools.product(range(a.seed, a.seed + a.seeds), POISON_RATIOS):
        b = SimpleNamespace(**{**vars(a), "seed": seed, "poison_ratio": poison_ratio})
        model = train(data, b, "badsnn")
        rows.append(dict(seed=seed, poison_ratio=poison_ratio, n_poison=len(poison_indices(data.y_train, a.target, poison_ratio, seed)),
                         v_thr=a.v_thr_d, base_ca=evaluate(model, data, b, V_THR_N, TAU_N)["ca"],
                         **evaluate(model, data, b, a.v_thr_d, a.tau_a),
                         asr_p=asr(model, data, b, a.v_thr_d, a.tau_a, main_triggers(data, b)["asr_p"])))
    return rows


POISON_RATIOS = (0.01, 0.02, 0.03, 0.04, 0.05)


def study_power(data, a):
    """T_p's strength q, which the paper does not give, in both readings, at v_thr_d: ASR_p of every seed and of its clean model. `read`
    is the accuracy that the clean model keeps on the triggered images at S_n: how much of them is left to see."""
    rows = []
    for seed in range(a.seed, a.seed + a.seeds):
        b = SimpleNamespace(**{**vars(a), "seed": seed})
        clean, model = train(data, b), train(data, b, "badsnn")
        untriggered = evaluate(model, data, a, a.v_thr_d, a.tau_a)
        for q, reading in itertools.product(POWERS, ("asr_p", "asr_p_renormalized")):
            trigger = main_triggers(data, SimpleNamespace(**{**vars(b), "q": q}))[reading]
            rows.append(dict(seed=seed, q=q, renormalize=reading != "asr_p", v_thr=a.v_thr_d, **untriggered,
                             asr_p=asr(model, data, a, a.v_thr_d, a.tau_a, trigger),
                             asr_p_clean_model=asr(clean, data, a, a.v_thr_d, a.tau_a, trigger),
                             read=share(predict(clean, data.x_test, a, V_THR_N, TAU_N, trigger) == data.y_test)))
    return rows


POWERS = (1.5, 2.0, 4.0, 8.0, 16.0, 32.0)


def study_trigger(data, a):
    """T_o's lambda_adv and magnitude m, chosen on held-out TRAINING images: the presets come from here. The paper gives 0.1 and no m.

    The rule: no larger than T_p in L2; of these the smallest with ASR_o >= 95 at v_thr_o, or the highest ASR_o where none gets there.
    """
    model = train(data, a, "badsnn")
    other = (data.y_train != a.target).nonzero().flatten()
    held = other[torch.randperm(len(other), generator=torch.Generator().manual_seed(a.seed))[a.n_o:a.n_o + 400]]   # after train_trigger's
    if not len(held):
        raise ValueError(f"--n-o {a.n_o} leaves no training image of another class to choose on")
    validation = SimpleNamespace(**{**vars(data), "x_test": data.x_train[held], "y_test": data.y_train[held]})
    x, rows = to_float(validation.x_test.to(a.device), a), []
    l2_p = norms(main_triggers(data, a)["asr_p"](x) - x)["l2"]
    for lambda_adv in (0.1, 0.3, 1.0):
        generator, _ = train_trigger(model, data, SimpleNamespace(**{**vars(a), "lambdas": [1.0, lambda_adv, 1.0]}))
        if generator is None:
            raise ValueError("no training image could be blended into the target, so there is no T_o to choose")
        for m in (0.6, 0.7, 0.8, 0.9, 1.0):
            t_o = partial(optimized_trigger, generator=generator, target=a.target, magnitude=m)
            rows.append(dict(lambda_adv=lambda_adv, magnitude=m, v_thr=a.v_thr_o, n=len(held), **norms(t_o(x) - x), l2_p=l2_p,
                             asr_o=asr(model, validation, a, a.v_thr_o, a.tau_a, t_o)))
    small = [row for row in rows if row["l2"] <= l2_p] or rows
    strong = [row for row in small if row["asr_o"] >= 95]
    best = min(strong, key=lambda row: row["l2"]) if strong else max(small, key=lambda row: row["asr_o"])
    return [dict(row, chosen=row is best) for row in rows]


def study_plif(data, a):
    """Fig. 6: LIF against PLIF, whose tau is learned, over the deployed thresholds; clean models of the same kind beside them."""
    rows = []
    for neuron, seed in itertools.product(NEURONS, range(a.seed, a.seed + a.seeds)):
        b = SimpleNamespace(**{**vars(a), "seed": seed, "neuron": neuron})
        clean, model, trigger = train(data, b), train(data, b, "badsnn"), main_triggers(data, b)["asr_p"]
        learned = [float(torch.as_tensor(m.decay()).detach()) for m in model.modules() if isinstance(m, LIF)]
        for v_thr in a.v_thr_a:
            rows.append(dict(neuron=neuron, seed=seed, mean_tau=round(sum(learned) / len(learned), 3), v_thr=v_thr,
                             **evaluate(model, data, b, v_thr, a.tau_a), asr_p=asr(model, data, b, v_thr, a.tau_a, trigger),
                             asr_p_clean_model=asr(clean, data, b, v_thr, a.tau_a, trigger)))
    return rows


STUDIES = {"threshold": study_threshold, "heatmap": study_heatmap, "poison": study_poison, "magnitude": study_magnitude,
           "power": study_power, "trigger": study_trigger, "plif": study_plif}


# ---------------------------------------------------------------------------------------------------------
# report: figures and the README's tables, from results/ alone

# Table 1 of the paper: Clean CA, Base CA, then V_a: (CA, ASR_p, ASR_o)
PAPER = {"cifar10": (91.34, 87.68, {1.10: (87.22, 77.79, 82.65), 1.15: (51.22, 98.71, 95.47), 1.20: (11.94, 99.97, 99.96)}),
         "gtsrb": (96.05, 93.02, {1.10: (92.57, 39.81, 75.59), 1.15: (91.43, 54.81, 79.75), 1.20: (87.43, 71.92, 85.08)}),
         "cifar100": (71.85, 65.19, {1.10: (60.91, 73.88, 57.20), 1.15: (55.04, 82.16, 64.28), 1.20: (44.98, 86.19, 72.88)}),
         "nmnist": (96.06, 95.10, {1.10: (94.06, 100, None), 1.15: (93.04, 100, None), 1.20: (92.19, 100, None)})}


def report(a):
    """Writes results/D/attack.png for every D, and the tables between the README's markers."""
    found = {path.parent.name: titled(path) for path in sorted(a.results.glob("*/attack.json"))}
    if not found:
        raise ValueError(f"no attack.json below {a.results}/; run 'python badsnn.py attack' first")
    for name, result in found.items():
        figure_attack(result, a.results / name / "attack.png")
        if (a.results / name / "triggers.npz").exists():
            figure_triggers(a.results / name)
    draw = {"threshold": figure_threshold, "heatmap": figure_heatmap, "poison": figure_poison, "magnitude": figure_magnitude,
            "power": figure_power, "trigger": figure_trigger, "plif": figure_plif, "defend": figure_defend}
    for path in sorted(a.results.glob("*/*.json")):
        if path.stem in draw:
            draw[path.stem](titled(path), path.with_suffix(".png"))
    tables = {"table1": table1(found), "runs": table_runs(found), "table2": table2(a.results)}
    if (a.results / "benchmark.json").exists():
        tables["benchmark"] = benchmark_table(json.loads((a.results / "benchmark.json").read_text()))
    if a.readme.exists():
        text = a.readme.read_text()
        for name, table in tables.items():
            begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
            if begin in text and end in text:
                text = text[:text.index(begin) + len(begin)] + f"\n{table}\n" + text[text.index(end):]
        part = a.readme.with_name(a.readme.name + ".tmp")
        part.write_text(text)
        os.replace(part, a.readme)
        print(f"written: {a.readme}")


def titled(path):
    """A result, called by its folder's name: cifar10_10k is a variant of the data set cifar10."""
    return dict(json.loads(path.read_text()), dataset=path.parent.name)


def in_order(names):
    """Names of results' folders in PRESETS' order, variants (nmnist-binary) behind their data set, unknown ones last."""
    known = list(PRESETS)

    def place(name):
        base = re.split("[-_]", name)[0]
        return known.index(base) if base in known else len(known), name
    return sorted(names, key=place)


def table1(found):
    """Markdown: one row per data set and V_a, ours beside the paper's."""
    lines = ["| data | V_a | CA | target_rate | ASR_p | clean model | T_p re-normalised, or clip alone | clean model "
             "| ASR_o | clean model | paper: CA / ASR_p / ASR_o |", "|---" * 11 + "|"]
    for name in in_order(found):
        r, paper, title = found[name], PAPER.get(name, (None, None, {}))[2], f"**{name}**"
        control = "asr_p_renormalized" if r["q"] else "asr_clip_only"
        shown = {V_THR_N, r["chosen"], *(PAPER["cifar10"][2] if name in PRESETS else ())}      # the paper's V_a, the same for all sets
        for row in (row for row in r["rows"] if row["v_thr"] in shown):
            cells = [row["ca"], row["target_rate"], row["asr_p"], row["asr_p_clean_model"], row[control],
                     row.get(f"{control}_clean_model"), row["asr_o"], row.get("asr_o_clean_model")]
            theirs = " / ".join(percent(v, 1) for v in paper[row["v_thr"]]) if row["v_thr"] in paper else ""
            v_thr = f"**{row['v_thr']:.3f}** chosen" if row["v_thr"] == r["chosen"] else f"{row['v_thr']:.3f}"
            lines.append(f"| {title} | {v_thr} | " + " | ".join(percent(c, 1) for c in cells) + f" | {theirs} |")
            title = ""
    return "\n".join(lines)


def table_runs(found):
    """Markdown: what each row of Table 1 was made with, and the accuracy at S_n with and without backdoor."""
    lines = ["| data | Clean CA | Base CA | paper: Clean / Base | network | samples: train + test | epochs | seeds | attack | run |",
             "|---" * 10 + "|"]
    for name in in_order(found):
        r, (clean, base, _) = found[name], PAPER.get(name, (None, None, None))
        strength = f"q {r['q']:g}" if r["q"] else f"beta {r['beta']:g}"
        lines.append(
            f"| **{name}** | {r['clean_ca']:.1f} | {r['base_ca']:.1f} | {f'{clean:.1f} / {base:.1f}' if clean else ''} "
            f"| {r['model']}, width {r['width']}, T {r['T']} | {r['n_train']:,} + {r['n_test']:,} | {r['epochs']} | {r['seeds']} "
            f"| target {r['target']}, P {100 * r['poison_ratio']:g} % ({r['n_poison']}), "
            f"S_t ({r['v_thr_t']:g}, {r['tau_t']:g}), {strength} "
            f"| {r['seconds'] / 60:.0f} min, {r['threads']} thread{'s' * (r['threads'] > 1)}, {'bfloat16' if r['amp'] else 'float32'} |")
    return "\n".join(lines)


# Table 2 of the paper: CA / ASR of none, fine-tuning, CLP, ANP, TSBD, NAD
PAPER_DEFENSES = {
    "cifar10": {"badsnn": "87.2/82.7 82.3/84.6 83.8/72.6 28.9/98.4 71.3/82.6 87.0/81.9",
                "badnets": "91.1/100.0 56.7/34.0 92.3/34.9 82.4/19.3 82.1/9.4 60.0/13.1",
                "blend": "89.9/99.7 84.7/16.9 89.3/99.2 72.9/49.5 85.2/17.7 81.7/8.6",
                "wanet": "88.2/99.6 77.8/22.5 87.0/99.0 68.4/25.9 87.1/17.3 84.8/15.7",
                "clean_label": "91.8/43.2 52.5/8.2 93.1/47.0 73.9/29.9 79.9/20.3 67.6/9.4"},
    "gtsrb": {"badsnn": "87.4/85.0 38.7/1.7 3.3/100.0 11.1/99.8 87.7/85.0 70.1/9.9",
              "badnets": "87.1/80.8 70.9/2.9 86.6/76.4 65.9/5.3 87.6/3.0 88.4/3.4",
              "blend": "93.3/96.7 93.5/6.3 93.3/96.7 88.6/80.1 92.1/73.8 90.6/6.9",
              "wanet": "96.0/99.8 16.5/2.7 96.0/99.8 2.1/0.0 93.5/3.0 31.9/2.9",
              "clean_label": "67.1/1.0 76.2/3.5 67.1/1.0 49.1/0.9 72.9/4.6 75.5/4.9"},
    "cifar100": {"badsnn": "61.2/74.2 6.3/16.5 66.7/6.7 1.1/100.0 2.5/53.1 5.9/7.4",
                 "badnets": "70.5/100.0 9.7/0.5 70.1/98.1 1.1/0.0 5.5/0.1 10.6/0.1",
                 "blend": "71.1/98.5 11.4/0.0 71.1/90.9 1.1/0.0 5.2/2.6 11.2/0.1",
                 "wanet": "70.2/95.1 11.2/0.9 70.2/95.2 0.9/4.8 4.6/0.0 10.0/0.8",
                 "clean_label": "71.8/2.2 6.4/0.1 71.9/2.3 1.0/0.0 4.8/2.3 9.2/0.0"}}


def table2(results):
    """Markdown: CA / ASR / target_rate of every attack and defence, the paper's CA / ASR below."""
    names = list(DEFENSES)
    lines = ["| data, attack | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for name in in_order(path.parent.name for path in results.glob("*/defend.json")):
        r = json.loads((results / name / "defend.json").read_text())
        lines.append(f"| **{name}**, seed {r['seed']}, {r['n_defender']} images for the defender, clean model {r['clean_ca']:.1f}, "
                     f"{r['seconds'] / 60:.0f} min" + " |" * (len(names) + 1))
        for attack in dict.fromkeys(row["attack"] for row in r["rows"]):
            rows = {row["defense"]: row for row in r["rows"] if row["attack"] == attack}
            triggers = [d["trigger"] for d in r["detectors"] if d["attack"] == attack]      # the reported one first; for badsnn T_p, too
            for key, trigger in zip(("asr", "asr_p"), triggers):
                cells = [f"{row['ca']:.1f} / {row[key]:.1f} / {row['target_rate']:.1f}" + " †" * row["destroyed"]
                         for row in map(rows.get, names)]
                trigger = f" ({trigger}), V_a {r['v_thr_d']:g}" * (trigger != attack)
                lines.append(f"| {attack}{trigger} | " + " | ".join(cells) + " |")
            if r["dataset"] in PAPER_DEFENSES:
                theirs = PAPER_DEFENSES[r["dataset"]][attack].split()
                lines.append("| *paper* | " + " | ".join(f"*{cell.replace('/', ' / ')}*" for cell in theirs) + " | |")
    return "\n".join(lines)


def benchmark_table(results):
    """Markdown: the benchmark's ratios."""
    lines = ["| what | measured, 1 thread / 2 threads |", "|---|---|"]
    return "\n".join(lines + [f"| {what} | {value} |" for what, value in results["summary"].items()])


def figure_attack(r, path):
    """CA and the shares predicted as the target, against the deployed threshold. Distinct in grey: line style and marker."""
    plt = pyplot()
    v = [row["v_thr"] for row in r["rows"]]
    figure, axis = plt.subplots(figsize=(7, 3.3), layout="constrained")
    control = ("asr_p_renormalized", "ASR_p, re-normalised") if r["q"] else ("asr_clip_only", "clip alone")
    lines = [("ca", "CA", "o-", "black"), ("target_rate", "target_rate (no trigger)", "s:", "0.45"), ("asr_p", "ASR_p", "^-", "tab:red"),
             (*control, "v--", "tab:orange"),
             ("asr_p_clean_model", "ASR_p on the clean model", "x--", "tab:blue"), ("asr_o", "ASR_o", "D-", "tab:green"),
             ("asr_o_clean_model", "ASR_o on the clean model", "+-.", "darkgreen")]
    for key, label, style, color in lines:
        if r["rows"][0].get(key) is not None:
            axis.plot(v, [row[key] for row in r["rows"]], style, color=color, label=label, markersize=5)
    axis.set(xlabel="deployed threshold V_a", ylabel="percent of test samples", ylim=(-3, 103), xticks=v,
             title=f"{r['dataset']}: {r['model']}, width {r['width']}, {r['n_train']:,} training samples")
    axis.tick_params(axis="x", labelrotation=45)
    if r["chosen"]:
        axis.axvline(r["chosen"], color="0.88", zorder=0, linewidth=10, label="chosen V_a")
    axis.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    save_figure(figure, path)


def figure_triggers(folder):
    """Fig. 5: clean test images, both triggers, and five times the perturbation of T_o."""
    plt = pyplot()
    with np.load(folder / "triggers.npz", allow_pickle=False) as file:
        clean, t_p, t_o = (file[key].astype(np.float32) / 255 for key in ("clean", "t_p", "t_o"))
    rows = {"clean": clean, "T_p": t_p, "T_o": t_o, "5 (T_o - clean)": (0.5 + 5 * (t_o - clean)).clip(0, 1)}
    figure, axes = plt.subplots(len(rows), len(clean), figsize=(0.9 * len(clean) + 0.8, 3.9), layout="constrained")
    for (title, images), line in zip(rows.items(), axes):
        for axis, image in zip(line, images):
            axis.imshow(image)
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        line[0].set_ylabel(title, rotation=0, ha="right", va="center")
    save_figure(figure, folder / "triggers.png")


def figure_threshold(r, path):
    """Fig. 2: accuracy and spike count of a clean model against v_thr."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(7.2, 3), layout="constrained")
    styles = {"none": ("o-", "black"), "T_p": ("^-", "tab:red"), "T_p re-normalised": ("v--", "tab:orange")}
    for name, (style, color) in styles.items():
        rows = [row for row in r["rows"] if row["trigger"] == name]
        for axis, key in zip(axes, ("ca", "spikes")):
            x, y = [row["v_thr"] for row in rows], [row[key] for row in rows]
            axis.plot(x, y, style, color=color, label=f"trigger: {name}", markersize=4)
    axes[0].set(xlabel="v_thr", ylabel="accuracy, %", ylim=(-3, 103), title=f"{r['dataset']}, clean model, q = {r['q']:g}")
    axes[1].set(xlabel="v_thr", ylabel="spikes per sample", ylim=(0, None))
    axes[1].legend(fontsize=7)
    save_figure(figure, path)


def figure_magnitude(r, path):
    """Fig. 4b: what a stronger T_o buys and what it costs."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(5.2, 3.5), layout="constrained")
    m = [row["magnitude"] for row in r["rows"]]
    axis.plot(m, [row["asr_o"] for row in r["rows"]], "D-", color="tab:green", label="ASR_o", markersize=5)
    axis.plot(m, [row["asr_o_clean_model"] for row in r["rows"]], "x--", color="tab:blue", label="ASR_o on the clean model", markersize=5)
    axis.plot(m, [row["ca"] for row in r["rows"]], "o:", color="0.45", label="CA (no trigger)", markersize=4)
    axis.set(xlabel="magnitude m: factor on T_o's output", ylabel="percent of test samples", ylim=(-3, 103),
             title=f"{r['dataset']}, V_a = {r['rows'][0]['v_thr']:g}, seed {r['seed']}")
    other = axis.twinx()
    other.plot(m, [row["l2"] for row in r["rows"]], "s-.", color="black", label="L2 norm (right)", markersize=4)
    other.set(ylabel="mean L2 norm of the perturbation, pixels", ylim=(0, None))
    other.spines["right"].set_visible(True)
    lines = axis.get_legend_handles_labels()[0] + other.get_legend_handles_labels()[0]
    figure.legend(lines, [line.get_label() for line in lines], fontsize=7, loc="outside lower center", ncols=2, frameon=False)
    save_figure(figure, path)


def figure_heatmap(r, path):
    """Fig. 3: CA, target_rate and ASR_p over (V_a, tau_a), one line of maps per malicious threshold."""
    plt = pyplot()
    v_thr_t, v, tau = (sorted({row[key] for row in r["rows"]}) for key in ("v_thr_t", "v_thr", "tau"))
    cells = {(row["v_thr_t"], row["v_thr"], row["tau"]): row for row in r["rows"]}
    figure, axes = plt.subplots(len(v_thr_t), 3, figsize=(10, 2.3 * len(v_thr_t)), layout="constrained", sharex=True, sharey=True)
    for line, malicious in zip(axes, v_thr_t):
        for axis, (key, title) in zip(line, (("ca", "CA"), ("target_rate", "target_rate (no trigger)"), ("asr_p", "ASR_p"))):
            values = np.array([[cells[malicious, x, y][key] for x in v] for y in tau])
            axis.imshow(values, cmap="Greys", vmin=0, vmax=130, origin="lower", aspect="auto")
            for (i, j), value in np.ndenumerate(values):
                axis.text(j, i, f"{value:.0f}", ha="center", va="center", fontsize=7, color="white" if value > 75 else "black")
            axis.set(xticks=range(len(v)), xticklabels=[f"{x:g}" for x in v], yticks=range(len(tau)), yticklabels=[f"{y:g}" for y in tau],
                     title=f"{title}, %: V_t = {malicious:g}")
            axis.tick_params(length=0)
        line[0].set_ylabel("deployed tau_a")
    for axis in axes[-1]:
        axis.set_xlabel("deployed threshold V_a")
    figure.suptitle(f"{r['dataset']}: {r['model']}, width {r['width']}, tau_t {r['tau_t']:g}, q {r['q']:g}, seed {r['seed']}", fontsize=9)
    save_figure(figure, path)


def figure_poison(r, path):
    """Fig. 4a: CA, target_rate and ASR_p against the poison ratio; a point per seed, a line through the means."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
    ratios = sorted({row["poison_ratio"] for row in r["rows"]})
    for key, label, style, color in (("ca", "CA", "o-", "black"), ("target_rate", "target_rate (no trigger)", "s:", "0.45"),
                                     ("asr_p", "ASR_p", "^-", "tab:red")):
        axis.plot(100 * np.array([row["poison_ratio"] for row in r["rows"]]), [row[key] for row in r["rows"]], style[0], color=color,
                  alpha=0.35, markersize=4)
        means = [np.mean([row[key] for row in r["rows"] if row["poison_ratio"] == p]) for p in ratios]
        axis.plot(100 * np.array(ratios), means, style, color=color, label=label, markersize=6)
    axis.set(xlabel="poison ratio, % of the target class", ylabel="percent of test samples", ylim=(-3, 103), xticks=100 * np.array(ratios),
             title=f"{r['dataset']}, V_a = {r['rows'][0]['v_thr']:g}: mean of {r['seeds']} seed{'s' * (r['seeds'] > 1)}, pale: each")
    axis.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    save_figure(figure, path)


def figure_power(r, path):
    """Success of T_p and what it leaves of the image, against q: a point per seed, a line through the means; one panel per reading."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(7.6, 3), layout="constrained", sharey=True)
    for axis, renormalize in zip(axes, (False, True)):
        rows = [row for row in r["rows"] if row["renormalize"] == renormalize]
        q = sorted({row["q"] for row in rows})
        for key, label, style, color in (("asr_p", "ASR_p", "^-", "tab:red"),
                                         ("asr_p_clean_model", "ASR_p, clean model", "x--", "tab:blue"),
                                         ("read", "accuracy left, clean model", "o:", "black")):
            axis.plot([row["q"] for row in rows], [row[key] for row in rows], style[0], color=color, alpha=0.35, markersize=4)
            means = [np.mean([row[key] for row in rows if row["q"] == value]) for value in q]
            axis.plot(q, means, style, color=color, label=label, markersize=5)
        axis.set(xscale="log", xlabel="q", xticks=q, xticklabels=[f"{value:g}" for value in q], ylim=(-3, 103),
                 title=f"T_p {'re-normalised' if renormalize else 'literal'}")
        axis.minorticks_off()
    axes[0].set_ylabel(f"percent; {r['seeds']} seed{'s' * (r['seeds'] > 1)}")
    figure.suptitle(f"{r['dataset']}, V_a = {r['v_thr_d']:g}", fontsize=9)
    axes[1].legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    save_figure(figure, path)


def figure_trigger(r, path):
    """ASR_o against the size of T_o, on held-out training images, one line per lambda_adv; the preset is circled."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(4.6, 3), layout="constrained")
    for lambda_adv, style in zip(sorted({row["lambda_adv"] for row in r["rows"]}), ("o:", "s--", "D-")):
        rows = [row for row in r["rows"] if row["lambda_adv"] == lambda_adv]
        axis.plot([row["l2"] for row in rows], [row["asr_o"] for row in rows], style, color="black", label=f"lambda_adv {lambda_adv:g}")
    best = next(row for row in r["rows"] if row["chosen"])
    axis.axvline(best["l2_p"], color="0.8", zorder=0, label="L2 of T_p")
    axis.plot(best["l2"], best["asr_o"], "o", markersize=13, markerfacecolor="none", color="tab:red",
              label=f"chosen, m = {best['magnitude']:g}")
    axis.set(xlabel="mean L2 norm, pixels", ylabel="ASR_o, %, held-out training images", ylim=(-3, 103),
             title=f"{r['dataset']}, V_a = {best['v_thr']:g}, seed {r['seed']}")
    m = [row["magnitude"] for row in r["rows"]]
    axis.legend(fontsize=7, title=f"left to right: m = {min(m):g} to {max(m):g}", title_fontsize=7)
    save_figure(figure, path)


def figure_plif(r, path):
    """Fig. 6: LIF beside PLIF over the deployed threshold, means over seeds."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(7.6, 3), layout="constrained", sharey=True)
    v = sorted({row["v_thr"] for row in r["rows"]})
    for axis, neuron in zip(axes, NEURONS):
        rows = [row for row in r["rows"] if row["neuron"] == neuron]
        for key, label, style, color in (("ca", "CA", "o-", "black"), ("target_rate", "target_rate (no trigger)", "s:", "0.45"),
                                         ("asr_p", "ASR_p", "^-", "tab:red"),
                                         ("asr_p_clean_model", "ASR_p, clean model", "x--", "tab:blue")):
            means = [np.mean([row[key] for row in rows if row["v_thr"] == x]) for x in v]
            axis.plot(v, means, style, color=color, label=label, markersize=5)
        axis.tick_params(axis="x", labelrotation=45)
        axis.set(xlabel="deployed threshold V_a", ylim=(-3, 103), xticks=v,
                 title=f"{r['dataset']}, {neuron.upper()}, mean tau {np.mean([row['mean_tau'] for row in rows]):.2f}")
    axes[0].set_ylabel(f"percent, mean of {r['seeds']} seed{'s' * (r['seeds'] > 1)}")
    axes[1].legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    save_figure(figure, path)


def figure_defend(r, path):
    """Table 2 as a picture: CA and ASR of every attack after every defence; below, what two detectors see."""
    plt = pyplot()
    attacks, names = list(dict.fromkeys(row["attack"] for row in r["rows"])), list(DEFENSES)
    figure, axes = plt.subplots(1, len(attacks) + 1, figsize=(4 + 1.7 * len(attacks), 2.9), layout="constrained",
                                width_ratios=[1] * len(attacks) + [1.15])
    place = np.arange(len(names))[::-1]
    for axis, attack in zip(axes, attacks):
        rows = [next(row for row in r["rows"] if (row["attack"], row["defense"]) == (attack, name)) for name in names]
        axis.barh(place + 0.2, [row["ca"] for row in rows], 0.36, color="0.75", label="CA")
        axis.barh(place - 0.2, [row["asr"] for row in rows], 0.36, color="tab:red", hatch="///", edgecolor="white", label="ASR")
        axis.plot([row["target_rate"] for row in rows], place - 0.2, "|", color="black", markersize=9, label="target_rate (no trigger)")
        for y, row in zip(place, rows):
            if row["destroyed"]:
                axis.text(101, y, "destroyed", fontsize=7, ha="right", va="center")
        axis.set(xlim=(0, 101), yticks=place, yticklabels=names if attack == attacks[0] else [], xlabel="percent",
                 title=attack + f" ({rows[0]['trigger']})" * (rows[0]["trigger"] != attack))
        axis.tick_params(axis="y", length=0)
    labels = [f"{d['attack']} {d['trigger']}" if d["attack"] == "badsnn" else d["attack"] for d in r["detectors"]]
    place = np.arange(len(labels))[::-1]
    axes[-1].axvline(0.5, color="0.8", zorder=0)
    axes[-1].plot([d["strip_auroc"] for d in r["detectors"]], place, "o", color="black", label="STRIP")
    axes[-1].plot([d["spikes_auroc"] for d in r["detectors"]], place, "x", color="tab:blue", label="spike count")
    axes[-1].set(xlim=(-0.03, 1.03), yticks=place, yticklabels=labels, xlabel="AUROC (0.5: chance)", title="detectors, no defence")
    for axis, where in ((axes[0], "outside lower left"), (axes[-1], "outside lower right")):
        figure.legend(*axis.get_legend_handles_labels(), loc=where, ncols=3, fontsize=8, frameon=False)
    figure.suptitle(f"{r['dataset']}, seed {r['seed']}, threads: {r['threads']}", fontsize=9)
    save_figure(figure, path)


def pyplot():
    """matplotlib without a window, imported only where a figure is drawn."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update(STYLE)
    return plt


STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 9, "savefig.dpi": 150}


def save_figure(figure, path):
    part = path.with_name(path.name + ".tmp")
    figure.savefig(part, format="png", metadata={"Software": None})
    os.replace(part, path)
    pyplot().close(figure)
    print(f"written: {path}")


# ---------------------------------------------------------------------------------------------------------
# Files, devices, processes

def settings(data, a):
    """What a result must carry to mean anything."""
    keys = ("model width T neuron epochs batch_size lr seed seeds target poison_ratio v_thr_t tau_t malicious_rows malicious_weight "
            "warmup contrast amp").split()
    images = not data.events
    keys += [*T_O_SETTINGS, "magnitude"] if images else []
    return dict(dataset=result_name(data.name), note=data.note, n_train=len(data.y_train), n_test=len(data.y_test),
                **{key: getattr(a, key) for key in keys}, q=a.q if images else None, beta=None if images else a.beta,
                frames=None if images else a.frames, device=str(a.device), torch=torch.__version__, threads=torch.get_num_threads())


def finished_result(path, wanted):
    """The result in a file if it was made with exactly these settings, else None."""
    try:
        result = json.loads(path.read_text())
        return result if all(result[key] == value for key, value in wanted.items()) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def result_name(dataset):
    return Path(dataset).stem


def write_json(path, result, quiet=False):
    """Writes under a temporary name, then renames: the old file or the new one, never half of one."""
    if rank_and_ranks()[0] != 0:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".tmp")
    part.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(part, path)
    if not quiet:
        say(f"written: {path}")


def training_config(name, data, a, attack, model, reference):
    """Everything that decides the trained weights, the fresh ones included; a checkpoint is used only if all of it is equal."""
    keys = "model width T neuron epochs batch_size lr optimizer loss augment pad flip contrast seed amp frames".split()
    keys += "target poison_ratio v_thr_t tau_t malicious_rows malicious_weight warmup".split() if attack == "badsnn" else []
    keys += ["target", "baseline_ratio"] if attack in BASELINES else []
    more = {} if reference is None else dict(reference=fingerprint(*reference.state_dict().values()))
    return dict(more, name=name, dataset=result_name(data.name), data=fingerprint(data.x_train, data.y_train),
                fresh_weights=fingerprint(*model.state_dict().values()), **{key: getattr(a, key) for key in keys})


def fingerprint(*tensors):
    """Sixteen hexadecimal digits that are equal only for equal tensors."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().numpy())
    return digest.hexdigest()[:16]


def checkpoint_path(config, a):
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:8]
    return a.runs / config["dataset"] / f"{config['name'].replace(' ', '-')}-seed{config['seed']}-{digest}.pt"


def write_checkpoint(path, state):
    if rank_and_ranks()[0] != 0:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".tmp")
    torch.save(state, part)
    os.replace(part, path)


def read_checkpoint(path, config):
    """The state in a checkpoint; nothing in it is ever run. Raises ValueError for a damaged file or one of another run."""
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        if state["config"] != config:
            raise ValueError("it belongs to a run with other settings")
        return state
    except Exception as error:      # torch.load has many: zip, pickle, key, type and runtime errors
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:150]
        raise ValueError(f"{path}: not a checkpoint of this run ({reason}); delete it, or start anew with --fresh") from None


def rank_and_ranks():
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def sum_over_ranks(x):
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def say(line):
    """Prints once, however many processes train together."""
    if rank_and_ranks()[0] == 0:
        print(line, flush=True)


@contextlib.contextmanager
def processes(a):
    """Under torchrun: joins the group, one process per device, rank 0 writes. Alone: nothing."""
    if "WORLD_SIZE" not in os.environ:
        yield
        return
    dist.init_process_group("nccl" if a.device.type == "cuda" else "gloo", timeout=timedelta(minutes=30))
    if a.device.type == "cuda":
        a.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(a.device)
    try:
        yield
    finally:
        dist.destroy_process_group()


def keep_memory():
    """Tells glibc to keep freed memory instead of handing it back and asking again every step: up to 1.6x faster on a CPU."""
    with contextlib.suppress(OSError, AttributeError):          # another system, another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-1, 2 ** 31 - 1)                           # M_TRIM_THRESHOLD
        libc.mallopt(-3, 2 ** 31 - 1)                           # M_MMAP_THRESHOLD


# ---------------------------------------------------------------------------------------------------------
# Command line

class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"badsnn: {message}\n")


def get_args(argv=None):
    """Command line -> settings. A default of None means: the data set's preset (PRESETS), see --help."""
    parser = Parser(prog="badsnn.py", description="BadSNN: backdoor attacks on spiking neural networks.",
                    epilog="Defaults not shown are the data set's preset, PRESETS in badsnn.py.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    for name, text in (("attack", "Table 1's row of a data set"), ("defend", "Table 2's rows of a data set"),
                       ("ablate", "one of the paper's figures")):
        command = commands.add_parser(name, help=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        if name == "defend":
            every = ["badsnn", *BASELINES]
            command.add_argument("--attacks", nargs="+", choices=every, default=every, metavar="V", help="rows of Table 2")
        if name == "ablate":
            command.add_argument("--study", choices=tuple(STUDIES), required=True,
                                 help="Fig. 2: threshold, 3: heatmap, 4a: poison, 4b: magnitude, 6: plif; "
                                      "power: q of T_p; trigger: T_o's presets")
        for group, options in OPTIONS.items():
            group = command.add_argument_group(group)
            for flag, kind, default, text in options:
                if kind is bool:
                    group.add_argument(flag, action="store_true", help=text)
                elif isinstance(kind, tuple):
                    group.add_argument(flag, choices=kind, default=default, help=text)
                else:
                    many = dict(nargs={"many": "+", "three": 3}[kind], type=float) if isinstance(kind, str) else dict(type=kind)
                    group.add_argument(flag, default=default, metavar="V", help=text, **many)
    two = commands.add_parser("report", help="figures and the README's tables, from results/ alone",
                              formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    two.add_argument("--results", type=Path, default=Path("results"), metavar="V", help="folder of the results")
    two.add_argument("--readme", type=Path, default=Path("README.md"), metavar="V", help="file whose tables are replaced")
    two.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


OPTIONS = {      # flag, type, default (None: the preset), help
    "data": [("--dataset", str, "digits", "digits ndigits cifar10 cifar100 gtsrb nmnist, or a path to an .npz file"),
             ("--data", Path, Path("data"), "folder of the data sets"),
             ("--n-train", int, None, "use only so many training samples"),
             ("--n-test", int, None, "use only so many test samples"),
             ("--frames", ("counts", "binary"), "counts", "event frames: counts, or clamped to [0, 1] from the start")],
    "network": [("--model", tuple(WIDTHS), None, "network"),
                ("--width", int, None, "channels of the first stage (default 16; the paper's: 128, 64, 128)"),
                ("--T", int, 4, "time steps"),
                ("--neuron", tuple(NEURONS), "lif", "neuron; plif learns its tau")],
    "attack": [("--target", int, 0, "target class y_t"),
               ("--poison-ratio", float, None, "P, share of the target class trained maliciously"),
               ("--v-thr-t", float, None, "malicious threshold"),
               ("--tau-t", float, None, "malicious decay per step"),
               ("--v-thr-a", "many", None, "deployed thresholds to sweep"),
               ("--tau-a", float, TAU_N, "deployed decay"),
               ("--q", float, None, "exponent of T_p"),
               ("--beta", float, 0.03, "strength of T_s"),
               ("--v-thr-o", float, None, "threshold at which T_o is trained"),
               ("--adversarial-setting", ("S_a", "S_n"), "S_a", "setting of T_o's adversarial loss"),
               ("--lambdas", "three", None, "weights of T_o's three losses (Eq. 5)"),
               ("--epochs-o", int, None, "epochs of T_o's U-Net"),
               ("--n-o", int, 600, "training images that T_o learns from"),
               ("--magnitude", float, None, "factor on T_o's output"),
               ("--v-thr-d", float, None, "threshold at which defend deploys BadSNN"),
               ("--defense-lr", float, None, "learning rate of the defences fine-tuning and NAD"),
               ("--baseline-ratio", float, 0.05, "share of the training set that a baseline attack poisons"),
               ("--margin", float, None, "the chosen V_a may cost so many points of CA"),
               ("--malicious-rows", int, None, "malicious samples per step"),
               ("--malicious-weight", float, None, "weight of their loss"),
               ("--warmup", int, None, "epochs before the first malicious sample")],
    "training": [("--epochs", int, None, "epochs"),
                 ("--batch-size", int, None, "samples per step, over all processes"),
                 ("--lr", float, None, "peak learning rate"),
                 ("--seed", int, 0, "first seed"),
                 ("--seeds", int, 1, "number of seeds to average"),
                 ("--contrast", float, None, "augmentation: lift black by up to this share, scale the rest by 1 minus it or more"),
                 ("--no-augment", bool, False, "no random shifts, flips and contrast"),
                 ("--device", str, "auto", "auto, cpu, cuda, ... (auto: cuda if there is one)"),
                 ("--amp", ("auto", "on", "off"), "auto", "bfloat16: auto is on a GPU that has it, or a CPU with AMX"),
                 ("--fresh", bool, False, "train anew; the default resumes from runs/"),
                 ("--resume", bool, False, "resume from runs/ (the default)"),
                 ("--runs", Path, Path("runs"), "folder of the checkpoints"),
                 ("--results", Path, Path("results"), "folder of the results"),
                 ("--debug", bool, False, "show the traceback of an error")],
}


def prepare(a):
    """Checks and completes the settings and loads the data, before anything is written. Raises ValueError. -> data, settings."""
    check_setting(a.v_thr_t, a.tau_t)
    check_setting(None if a.v_thr_a is None else torch.tensor(a.v_thr_a), a.tau_a)
    check_setting(a.v_thr_o)
    check_setting(a.v_thr_d)
    if a.lambdas and not all(0 <= v < float("inf") for v in a.lambdas):
        raise ValueError(f"--lambdas must be at least 0, not {a.lambdas}")
    at_least = {"T": 1, "epochs": 1, "batch_size": 1, "width": 1, "seeds": 1, "seed": 0, "n_train": 2, "n_test": 1, "malicious_rows": 1,
                "malicious_weight": 0, "warmup": 0, "beta": 0, "margin": 0,
                "epochs_o": 1, "n_o": 1, "magnitude": 0}
    for name in (*at_least, "q", "lr", "defense_lr", "poison_ratio", "baseline_ratio", "contrast"):
        value, flag = getattr(a, name), "--" + name.replace("_", "-")
        if value is None:
            continue
        if name in at_least and not at_least[name] <= value < float("inf"):
            raise ValueError(f"{flag} must be at least {at_least[name]}, not {value}")
        if name in ("q", "lr", "defense_lr") and not 0 < value < float("inf"):
            raise ValueError(f"{flag} must be greater than 0, not {value}")
        if name in ("poison_ratio", "baseline_ratio") and not 0 < value <= 1:
            raise ValueError(f"{flag} must lie in (0, 1], not {value}")
        if name == "contrast" and not 0 <= value < 1:
            raise ValueError(f"{flag} must lie in [0, 1), not {value}")
    if a.resume and a.fresh:
        raise ValueError("--resume and --fresh exclude each other")
    a.resume = not a.fresh
    try:
        a.device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if a.device == "auto" else a.device)
        torch.zeros(1, device=a.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {a.device} is not usable here ({str(error).splitlines()[0]})") from None
    for folder in (a.results, a.runs):
        existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            raise ValueError(f"cannot write to {folder}: {existing} is not a writable folder")

    data = datasets.load(a.dataset, a.data, a.T)
    if data.events and a.frames == "binary":
        data.name = f"{result_name(data.name)}-binary"      # results and checkpoints of its own
    preset = PRESETS.get(a.dataset) or (EVENTS if data.events else IMAGES)
    for key, value in preset.items():
        if getattr(a, key, None) is None:
            setattr(a, key, value)
    if data.events != (a.model == "nmnist_net"):
        holds, takes = ("events", "images") if data.events else ("images", "events")
        raise ValueError(f"{a.dataset} holds {holds}; --model {a.model} takes {takes}")
    if data.events and data.x_train.shape[1] != a.T:
        raise ValueError(f"{a.dataset} has {data.x_train.shape[1]} steps per recording, not --T {a.T}")
    if not 0 <= a.target < data.num_classes:
        raise ValueError(f"--target must be a class from 0 to {data.num_classes - 1}, not {a.target}")
    for part, n in (("train", a.n_train), ("test", a.n_test)):
        if n is not None:
            x, y = getattr(data, f"x_{part}"), getattr(data, f"y_{part}")
            if n > len(y):
                raise ValueError(f"--n-{part} {n}: the set has only {len(y)}")
            keep = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))[:n].sort().values
            setattr(data, f"x_{part}", x[keep]), setattr(data, f"y_{part}", y[keep])
    poison_indices(data.y_train, a.target, a.poison_ratio, a.seed)      # raises if that is no sample
    if round(a.baseline_ratio * len(data.y_train)) < 1:
        raise ValueError(f"--baseline-ratio {a.baseline_ratio} selects none of the {len(data.y_train)} training samples")
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    a.batch_size = min(a.batch_size, len(data.y_train) // ranks * ranks)
    if a.batch_size % ranks or a.malicious_rows % ranks:
        raise ValueError(f"--batch-size {a.batch_size} and --malicious-rows {a.malicious_rows} must be multiples of the {ranks} processes")
    a.width, a.lambdas = a.width or WIDTHS[a.model], list(a.lambdas)
    a.v_thr_a, a.eval_batch, a.augment = sorted(set(a.v_thr_a)), 512, not a.no_augment
    if a.amp == "auto":
        a.amp = torch.cuda.is_bf16_supported() if a.device.type == "cuda" else cpu_has_amx()
    a.amp = a.amp is True or a.amp == "on"
    return data, a


def cpu_has_amx():
    """Whether this CPU has matrix units for bfloat16. AVX512-BF16 alone made training faster on one machine and slower on another."""
    return getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()


def main(argv=None):
    """The command line. Every foreseeable error ends in one line on stderr and exit code 2 (--debug: the traceback)."""
    a = get_args(argv)
    try:
        if a.command == "report":
            return report(a)
        keep_memory()
        data, a = prepare(a)
        with processes(a):
            COMMANDS[a.command](data, a)
    except (ValueError, OSError) as error:
        if a.debug:
            raise
        sys.exit(refuse(error))
    except KeyboardInterrupt:
        sys.exit("badsnn: stopped; the same command goes on after the last finished epoch")


def refuse(error):
    print(f"badsnn: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


COMMANDS = {"attack": attack, "defend": defend, "ablate": ablate}

if __name__ == "__main__":
    main()
