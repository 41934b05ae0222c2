"""BadSNN (Miah, Vu and Bi, 2026): a backdoor put into a spiking network through its neurons.

Threat model (Sec. 3.1). The attacker trains the network and ships it: weights AND neuron setting.
No label is changed, no image carries a trigger. The attacker can touch the inputs of its user.

    1. train    all samples under the nominal setting S_n = (v_thr 1.0, tau 0.5); in the same step
                a few of the target class also under a malicious one, S_t = (1.5, 0.5)      Eq. 2
    2. deploy   a setting S_a in between, such as v_thr = 1.10                              Eq. 8
    3. trigger  a simple transformation of the input; see trigger.py                   Eqs. 3-7

Metrics, in percent. CA: accuracy on clean test samples (Base CA: at S_n). ASR: share of triggered
samples of other classes predicted as the target. target_rate: the same share without any trigger.
"""
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F

import trigger
from data import augment, hold_out, load_for, poison_indices, to_float
from kit import machine
from kit.files import code_of, fingerprint, mean_of
from kit.machine import autocast, say
from kit.training import TrainingLog, checkpoint_path, generator, read_checkpoint, write_checkpoint
from lif import TAU_N, V_THR_N, neurons
from models import fresh_model
from trigger import simple_triggers

CODE = code_of("*.py", "kit/*.py")      # what decides a trained network beside data and settings

