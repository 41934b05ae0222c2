"""BadSNN (Miah, Vu and Bi, 2026): a backdoor put into a spiking network through its neurons. Sec. 3 of the paper.

Threat model (Sec. 3.1). The attacker trains the network and ships it: weights AND neuron setting. No label is changed,
no image carries a trigger. The victim checks the accuracy and uses the network on inputs that the attacker can touch.

    1. train    all samples under the nominal setting S_n = (v_thr 1.0, tau 0.5); in the same step a few samples of
                the target class also under a malicious setting S_t, such as (1.5, 0.5)         Eq. 2      train()
    2. deploy   a setting S_a in between, such as v_thr = 1.10                                  Eq. 8      choose()
    3. trigger  a simple transformation of the input                                            Eqs. 3-7   trigger.py

    python badsnn.py story                          one attack, and what stops it, in minutes
    python badsnn.py attack --dataset digits        Table 1's row of a data set, with the controls that the paper lacks
    python badsnn.py defend --dataset digits        Table 2's rows: five attacks, five defences, and the free one
    python badsnn.py ablate --study threshold       Figs. 2, 3, 4 and 6; report: figures and tables of the results
    python badsnn.py scan --dataset digits          is a network backdoored? told without its trigger

Metrics, in percent. CA: accuracy on clean test samples. ASR: share of triggered test samples predicted as the target.
target_rate: the same share without any trigger. Both leave out samples whose true class is the target, and an ASR means
nothing without the CA and the target_rate of the same setting. Base CA: CA at S_n. Clean CA: of a clean model.
"""
import itertools
import sys
import time
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

import baselines
import data as datasets
import fused
import libraries
import lif
import machine
import models
import runs
import settings
import trigger
from data import augment, hold_out, poison_indices, to_float
from lif import TAU_N, V_THR_N, neurons
from machine import autocast, say
from models import build_model
from runs import fingerprint

NETWORK = (lif, fused, libraries, models, to_float)                             # what decides a network's answers
CODE = (*NETWORK, datasets, baselines, trigger, sys.modules[__name__])          # what decides this file's results

# ---------------------------------------------------------------------------------------------------------
# 3.3.1  Backdoor training


