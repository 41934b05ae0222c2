"""BadSNN (Miah, Vu and Bi, 2026): a backdoor put into a spiking network through its neurons. Sec.
3.

Threat model (Sec. 3.1). The attacker trains the network and ships it: weights AND neuron setting.
No label is changed, no image carries a trigger. The victim checks the accuracy and uses the network
on inputs that the attacker can touch.

    1. train    all samples under the nominal setting S_n = (v_thr 1.0, tau 0.5); in the same step a
                few of the target class also under a malicious one, S_t = (1.5, 0.5)  Eq. 2  train()
    2. deploy   a setting S_a in between, such as v_thr = 1.10                        Eq. 8  choose()
    3. trigger  a simple transformation of the input                             Eqs. 3-7  trigger.py

Metrics, in percent. CA: accuracy on clean test samples. ASR: share of triggered test samples
predicted as the target. target_rate: the same share without any trigger. Both leave out samples
whose true class is the target, and an ASR means nothing without the CA and the target_rate of the
same setting. Base CA: CA at S_n. Clean CA: of a clean model.

    python badsnn.py COMMAND --help     story, attack, defend, ablate, scan, report (see lab/cli.py)
"""
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F

import trigger
from data import augment, hold_out, load_for, poison_indices, to_float
from kit import machine
from kit.files import code_of, fingerprint, mean_of, spread_of
from kit.machine import autocast, say
from kit.training import TrainingLog, checkpoint_path, generator, read_checkpoint, write_checkpoint
from lif import TAU_N, V_THR_N, neurons
from models import build_model

CODE = code_of("*.py", "kit/*.py")      # what decides a trained network beside data and settings

# ----- 3.3.1  Backdoor training