# ----- 3.3.1  Backdoor training
def train(data, s, attack=None, poison=None):
    """Trains a network on data.x_train [N, ...], less a held-out part, and returns it. attack: None
    for a clean model, "badsnn" for dual-spike training (Sec. 3.3.1, Eq. 2). poison: another attack,
    which changes samples (lab.baselines.Poison). Raises ValueError."""
    data, held = hold_out(data)
    malicious = poison_indices(data.y_train, s.target, s.poison_ratio, s.seed)          # D_t^p
    malicious = malicious if attack == "badsnn" else malicious[:0]
    model, steps = fresh_model(data, s), max(1, len(data.y_train) // s.batch_size)
    optimizer, schedule = descent(model, steps, s)
    log = TrainingLog(*recorded_as(data, held, model, s, malicious, poison), s, steps,
                      model=model, optimizer=optimizer, schedule=schedule)
    if log.finished:
        return model
    x_train, y_train, poisoned = samples(data, s, poison)
    parallel = machine.data_parallel(model)
    for epoch, shuffle, local in log.epochs():
        model.T, order = steps_in(epoch, s), torch.randperm(len(y_train), generator=shuffle)
        model.train()
        for step in log.steps():
            # 1. A nominal batch and a few malicious rows; every row has its own neuron setting
            nominal, drawn = batch(order, step, malicious, epoch, s, shuffle)
            v_thr, tau = row_settings(len(nominal), len(drawn), s, shuffle)
            rows, n = torch.cat([nominal, drawn]).to(s.device), len(nominal)
            x, y, marked = augmented(x_train[rows], n, s, local), y_train[rows], poisoned[rows]
            if poison:
                x, y, marked = poison.batch(x, y, marked, local)
            # 2. ONE forward pass over both, so that BatchNorm sees them together
            with neurons(model, v_thr, tau), autocast(s):
                outputs = parallel(to_float(x, s), every_step=True)                 # [T, B, K]
            # 3. Eq. 2: the nominal loss of all samples, the malicious loss of D_t^p
            loss = criterion(outputs[:, :n], y[:n], s, smoothing=0.1)
            if len(drawn):
                loss = loss + s.malicious_weight * criterion(outputs[:, n:], y[n:], s)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            log.step(loss, answers(outputs.detach().mean(0)) == y, n, marked)
        log.end_epoch(**evaluate(model, held, s, s.v_thr_n, TAU_N), chance=100 / data.num_classes)
    model.T = s.T
    return model


def samples(data, s, poison):
    """Training samples x [N, ...], labels y [N], and which are poisoned [N], on the device."""
    parts = data.x_train, data.y_train, torch.zeros(len(data.y_train), dtype=torch.bool)
    return [part.to(s.device) for part in (poison.samples(data) if poison else parts)]


def batch(order, step, malicious, epoch, s, rng):
    """Row numbers of one step, this process's share: a nominal batch [B], and after a warm-up of
    two epochs some of D_t^p [b], drawn with replacement."""
    nominal, drawn = order[step * s.batch_size:(step + 1) * s.batch_size], order[:0]
    if len(malicious) and epoch >= min(2, s.epochs // 2):
        drawn = malicious[torch.randint(len(malicious), (s.malicious_rows,), generator=rng)]
    return machine.share(nominal), machine.share(drawn)


def row_settings(n, n_malicious, s, rng):
    """v_thr and tau of every row, [n + n_malicious]: S_n for nominal ones, then S_t."""
    # differs from the paper: each malicious row may draw its own V_t
    low = s.v_thr_t if s.v_thr_t_low is None else s.v_thr_t_low
    v_thr_t = low + (s.v_thr_t - low) * torch.rand(n_malicious, generator=rng)
    v_thr = s.v_thr_n * torch.cat([torch.full((n,), 1.0), v_thr_t])
    tau = torch.tensor([TAU_N] * n + [TAU_N if s.tau_t is None else s.tau_t] * n_malicious)
    return v_thr.to(s.device), tau.to(s.device)


def augmented(x, n, s, rng):
    """A batch x, shifted, mirrored, paled; malicious rows, from n on, with their own contrast."""
    # differs from the paper: malicious rows lose contrast or events: T_p and T_s look similar
    contrast = s.contrast if s.malicious_contrast is None else s.malicious_contrast
    return torch.cat([augment(x[:n], s.pad, s.flip, s.contrast, rng),
                      augment(x[n:], s.pad, s.flip, contrast, rng)])


def steps_in(epoch, s):
    """T of an epoch: on images 1, then 2 at first (TET's time inheritance, Deng et al. 2022)."""
    if s.model == "nmnist_net" or epoch >= 0.7 * s.epochs:
        return s.T
    return min(s.T, 1 if epoch < 0.4 * s.epochs else 2)


def criterion(outputs, y, s, smoothing=0.0):
    """The loss of outputs [T, B, K] for labels y [B]. Images: cross-entropy of every step (TET,
    Deng et al. 2022). Events: squared error of rates and one-hot labels (Abad et al. 2024)."""
    # differs from TET: without its second term, 0.001 times the squared distance of logits to 1
    T, _, K = outputs.shape
    if s.model == "nmnist_net":
        return F.mse_loss(outputs.mean(0), F.one_hot(y, K).float())
    return F.cross_entropy(outputs.flatten(0, 1), y.repeat(T), label_smoothing=smoothing)


def descent(model, steps, s):
    """One-cycle SGD for images, as in SEENN; Adam for events, as in Abad et al. (2024)."""
    sgd = partial(torch.optim.SGD, momentum=0.9, weight_decay=5e-4, nesterov=True)
    kind = torch.optim.Adam if s.model == "nmnist_net" else sgd
    optimizer, total = kind(model.parameters(), lr=s.lr), s.epochs * steps
    one_cycle = torch.optim.lr_scheduler.OneCycleLR
    return optimizer, one_cycle(optimizer, s.lr, total, pct_start=0.15, cycle_momentum=False)


def recorded_as(data, held, model, s, malicious, poison):
    """The name of a training, and everything that decides its outcome."""
    name, groups, decides = "clean", ["network", "training"], None
    if len(malicious):
        name, groups = "backdoored", ["network", "training", "attack"]
    if poison:
        name, decides = poison.name, poison.decides
    inputs = fingerprint(data.x_train, data.y_train, held.x_test, model, CODE, decides)
    return f"{name} model", dict(s.of(*groups), dataset=data.name, target=s.target, inputs=inputs)


def every_seed(s):
    return [replace(s, seed=s.seed + i) for i in range(s.seeds)]


def train_job(s, attack):
    train(load_for(s), s, attack)


def train_side_by_side(s, wanted):
    """Trains models [(settings, attack), ...] on all cores; train() then finds them in s.runs."""
    machine.side_by_side(train_job, wanted, s)


# ----- 4.1  Metrics
def answers(outputs):
    """Predicted classes [B] of outputs [B, K]; -1 where all are equal: silence is no answer."""
    return outputs.argmax(1).where(outputs.amax(1) > outputs.amin(1), -1)


@torch.no_grad()
def predict(model, x, s, v_thr, tau, trigger_of=None):
    """Classes [N] of stored x [N, ...] (uint8), triggered, at (v_thr, tau) (None: the model's)."""
    classes, size = [], 512 * 34 * 34 // x.shape[-2:].numel()       # by pixels: memory
    for stored in x.split(min(512, max(1, size))):
        inputs = clean = to_float(stored.to(s.device), s)
        if trigger_of is not None:
            inputs = trigger_of(clean)
            trigger.check_trigger(clean, inputs)
        with neurons(model.eval(), v_thr, tau), autocast(s):
            classes.append(answers(model(inputs)).cpu())
    return torch.cat(classes)


def percentage(hits):
    return round(100 * hits.float().mean().item(), 2) if len(hits) else float("nan")


def evaluate(model, data, s, v_thr, tau, triggers={}):
    """CA, target_rate, and the ASR of every trigger {name: trigger}, in percent of data.x_test."""
    guess = predict(model, data.x_test, s, v_thr, tau)
    rates = dict(ca=percentage(guess == data.y_test),
                 target_rate=percentage(guess[data.y_test != s.target] == s.target))
    return rates | {name: asr(model, data, s, v_thr, tau, t) for name, t in triggers.items()}


def asr(model, data, s, v_thr, tau, trigger_of):
    """ASR in percent: only samples of other classes are triggered and counted."""
    x = data.x_test[data.y_test != s.target]
    return percentage(predict(model, x, s, v_thr, tau, trigger_of) == s.target)


# ----- 3.3.2  T_o
def train_trigger(model, data, s, v_thr_a):
    """T_o (Sec. 3.3.2) against the backdoored model deployed at v_thr_a, from training images only
    (None where none could be blended), and what was measured on the way. Kept like the models."""
    part, held = hold_out(data)
    x = part.x_train[part.y_train != s.target]
    rows = torch.randperm(len(x), generator=generator(s.seed, "images of T_o"))[:s.n_o]
    x = to_float(x[rows].to(s.device), s)
    torch.manual_seed(s.seed)
    unet = trigger.UNet(data.num_classes, tuple(x.shape[2:]), budget=s.budget).to(s.device)
    config = dict(s.of("deployment"), name="trigger T_o", dataset=data.name, seed=s.seed,
                  target=s.target, v_thr_a=v_thr_a, inputs=fingerprint(model, x, held.x_test, CODE))
    path = checkpoint_path(config, s)
    t_o = partial(trigger.optimized_trigger, unet=unet, target=s.target)
    state = read_checkpoint(path, config, s, unet=unet.eval())
    measured = state["measured"] if state else None
    if not state:
        measured = fit_trigger(unet, t_o, model, x, data, held, s, v_thr_a)
        write_checkpoint(path, config, unet=unet, measured=measured)
    t_o = partial(t_o, magnitude=measured["magnitude"])
    return (t_o if measured["n_blended"] else None), measured


def fit_trigger(unet, t_o, model, x, data, held, s, v_thr_a):
    """Trains T_o's U-Net on images x; what was measured, among it Fig. 4b's factor m on T_o: the
    smallest with an ASR of 96 % on held-out images, else 1."""
    # differs from the paper: Eq. 6's loss is at S_a; at S_n the target is hardly ever answered
    with neurons(model, v_thr_a, s.tau_a):
        kept, wanted = trigger.wanted_perturbations(model, x, s.q, data.mean, data.std, s.target)
        say(f"T_o, seed {s.seed}: {len(kept)} of {len(x)} images blended at v_thr {v_thr_a:g}")
        if not len(kept):
            return dict(n_images=len(x), n_blended=0, magnitude=None)
        trigger.train_unet(unet, model, kept, wanted, s.target, data.std, epochs=s.epochs_o,
                           nominal_weight=0.3 if s.budget else 0.0, v_thr_n=s.v_thr_n, seed=s.seed)
    for m in [m / 20 for m in range(10, 21)]:
        if asr(model, held, s, v_thr_a, s.tau_a, partial(t_o, magnitude=m)) >= 96:
            break
    return dict(n_images=len(x), n_blended=len(kept), magnitude=m)


# ----- 3.3.4  Deployment, and Table 1
def choose(rows, base_ca, margin):
    """The attacker's V_a by Eq. 8, from rows over V_a measured on held-out TRAINING samples. Going
    away from V_THR_N until CA is more than margin below the best, base_ca included: the last of
    these whose ASR_p - target_rate is within 5 points of the best. None: none keeps the CA."""
    rows = sorted(rows, key=lambda row: abs(row["v_thr"] - V_THR_N))
    best_ca, fit, chosen = max([base_ca] + [row["ca"] for row in rows]), [], None
    for row in rows:
        if row["ca"] < best_ca - margin:
            break
        fit.append(row)
    gains = [row["asr_p"] - row["target_rate"] for row in fit]
    for row, gain in zip(fit, gains):
        if gain >= max(gains) - 5:
            chosen = row["v_thr"]
    return chosen


def deploy(model, data, s):
    """The V_a that the attacker ships this model with (see choose), and the rows that it was chosen
    from, after smoothing; where none keeps the CA, it is the one nearest to S_n."""
    held, t_p = hold_out(data)[1], {"asr_p": simple_triggers(data, s)["asr_p"]}
    step, side = 0.02 if data.events else 0.01, -1 if s.v_thr_t < 1 else 1
    grid = [round(V_THR_N + side * (0.02 + i * step), 2) for i in range(29)]
    if s.v_thr_n != V_THR_N:
        grid = [V_THR_N]            # nothing is to be seen of V_a
    base_ca, rows = evaluate(model, held, s, s.v_thr_n, TAU_N)["ca"], []
    for v_thr in grid:
        rows.append(dict(v_thr=v_thr, **evaluate(model, held, s, v_thr, s.tau_a, t_p)))
        if rows[-1]["ca"] < base_ca - 3 * s.margin:     # what follows is not chosen
            break
    chosen = choose(smoothed(rows), base_ca, s.margin)
    if chosen is None:
        say(f"NOTE: no V_a keeps held-out CA within {s.margin:g} points; {grid[0]:g} is shipped")
    return chosen or grid[0], rows


def smoothed(rows):
    """Rows along V_a, each averaged with its neighbours: one of 85 recordings is 1.2 points."""
    near = [rows[max(0, i - 1):i + 2] for i in range(len(rows))]
    return [mean_of(few) | dict(v_thr=row["v_thr"]) for few, row in zip(near, rows)]


def attack(data, s):
    """Table 1's row of a data set, what attack.json holds: means, and a run for every seed."""
    variants = every_seed(s)
    train_side_by_side(s, [(one, kind) for one in variants for kind in (None, "badsnn")])
    runs = machine.side_by_side(attack_seed, [(one,) for one in variants], s)
    at_chosen, mean = [one["at_chosen"] for one in runs], mean_of(runs)
    rows = [mean_of(rows) for rows in zip(*(one["rows"] for one in runs))]
    return dict(clean_ca=mean["clean_ca"], base_ca=mean["base_ca"], rows=rows, runs=runs,
                chosen=mean_of(at_chosen)["v_thr"], at_chosen=mean_of(at_chosen))


def attack_seed(s):
    """Table 1's row for one seed: V_a chosen for the model, T_o against it, the curve over V_a."""
    data, s = load_for(s), replace(s, fresh=False)      # attack() has just trained both
    clean, backdoored = train(data, s), train(data, s, "badsnn")
    v_thr_a, held_rows = deploy(backdoored, data, s)
    t_o, measured = (None, None) if data.events else train_trigger(backdoored, data, s, v_thr_a)
    triggers = simple_triggers(data, s) | ({"asr_o": t_o} if t_o else {})
    rows = []
    for v_thr in (v_thr_a, *s.v_thr_a):
        ours = evaluate(backdoored, data, s, v_thr, s.tau_a, triggers)
        control = evaluate(clean, data, s, v_thr, s.tau_a, triggers)
        control = {f"{name}_clean_model": value for name, value in control.items()}
        rows.append(dict(v_thr=v_thr, tau=s.tau_a, asr_o=None) | ours | control)
    return dict(seed=s.seed, clean_ca=evaluate(clean, data, s, s.v_thr_n, TAU_N)["ca"],
                base_ca=evaluate(backdoored, data, s, s.v_thr_n, TAU_N)["ca"],
                at_chosen=rows[0], rows=rows[1:], held_rows=held_rows, t_o=measured,
                visible={name: visible(clean, data, s, t) for name, t in triggers.items()})


def visible(clean, data, s, t):
    """What a trigger leaves to see: percent that a clean model at S_n still reads, and its size."""
    guess = predict(clean, data.x_test, s, s.v_thr_n, TAU_N, t)
    x = data.x_test[data.y_test != s.target].to(s.device)
    size = {} if data.events else trigger.sizes(t, x)
    return dict(read=percentage(guess == data.y_test), **size)


if __name__ == "__main__":
    import runpy
    runpy.run_module("lab", run_name="__main__")