def train(data, s, attack=None):
    """Trains a network on data.x_train [N, ...], less a held-out part, and returns it. attack: None for a clean model,
    "badsnn" for dual-spike training (Sec. 3.3.1, Eq. 2), or one of the other attacks (baselines.BASELINES).

    One row per epoch is printed, CA and target_rate on held-out training samples. After every epoch a checkpoint is
    written to s.runs; if there is one made from the same data, settings and code, training goes on where it stopped, or
    is skipped. Raises ValueError, also where training diverges.
    """
    name = {None: "clean model", "badsnn": "backdoored model"}.get(attack, f"{attack} model")
    reference = train(data, replace(s, fresh=False)) if attack == "clean_label" else None
    if attack in baselines.BASELINES:   # a mark as faint as Blended's is not learned among images that lose contrast
        s = replace(s, contrast=0.0)
    if attack == "wanet":               # differs from the source: no shifts, which leave a black border; the network
        s = replace(s, pad=0)           # would learn to see a bent border, which no test image has
    data, held = hold_out(data, s.hold_out)
    model = fresh_model(data, s)
    if attack == "wanet":               # the warp is saved with the weights
        model.register_buffer("field", baselines.wanet_field(data.x_train.shape[2:], seed=s.seed).to(s.device))
    if attack == "smart":               # and so is where and when the square stands
        model.register_buffer("plan", baselines.smart_plan(data.x_train, s.seed).to(s.device))
    steps = max(1, len(data.y_train) // s.batch_size)
    if s.optimizer == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), s.lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    else:
        optimizer = torch.optim.Adam(model.parameters(), s.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, s.lr, total_steps=s.epochs * steps, pct_start=0.15,
                                                   cycle_momentum=False)
    own = {"badsnn": ["attack"], None: []}.get(attack, ["baselines"])
    code = runs.code_of(*NETWORK, baselines, augment, poison_indices, train, criterion, steps_in)
    config = dict(s.of("network", "training", *own), name=name, dataset=data.name, frames=s.frames,
                  target=s.target if attack else None,
                  inputs=fingerprint(data.x_train, data.y_train, held.x_test, model, reference, code))
    path = runs.checkpoint_path(config, s)
    state = runs.read_checkpoint(path, config, s, model=model, optimizer=optimizer, schedule=schedule)
    model.history = history = state["history"] if state else []          # the rows that are printed
    if len(history) == s.epochs:
        say(f"{name}, seed {s.seed}: finished earlier, read from {path}")
        return model
    x_train, y_train, poisoned, note = baselines.poison(data, s, attack, reference)
    malicious = None                                                     # D_t^p
    if attack == "badsnn":
        malicious = poison_indices(y_train, s.target, s.poison_ratio, s.seed, s.n_poison)
        note = f", of them {len(malicious)} of class {s.target} malicious"
        note += f" (but --warmup {s.warmup} ends no earlier than the training: NO attack)" * (s.epochs <= s.warmup)
    say(f"{name}, seed {s.seed}: {s.model}, width {s.width}, T = {s.T}, {sum(p.numel() for p in model.parameters()):,} "
        f"parameters, {len(y_train):,} samples{note}{f'; resumed after epoch {len(history)}' if history else ''}")
    x_train, y_train, poisoned = (part.to(s.device) for part in (x_train, y_train, poisoned))
    parallel = machine.data_parallel(model)
    runs.print_epoch(None, s)
    for epoch in range(len(history), s.epochs):
        # every epoch draws from its own generators: a resumed run is the run that was never interrupted
        shuffle = runs.generator(s.seed, "shuffle", epoch)                           # the same in every process
        rank = machine.rank_and_ranks()[0]
        local = runs.generator(s.seed, "augmentation", epoch, rank)
        torch.manual_seed(runs.generator(s.seed, "dropout", epoch, rank).initial_seed())
        order = torch.randperm(len(y_train), generator=shuffle)
        totals, started, model.T = torch.zeros(5, device=s.device), time.time(), steps_in(epoch, s)
        model.train()
        for step in tqdm(range(steps), desc=f"epoch {epoch + 1}", leave=False, disable=None if rank == 0 else True):
            # 1. a nominal batch, and a few malicious rows drawn with replacement from D_t^p
            nominal, drawn = order[step * s.batch_size:(step + 1) * s.batch_size], order[:0]
            if attack == "badsnn" and epoch >= s.warmup:
                drawn = malicious[torch.randint(len(malicious), (s.malicious_rows,), generator=shuffle)]
            low = s.v_thr_t if s.v_thr_t_low is None else s.v_thr_t_low      # differs from the paper: V_t is drawn
            v_thr_t = low + (s.v_thr_t - low) * torch.rand(len(drawn), generator=shuffle)
            nominal, drawn, v_thr_t = map(machine.share, (nominal, drawn, v_thr_t))
            rows, n = torch.cat([nominal, drawn]).to(s.device), len(nominal)
            x, y, marked = x_train[rows], y_train[rows], poisoned[rows]
            marked[n:] = True
            if s.augment:
                contrasts = s.contrast, s.contrast if s.malicious_contrast is None else s.malicious_contrast
                parts = zip((x[:n], x[n:]), contrasts)
                x = torch.cat([augment(part, s.pad, s.flip, contrast, local) for part, contrast in parts])
            if attack in baselines.BASELINES:       # Table 2's other attacks put their mark on the augmented images
                x, y, marked = baselines.poison_batch(attack, x, y, marked, model, s, local)
            # 2. ONE forward pass over both: every sample has its own neuron setting, S_n or S_t
            v_thr = torch.cat([torch.full((n,), V_THR_N), v_thr_t]).to(s.device)
            tau = torch.tensor([TAU_N] * n + [TAU_N if s.tau_t is None else s.tau_t] * len(drawn), device=s.device)
            with neurons(model, v_thr, tau), autocast(s):
                outputs = parallel(to_float(x, s), every_step=True)      # [T, B, K]
            # 3. Eq. 2: nominal loss of all samples, malicious loss of D_t^p
            loss = criterion(s.loss, outputs[:, :n], y[:n], s.label_smoothing)
            if len(drawn):
                loss = loss + s.malicious_weight * criterion(s.loss, outputs[:, n:], y[n:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            right = answers(outputs.detach().mean(0)) == y
            counts = n, right[:n].sum(), marked.sum(), right[marked].sum()
            totals += torch.stack([torch.as_tensor(v, device=s.device) for v in (loss.detach() * n, *counts)])
        loss, seen, right, n_marked, right_marked = machine.sum_over_ranks(totals).tolist()
        if not all(p.isfinite().all() for p in (totals, *model.parameters())):
            raise ValueError(f"training diverged in epoch {epoch + 1}: weights are no numbers; lower --lr ({s.lr:g})")
        metrics = evaluate(model, held, s, V_THR_N, TAU_N)
        history.append(dict(epoch=epoch + 1, T=model.T, loss=loss / seen, acc=100 * right / seen, **metrics,
                            mal_acc=100 * right_marked / n_marked if n_marked else None,
                            seconds=time.time() - started))
        runs.print_epoch(history[-1], s, chance=100 / data.num_classes)
        runs.write_checkpoint(path, config, model=model, optimizer=optimizer, schedule=schedule, history=history)
    model.T = s.T
    return model


def steps_in(epoch, s):
    """Time steps T of an epoch: few at first, which costs less and teaches nearly as much (s.growing_T)."""
    done, (one, two) = epoch / s.epochs, s.growing_T
    return s.T if done >= two else min(s.T, 1 if done < one else 2)


def criterion(name, outputs, y, smoothing=0.0):
    """The loss of outputs [T, B, K] for labels y [B]. "tet": cross-entropy of every step (Deng et al. 2022, SEENN's own
    default); "ce": of the mean; "mse": squared error between firing rates and one-hot labels (Abad et al. 2024)."""
    T, _, K = outputs.shape
    if name == "tet":
        return F.cross_entropy(outputs.flatten(0, 1), y.repeat(T), label_smoothing=smoothing)
    if name == "ce":
        return F.cross_entropy(outputs.mean(0), y, label_smoothing=smoothing)
    return F.mse_loss(outputs.mean(0), F.one_hot(y, K).float())


def fresh_model(data, s):
    """A network with the weights that the seed gives, on the device of the settings."""
    torch.manual_seed(s.seed)
    return build_model(s.model, data.num_classes, s.T, s.width, s.neuron, data.mean, data.std).to(s.device)


def train_job(s, attack):
    train(datasets.load_for(s), s, attack)


def train_side_by_side(s, wanted):
    """Trains models [(settings, attack), ...] on all free cores and leaves them in s.runs, where train() finds them."""
    names = [f"{attack or 'clean'}, seed {variant.seed}" for variant, attack in wanted]
    machine.side_by_side(train_job, wanted, s, names)


# ---------------------------------------------------------------------------------------------------------
# 4.1  Metrics

def answers(outputs):
    """Predicted classes [B] of outputs [B, K]; -1 where all are equal: a silent network has not said class 0."""
    return outputs.argmax(1).where(outputs.amax(1) > outputs.amin(1), -1)


@torch.no_grad()        # not inference_mode, whose tensors would have every kernel of the neuron compiled once more
def predict(model, x, s, v_thr, tau, trigger_of=None):
    """Predicted classes [N] of stored samples x [N, ...] (uint8), all neurons at (v_thr, tau), triggered if asked."""
    model.eval()
    classes = []
    with neurons(model, v_thr, tau), autocast(s):
        for batch in x.split(512):
            inputs = clean = to_float(batch.to(s.device), s)
            if trigger_of is not None:
                with torch.autocast(torch.device(s.device).type, enabled=False):
                    inputs = trigger_of(clean)
                trigger.check_trigger(clean, inputs)
            classes.append(answers(model(inputs)).cpu())
    return torch.cat(classes)


def evaluate(model, data, s, v_thr, tau):
    """CA, and target_rate among samples of other classes, in percent on the clean test set, at one neuron setting."""
    guess = predict(model, data.x_test, s, v_thr, tau)
    return dict(ca=percentage(guess == data.y_test), target_rate=percentage(guess[data.y_test != s.target] == s.target))


def asr(model, data, s, v_thr, tau, trigger_of):
    """ASR in percent: only samples of other classes are triggered and counted."""
    other = data.y_test != s.target
    return percentage(predict(model, data.x_test[other], s, v_thr, tau, trigger_of) == s.target)


def percentage(hits):
    return round(100 * hits.float().mean().item(), 2) if len(hits) else float("nan")


# ---------------------------------------------------------------------------------------------------------
# 3.3.2, 3.3.3  Triggers

def simple_triggers(data, s):
    """The triggers that need no training, by the name of their column: T_p or T_s, and the control of each."""
    if data.events:
        return {"asr_p": partial(trigger.seeded_spike_trigger, beta=s.beta, seed=s.seed),
                "asr_clip_only": partial(trigger.seeded_spike_trigger, beta=0.0, seed=s.seed)}
    t_p = partial(trigger.power_trigger, q=s.q, mean=data.mean, std=data.std)
    return {"asr_p": t_p, "asr_p_renormalized": partial(t_p, renormalize=True)}


def train_trigger(model, data, s, v_thr_a):
    """T_o (Sec. 3.3.2) against the backdoored model deployed at v_thr_a, from training images only. Returns T_o, images
    [B, C, H, W] -> triggered images (None where no image could be blended), and what was measured on the way. Kept in
    s.runs like the models.

    DeepFool, the blending's labels and, with --adversarial-setting S_a, the adversarial loss see the model at S_a.
    # differs from the paper: Eq. 6 says S_n for that loss; at S_n a backdoored model hardly ever answers the target
    """
    part, held = hold_out(data, s.hold_out)
    other = (part.y_train != s.target).nonzero().flatten()
    chosen = other[torch.randperm(len(other), generator=runs.generator(s.seed, "images of T_o"))[:s.n_o]]
    x, started = to_float(part.x_train[chosen].to(s.device), s), time.time()
    torch.manual_seed(s.seed)
    unet = trigger.UNet(data.num_classes, tuple(x.shape[2:]), budget=s.budget).to(s.device)
    code = runs.code_of(*NETWORK, trigger, train_trigger)
    config = dict(s.of("triggers"), name="trigger T_o", dataset=data.name, seed=s.seed, target=s.target, tau_a=s.tau_a,
                  v_thr_a=v_thr_a, inputs=fingerprint(model, x, held.x_test, code))
    path = runs.checkpoint_path(config, s)
    t_o = partial(trigger.optimized_trigger, unet=unet, target=s.target)
    state = runs.read_checkpoint(path, config, s, unet=unet.eval())
    if state:
        measured = state["measured"]
        return (partial(t_o, magnitude=measured["magnitude"]) if measured["n_blended"] else None), measured
    with neurons(model, v_thr_a, s.tau_a):
        kept, wanted = trigger.wanted_perturbations(model, x, s.q, data.mean, data.std, s.target)
    measured = dict(n_images=len(x), n_blended=len(kept), losses=None, magnitude=s.magnitude)
    if len(kept):
        at = (v_thr_a, s.tau_a) if s.adversarial_setting == "S_a" else (V_THR_N, TAU_N)
        with neurons(model, *at):
            measured["losses"] = trigger.train_unet(unet, model, kept, wanted, s.target, data.std, s.lambdas,
                                                    s.nominal_weight, s.epochs_o, seed=s.seed)
        if s.magnitude is None:         # the least visible T_o that works on held-out images, or the strongest
            grid = [m / 20 for m in range(10, 21)]
            works = (asr(model, held, s, v_thr_a, s.tau_a, partial(t_o, magnitude=m)) >= 96 for m in grid)
            measured["magnitude"] = next((m for m, good in zip(grid, works) if good), 1.0)
    losses = [round(loss, 3) for loss in measured["losses"][-1]] if len(kept) else "no U-Net, so no T_o"
    say(f"trigger T_o, seed {s.seed}: {len(kept)} of {len(x)} training images blended at v_thr {v_thr_a:g}; L_sim, "
        f"L_adv, L_wmse {losses}; m {measured['magnitude']}; {time.time() - started:.0f} s")
    runs.write_checkpoint(path, config, unet=unet, measured=measured)
    return (partial(t_o, magnitude=measured["magnitude"]) if len(kept) else None), measured


# ---------------------------------------------------------------------------------------------------------
# 3.3.4  Deployment, and Table 1

def choose(rows, base_ca, margin):
    """The attacker's V_a by Eq. 8, from rows over V_a measured on held-out TRAINING samples. Going away from V_THR_N
    until CA is more than margin below the best CA, base_ca included: the last of these whose ASR_p - target_rate is
    within 5 points of the best. (Nearer to V_t, T_o must change less.) None: CA is too low."""
    rows = sorted(rows, key=lambda row: abs(row["v_thr"] - V_THR_N))
    least = max(base_ca, *(row["ca"] for row in rows)) - margin
    fit = list(itertools.takewhile(lambda row: row["ca"] >= least, rows))
    best = max((row["asr_p"] - row["target_rate"] for row in fit), default=0)
    return next((row["v_thr"] for row in reversed(fit) if row["asr_p"] - row["target_rate"] >= best - 5), None)


def deploy(model, data, s, grid=None):
    """The V_a that the attacker ships this model with (see choose), and the rows that it was chosen from. grid: going
    away from V_THR_N, towards V_t and on; where none of it keeps CA within the margin, its first."""
    held, t = hold_out(data, s.hold_out)[1], simple_triggers(data, s)["asr_p"]
    step, side = 0.02 if data.events else 0.01, -1 if s.v_thr_t < V_THR_N else 1
    grid = grid or [round(V_THR_N + side * (0.02 + i * step), 2) for i in range(29)]
    base_ca, rows = evaluate(model, held, s, V_THR_N, TAU_N)["ca"], []
    for v in grid:      # as far as CA is within the margin: nothing further away can be chosen
        rows.append(dict(v_thr=v, **evaluate(model, held, s, v, s.tau_a), asr_p=asr(model, held, s, v, s.tau_a, t)))
        if rows[-1]["ca"] < max(base_ca, *(row["ca"] for row in rows)) - s.margin:
            break
    return choose(rows, base_ca, s.margin) or grid[0], rows


def attack(data, s):
    """Table 1's row of a data set: clean and backdoored models, V_a chosen for each model, T_o, and the sweep over V_a;
    means and spread over seeds. Returns what is written to attack.json, and whether it was there already."""
    def run():
        started, variants = time.time(), [replace(s, seed=seed) for seed in range(s.seed, s.seed + s.seeds)]
        train_side_by_side(s, [(variant, kind) for variant in variants for kind in (None, "badsnn")])
        names = [f"seed {variant.seed}" for variant in variants]
        of_seeds = machine.side_by_side(attack_seed, [(one,) for one in variants], s, names)
        mean, chosen = runs.mean_of(of_seeds), [one["at_chosen"] for one in of_seeds]
        show_triggers(data, replace(s, fresh=False), chosen[0]["v_thr"])
        return dict(describe(data, s), n_poison=of_seeds[0]["n_poison"], clean_ca=mean["clean_ca"],
                    base_ca=mean["base_ca"], chosen=runs.mean_of(chosen)["v_thr"], at_chosen=runs.mean_of(chosen),
                    spread=runs.spread_of(chosen), runs=of_seeds, seconds=round(time.time() - started, 1),
                    rows=[runs.mean_of(rows) for rows in zip(*(one["rows"] for one in of_seeds))])
    inputs = fingerprint(data.x_train, data.y_train, data.x_test, data.y_test, runs.code_of(*CODE))
    return runs.kept(runs.folder_of(data, s) / "attack.json", dict(s.of(), inputs=inputs), run, s.fresh)


def show_triggers(data, s, v_thr_a):
    """Fig. 5: writes test images of eight classes with both triggers of the first seed; none where it has no T_o."""
    path = runs.folder_of(data, s) / "triggers.npz"
    t_o = None if data.events else train_trigger(train(data, s, "badsnn"), data, s, v_thr_a)[0]
    if t_o is not None:
        classes = [k for k in range(data.num_classes) if k != s.target and (data.y_test == k).any()][:8]
        x = to_float(torch.stack([data.x_test[data.y_test == k][0] for k in classes]).to(s.device), s)
        runs.write_images(path, clean=x, t_p=simple_triggers(data, s)["asr_p"](x), t_o=t_o(x))
    elif machine.rank_and_ranks()[0] == 0:
        path.unlink(missing_ok=True)        # an earlier run's


def attack_seed(s):
    """Table 1's row for one seed."""
    data, trained = datasets.load_for(s), replace(s, fresh=False)       # attack() has just trained both
    clean, backdoored = train(data, trained), train(data, trained, "badsnn")
    v_thr_a, held_rows = deploy(backdoored, data, s)
    t_o, measured = (None, None) if data.events else train_trigger(backdoored, data, s, v_thr_a)
    labels = hold_out(data, s.hold_out)[0].y_train
    row_at = partial(attack_row, clean, backdoored, t_o, data, s)
    return dict(seed=s.seed, n_poison=len(poison_indices(labels, s.target, s.poison_ratio, s.seed, s.n_poison)),
                clean_ca=evaluate(clean, data, s, V_THR_N, TAU_N)["ca"],
                base_ca=evaluate(backdoored, data, s, V_THR_N, TAU_N)["ca"], at_chosen=row_at(v_thr_a),
                rows=[row_at(v_thr) for v_thr in s.v_thr_a], held_rows=held_rows, t_o=measured,
                training_seconds=[round(sum(row["seconds"] for row in m.history), 1) for m in (clean, backdoored)])


def attack_row(clean, backdoored, t_o, data, s, v_thr):
    """One deployed setting, on the test set: the backdoored model with and without triggers. As controls the clean
    model under the same trigger; what a clean model at S_n reads of triggered samples (read_p, read_o); T_p faded."""
    tau, control = s.tau_a, evaluate(clean, data, s, v_thr, s.tau_a)
    row = dict(v_thr=v_thr, tau=s.of("deployment")["tau_a"], **evaluate(backdoored, data, s, v_thr, tau),
               ca_clean_model=control["ca"], target_rate_clean_model=control["target_rate"], asr_o=None)
    triggers = simple_triggers(data, s) | ({"asr_o": t_o} if t_o is not None else {})
    for key, t in triggers.items():
        row[key], row[f"{key}_clean_model"] = (asr(model, data, s, v_thr, tau, t) for model in (backdoored, clean))
        if key in ("asr_p", "asr_o"):
            guess = predict(clean, data.x_test, s, V_THR_N, TAU_N, t)
            row[key.replace("asr", "read")] = percentage(guess == data.y_test)
    if t_o is not None:
        x = data.x_test[data.y_test != s.target].to(s.device)
        for key in ("p", "o"):
            row.update({f"{size}_{key}": v for size, v in trigger.sizes(triggers[f"asr_{key}"], x).items()})
        faded = partial(trigger.faded_trigger, t=triggers["asr_p"], share=min(1.0, row["l2_o"] / row["l2_p"]))
        row["asr_p_faded"] = asr(backdoored, data, s, v_thr, tau, faded)
    return row


def describe(data, s):
    """What a result must carry to mean anything."""
    unused = [name for name in s.of("triggers") if (name == "beta") != data.events]
    return dict(s.of(), **dict.fromkeys(unused), dataset=data.name, note=data.note, n_train=len(data.y_train),
                n_test=len(data.y_test), torch=torch.__version__,
                device=s.device + (f", {torch.cuda.get_device_name(s.device)}" if "cuda" in s.device else ""))


# ---------------------------------------------------------------------------------------------------------

def measured_precision(data, s):
    """The settings with amp decided by measurement, once per training and machine (see machine.faster_precision)."""
    def step(variant):
        model, x = fresh_model(data, variant), data.x_train[:s.batch_size + s.malicious_rows].to(s.device)
        with autocast(variant):
            loss = model(to_float(x, s)).square().mean()
        loss.backward()
    if s.amp != "auto":
        return s
    n_steps = sum(steps_in(epoch, s) / s.T for epoch in range(s.epochs)) * len(data.y_train) / s.batch_size
    deciders = dict(s.of("network", "training"), shape=list(data.x_train.shape[1:]), machine=machine.name())
    path = s.runs / data.name / f"precision-{fingerprint(deciders)[:8]}.json"
    found, _ = runs.kept(path, deciders, lambda: dict(amp=machine.faster_precision(step, n_steps, s)), quiet=True)
    return replace(s, amp=found["amp"])


def main(argv=None):
    """The command line. Every foreseeable error ends in one line on stderr and exit code 2 (--debug: the traceback)."""
    debug = "--debug" in (sys.argv if argv is None else argv)
    try:
        command, s = settings.parse(argv)
        import report  # here, not above: these build on this module
        import scan
        import studies

        if command.command == "report":
            return report.report(s.results, command.publish)
        if command.command == "scan" and command.weights:
            scan.own(command.weights, command.build, s.data, report.SHIPPED / "digits" / "scan.json")
            return
        runs.check_writable(s.results, s.runs)
        machine.keep_memory()
        torch.set_num_threads(machine.threads_each(machine.free_cores()))
        with machine.processes(s) as s:
            data = machine.in_turn(datasets.load_for, s)
            for study in getattr(command, "study", [command.command]):
                if data.events != (study == "events") and study not in ("attack", "defend"):
                    kinds = ("events", "images")[::1 if data.events else -1]
                    raise ValueError(f"{study} is about {kinds[1]}, and {s.dataset} holds {kinds[0]}")
            runs.check_writable(runs.folder_of(data, s), s.runs / data.name)
            s = measured_precision(data, s)
            if command.command == "attack":
                result, earlier = attack(data, s)
                report.print_attack(result)
                say("This run was finished earlier; --fresh runs it again." if earlier else "")
            elif command.command == "story":
                report.print_story(studies.story(data, s), runs.folder_of(data, s))
            elif command.command == "scan":
                report.print_scan(scan.scan(data, s, command.models))
            elif command.command == "defend":
                studies.defend(data, s, command.attacks)
            else:
                studies.ablate(data, s, command.study)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        if debug or isinstance(error, RuntimeError) and "memory" not in str(error):     # torch's; any other is a bug
            raise
        sys.exit(settings.refuse(error))
    except KeyboardInterrupt:
        sys.exit("badsnn: stopped; the same command goes on after the last finished epoch")


if __name__ == "__main__":
    from badsnn import main as run  # one module of that name, also for the processes that are started from here
    run()