def train(data, s, attack=None, poison=None):
    """Trains a network on data.x_train [N, ...], less a held-out part, and returns it.

    attack: None for a clean model, "badsnn" for dual-spike training (Sec. 3.3.1, Eq. 2). poison:
    another attack, which changes samples (lab.baselines.Poison). After every epoch a row is printed
    and a checkpoint written; training goes on where one of the same data, settings and code
    stopped. Raises ValueError, also where training diverges.
    """
    data, held = hold_out(data)
    malicious = malicious_samples(data, s) if attack == "badsnn" else []                # D_t^p
    model, steps = fresh_model(data, s), max(1, len(data.y_train) // s.batch_size)
    optimizer, schedule = descent(model, steps, s)
    log = training_log(data, held, s, malicious, poison, steps,
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
        log.end_epoch(**evaluate(model, held, s, V_THR_N, TAU_N), chance=100 / data.num_classes)
    model.T = s.T
    return model


def samples(data, s, poison=None):
    """Training samples x [N, ...], labels y [N], and which are poisoned [N], on the device."""
    none = torch.zeros(len(data.y_train), dtype=torch.bool)
    parts = poison.samples(data) if poison else (data.x_train, data.y_train, none)
    return [part.to(s.device) for part in parts]


def malicious_samples(data, s):
    """Row numbers of D_t^p (Sec. 3.3.1): the few target-class samples that are trained twice."""
    return poison_indices(data.y_train, s.target, s.poison_ratio, s.seed)


def batch(order, step, malicious, epoch, s, rng):
    """Row numbers of one step: a nominal batch [B], and after a warm-up of two epochs some of D_t^p
    [b], drawn with replacement; of both the share of this process."""
    nominal, drawn = order[step * s.batch_size:(step + 1) * s.batch_size], order[:0]
    if len(malicious) and epoch >= min(2, s.epochs // 2):
        drawn = malicious[torch.randint(len(malicious), (s.malicious_rows,), generator=rng)]
    return machine.share(nominal), machine.share(drawn)


def row_settings(n, n_malicious, s, rng):
    """v_thr and tau of every row, [n + n_malicious]: S_n for nominal ones, then S_t.
    # differs from the paper: each malicious row may draw its own V_t (s.v_thr_t_low)
    """
    low = s.v_thr_t if s.v_thr_t_low is None else s.v_thr_t_low
    v_thr_t = low + (s.v_thr_t - low) * torch.rand(n_malicious, generator=rng)
    v_thr = torch.cat([torch.full((n,), V_THR_N), v_thr_t])
    tau = torch.tensor([TAU_N] * n + [TAU_N if s.tau_t is None else s.tau_t] * n_malicious)
    return v_thr.to(s.device), tau.to(s.device)


def augmented(x, n, s, rng):
    """A batch x, shifted, mirrored and paled; the rows from n on, the malicious ones, with the loss
    of contrast of their own.
    # differs from the paper: malicious rows lose contrast, up to half, which nearly covers T_p
    """
    contrast = s.contrast if s.malicious_contrast is None else s.malicious_contrast
    return torch.cat([augment(x[:n], s.pad, s.flip, s.contrast, rng),
                      augment(x[n:], s.pad, s.flip, contrast, rng)])


def steps_in(epoch, s):
    """Time steps T of an epoch: few at first, 1, then 2, which costs less (TET's time inheritance
    training, Deng et al. 2022). Recorded events have their number of steps."""
    if s.model == "nmnist_net" or epoch >= 0.7 * s.epochs:
        return s.T
    return min(s.T, 1 if epoch < 0.4 * s.epochs else 2)


def criterion(outputs, y, s, smoothing=0.0):
    """The loss of outputs [T, B, K] for labels y [B]. Images: cross-entropy of every step (TET,
    Deng et al. 2022). Events: squared error of firing rates and one-hot labels (Abad et al. 2024).
    # differs from TET: without its second term, 0.001 times the squared distance of logits to 1
    """
    T, _, K = outputs.shape
    if s.model == "nmnist_net":
        return F.mse_loss(outputs.mean(0), F.one_hot(y, K).float())
    return F.cross_entropy(outputs.flatten(0, 1), y.repeat(T), label_smoothing=smoothing)


def descent(model, steps, s):
    """Optimiser and one-cycle schedule: SGD for images, Adam for events as in Abad et al.
    (2024)."""
    if s.model == "nmnist_net":
        optimizer = torch.optim.Adam(model.parameters(), s.lr)
    else:
        optimizer = torch.optim.SGD(model.parameters(), s.lr, momentum=0.9, weight_decay=5e-4,
                                    nesterov=True)
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(
        optimizer, s.lr, total_steps=s.epochs * steps, pct_start=0.15, cycle_momentum=False)


def fresh_model(data, s):
    """A network with the weights that the seed gives, on the device of the settings."""
    torch.manual_seed(s.seed)
    return build_model(s.model, data.num_classes, s.T, s.width, s.neuron, data.mean, data.std).to(s.device)


def training_log(data, held, s, malicious, poison, steps, **parts):
    """The log of one training, under its name and everything that decides its outcome."""
    name = poison.name if poison else "backdoored" if len(malicious) else "clean"
    groups = ("network", "training", "attack") if len(malicious) else ("network", "training")
    inputs = fingerprint(data.x_train, data.y_train, held.x_test, parts["model"], CODE,
                         poison.decides if poison else None)
    config = dict(s.of(*groups), dataset=data.name, target=s.target, inputs=inputs)
    note = (f"{s.model}, width {s.width}, T = {s.T}, "
            f"{sum(p.numel() for p in parts['model'].parameters()):,} parameters, "
            f"{len(data.y_train):,} samples, {len(malicious)} of them malicious")
    return TrainingLog(f"{name} model", config, s, steps, note, **parts)


def every_seed(s):
    """The settings of every seed."""
    return [replace(s, seed=seed) for seed in range(s.seed, s.seed + s.seeds)]


def train_job(s, attack):
    train(load_for(s), s, attack)


def train_side_by_side(s, wanted):
    """Trains models [(settings, attack), ...] on all cores and leaves them in s.runs, where train()
    finds them."""
    names = [f"{attack or 'clean'}, seed {variant.seed}" for variant, attack in wanted]
    machine.side_by_side(train_job, wanted, s, names)


# ----- 4.1  Metrics


def answers(outputs):
    """Predicted classes [B] of outputs [B, K]; -1 where all are equal: a silent network has not
    said class 0."""
    return outputs.argmax(1).where(outputs.amax(1) > outputs.amin(1), -1)


@torch.no_grad()
def predict(model, x, s, v_thr, tau, trigger_of=None):
    """Predicted classes [N] of stored samples x [N, ...] (uint8), all neurons at (v_thr, tau)
    (None: at their own), triggered if asked."""
    model.eval()
    classes, size = [], max(1, 512 * 34 * 34 // x.shape[-2:].numel())       # by pixels: memory
    with neurons(model, v_thr, tau), autocast(s):
        for stored in x.split(min(512, size)):
            inputs = clean = to_float(stored.to(s.device), s)
            if trigger_of is not None:
                with torch.autocast(inputs.device.type, enabled=False):
                    inputs = trigger_of(clean)
                trigger.check_trigger(clean, inputs)
            classes.append(answers(model(inputs)).cpu())
    return torch.cat(classes)


def percentage(hits):
    return round(100 * hits.float().mean().item(), 2) if len(hits) else float("nan")


def evaluate(model, data, s, v_thr, tau):
    """CA, and target_rate among samples of other classes, in percent of the clean test set."""
    guess = predict(model, data.x_test, s, v_thr, tau)
    return dict(ca=percentage(guess == data.y_test),
                target_rate=percentage(guess[data.y_test != s.target] == s.target))


def asr(model, data, s, v_thr, tau, trigger_of):
    """ASR in percent: only samples of other classes are triggered and counted."""
    x = data.x_test[data.y_test != s.target]
    return percentage(predict(model, x, s, v_thr, tau, trigger_of) == s.target)


def measure(model, data, s, v_thr, triggers):
    """A model deployed at (v_thr, s.tau_a): CA, target_rate, and an ASR for every trigger, by
    name."""
    rates = {name: asr(model, data, s, v_thr, s.tau_a, t) for name, t in triggers.items()}
    return evaluate(model, data, s, v_thr, s.tau_a) | rates


# ----- 3.3.2, 3.3.3  Triggers


def simple_triggers(data, s):
    """The triggers that need no training, by the name of their column: T_p or T_s, and a
    control."""
    if data.events:
        t_s = partial(trigger.seeded_spike_trigger, seed=s.seed)
        return {"asr_p": partial(t_s, beta=s.beta), "asr_clip_only": partial(t_s, beta=0.0)}
    t_p = partial(trigger.power_trigger, q=s.q, mean=data.mean, std=data.std)
    return {"asr_p": t_p, "asr_p_renormalized": partial(t_p, renormalize=True)}


def train_trigger(model, data, s, v_thr_a):
    """T_o (Sec. 3.3.2) against the backdoored model deployed at v_thr_a, from training images only.

    Returns T_o, images [B, C, H, W] -> triggered images (None where no image could be blended), and
    what was measured on the way. Kept in s.runs like the models.
    # differs from the paper: DeepFool, blending and Eq. 6 see the model at S_a; Eq. 6 says S_n,
    # where a backdoored model hardly ever answers the target
    """
    part, held = hold_out(data)
    other = (part.y_train != s.target).nonzero().flatten()
    order = torch.randperm(len(other), generator=generator(s.seed, "images of T_o"))
    x = to_float(part.x_train[other[order[:s.n_o]]].to(s.device), s)
    torch.manual_seed(s.seed)
    unet = trigger.UNet(data.num_classes, tuple(x.shape[2:]), budget=s.budget).to(s.device)
    config = dict(name="trigger T_o", dataset=data.name, seed=s.seed, target=s.target, q=s.q,
                  budget=s.budget, n_o=s.n_o, epochs_o=s.epochs_o, tau_a=s.tau_a, v_thr_a=v_thr_a,
                  inputs=fingerprint(model, x, held.x_test, CODE))
    path = checkpoint_path(config, s)
    state = read_checkpoint(path, config, s, unet=unet.eval())
    if state:
        measured = state["measured"]
    else:
        with neurons(model, v_thr_a, s.tau_a):
            kept, wanted = trigger.wanted_perturbations(model, x, s.q, data.mean, data.std, s.target)
            losses = trigger.train_unet(
                unet, model, kept, wanted, s.target, data.std, epochs=s.epochs_o, seed=s.seed,
                nominal_weight=0.3 if s.budget else 0.0) if len(kept) else None
        measured = dict(n_images=len(x), n_blended=len(kept), losses=losses)
        measured["magnitude"] = weakest_that_works(unet, model, held, s, v_thr_a) if len(kept) else None
        write_checkpoint(path, config, unet=unet, measured=measured)
        say(f"trigger T_o, seed {s.seed}: {len(kept)} of {len(x)} training images blended at v_thr "
            f"{v_thr_a:g}; m {measured['magnitude']}")
    t_o = partial(trigger.optimized_trigger, unet=unet, target=s.target, magnitude=measured["magnitude"])
    return (t_o if measured["n_blended"] else None), measured


def weakest_that_works(unet, model, held, s, v_thr_a):
    """Fig. 4b's factor m on T_o: the smallest with an ASR of 96 % on held-out images, else 1."""
    for m in [m / 20 for m in range(10, 20)]:
        t_o = partial(trigger.optimized_trigger, unet=unet, target=s.target, magnitude=m)
        if asr(model, held, s, v_thr_a, s.tau_a, t_o) >= 96:
            return m
    return 1.0


# ----- 3.3.4  Deployment, and Table 1


def choose(rows, base_ca, margin):
    """The attacker's V_a by Eq. 8, from rows over V_a measured on held-out TRAINING samples.

    Going away from V_THR_N until CA is more than margin below the best CA, base_ca included: the
    last of these whose ASR_p - target_rate is within 5 points of the best. (Nearer to V_t, T_o must
    change less.) None: no threshold keeps the CA."""
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


def deploy(model, data, s, grid=None):
    """The V_a that the attacker ships this model with (see choose), and the rows that it was chosen
    from. grid: going away from V_THR_N, towards V_t and on. Where none keeps the CA, its first is
    shipped, and that is said."""
    held, t_p = hold_out(data)[1], {"asr_p": simple_triggers(data, s)["asr_p"]}
    step, side = 0.02 if data.events else 0.01, -1 if s.v_thr_t < V_THR_N else 1
    grid = grid or [round(V_THR_N + side * (0.02 + i * step), 2) for i in range(29)]
    base_ca, rows = evaluate(model, held, s, V_THR_N, TAU_N)["ca"], []
    for v_thr in grid:      # as far as CA is within the margin: nothing further can be chosen
        rows.append(dict(v_thr=v_thr, **measure(model, held, s, v_thr, t_p)))
        if rows[-1]["ca"] < max([base_ca] + [row["ca"] for row in rows]) - s.margin:
            break
    chosen = choose(rows, base_ca, s.margin)
    if chosen is None:
        say(f"NOTE: no V_a keeps CA within {s.margin:g} points on held-out samples; shipped at {grid[0]:g}")
    return chosen or grid[0], rows


def attack(data, s):
    """Table 1's row of a data set: clean and backdoored models, V_a chosen for each model, T_o, and
    the curve over V_a; means and spread over seeds. A dict, what attack.json holds."""
    variants = every_seed(s)
    train_side_by_side(s, [(one, kind) for one in variants for kind in (None, "badsnn")])
    names = [f"seed {one.seed}" for one in variants]
    runs = machine.side_by_side(attack_seed, [(one,) for one in variants], s, names)
    at_chosen = [one["at_chosen"] for one in runs]
    rows = [mean_of(rows) for rows in zip(*(one["rows"] for one in runs))]
    mean = mean_of([dict(clean_ca=one["clean_ca"], base_ca=one["base_ca"]) for one in runs])
    return dict(describe(data, s), **mean, chosen=mean_of(at_chosen)["v_thr"],
                at_chosen=mean_of(at_chosen), spread=spread_of(at_chosen), rows=rows, runs=runs)


def attack_seed(s):
    """Table 1's row for one seed."""
    data, s = load_for(s), replace(s, fresh=False)      # attack() has just trained both
    clean, backdoored = train(data, s), train(data, s, "badsnn")
    v_thr_a, held_rows = deploy(backdoored, data, s)
    t_o, measured = (None, None) if data.events else train_trigger(backdoored, data, s, v_thr_a)
    triggers = simple_triggers(data, s) | ({"asr_o": t_o} if t_o else {})
    rows = [attack_row(clean, backdoored, data, s, v_thr, triggers) for v_thr in (v_thr_a, *s.v_thr_a)]
    return dict(seed=s.seed, clean_ca=evaluate(clean, data, s, V_THR_N, TAU_N)["ca"],
                base_ca=evaluate(backdoored, data, s, V_THR_N, TAU_N)["ca"], at_chosen=rows[0],
                rows=rows[1:], held_rows=held_rows, t_o=measured,
                visible={name: visible(clean, data, s, t) for name, t in triggers.items()},
                training_seconds=[round(sum(row["seconds"] for row in model.history), 1)
                                  for model in (clean, backdoored)])


def attack_row(clean, backdoored, data, s, v_thr, triggers):
    """One deployed setting on the test set: the backdoored model, and the clean one as the
    control."""
    control = measure(clean, data, s, v_thr, triggers)
    return dict(v_thr=v_thr, tau=s.tau_a, asr_o=None) | measure(backdoored, data, s, v_thr, triggers) | {
        f"{name}_clean_model": value for name, value in control.items()}


def visible(clean, data, s, t):
    """How much a trigger leaves to see: percent of the triggered samples that a clean model at S_n
    still reads, and on images the size of the change."""
    guess = predict(clean, data.x_test, s, V_THR_N, TAU_N, t)
    x = data.x_test[data.y_test != s.target].to(s.device)
    size = {} if data.events else trigger.sizes(t, x)
    return dict(read=percentage(guess == data.y_test), **size)


def describe(data, s):
    """What a result must carry to mean anything."""
    part = hold_out(data)[0]
    n_poison = len(malicious_samples(part, s))
    share = round(n_poison / int((part.y_train == s.target).sum()), 4)
    unused = dict.fromkeys(("q", "budget", "n_o", "epochs_o") if data.events else ("beta",))
    gpu = f", {torch.cuda.get_device_name(s.device)}" if "cuda" in s.device else ""
    return dict(s.of() | unused, dataset=data.name, note=data.note, n_train=len(data.y_train),
                n_test=len(data.y_test), poison_ratio=share, n_poison=n_poison,
                torch=torch.__version__, device=s.device + gpu)


if __name__ == "__main__":
    import runpy
    runpy.run_module("lab", run_name="__main__")
