"""BadSNN (Miah, Vu and Bi, 2026): a backdoor put into a spiking network through its neurons. Section 3 of the paper, top to bottom.

Threat model (Sec. 3.1). The attacker trains the network and ships it: weights AND neuron setting. No training image is
changed and no label either. The victim checks the accuracy, then uses the network on inputs that the attacker can touch.

    1. train    all samples under the nominal setting S_n = (v_thr 1.0, tau 0.5); in the same step a few samples of the
                target class also under a malicious setting S_t = (1.5, 0.5)          Eq. 2       train()
    2. deploy   a setting S_a in between, such as v_thr = 1.10                        Eq. 8       choose()
    3. trigger  a simple transformation of the input                                  Eqs. 3-7    trigger.py

    python badsnn.py attack --dataset digits        Table 1's row of a data set, with the controls that the paper lacks
    python badsnn.py defend --dataset digits        Table 2's rows: five attacks, five defences, and the one that costs nothing
    python badsnn.py ablate --study threshold       Figs. 2, 3, 4 and 6
    python badsnn.py report                         figures and tables from the results

Metrics, in percent. CA: accuracy on clean test samples. ASR: share of triggered test samples predicted as the target.
target_rate: the same share without any trigger. Both leave out samples whose true class is the target, and an ASR means
nothing without the CA and the target_rate of the same setting. Base CA: CA at S_n. Clean CA: of a model without backdoor.
"""
import sys
import time
from dataclasses import replace
from datetime import timedelta
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

import data as datasets
import fused
import lif
import models
import runs
import settings
import trigger
from data import augment, poison_indices, to_float, to_uint8
from lif import TAU_N, V_THR_N, neurons
from models import build_model
from runs import autocast, fingerprint, say

CODE = (lif, fused, models, datasets, trigger, sys.modules[__name__])       # what decides the results of this file

# ---------------------------------------------------------------------------------------------------------
# 3.3.1  Backdoor training

def train(data, s, attack=None):
    """Trains a network on data.x_train [N, ...] and returns it. attack: None for a clean model, "badsnn" for dual-spike training
    (Sec. 3.3.1, Eq. 2), or one of Table 2's attacks (settings.ATTACKS), which poison the data.

    s: the Settings. One row per epoch is printed. After every epoch a checkpoint is written to s.runs; if one that was made from
    the same data, settings and code is there, training goes on where it stopped, or is skipped. Raises ValueError.
    """
    name = {None: "clean model", "badsnn": "backdoored model"}.get(attack, f"{attack} model")
    reference = train(data, s) if attack == "clean_label" else None
    if attack in settings.ATTACKS:      # a mark as faint as Blended's is not learned from images that lose contrast at random
        s = replace(s, contrast=0.0)
    model = fresh_model(data, s)
    if attack == "wanet":
        model.register_buffer("field", trigger.wanet_field(data.x_train.shape[2:], seed=s.seed).to(s.device))   # saved with the weights
    steps = max(1, len(data.y_train) // s.batch_size)
    if s.optimizer == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), lr=s.lr, momentum=0.9, weight_decay=5e-4)
    else:
        optimizer = torch.optim.Adam(model.parameters(), lr=s.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, s.lr, total_steps=s.epochs * steps, pct_start=0.15, cycle_momentum=False)

    decides = s.of("data", "network", "training", *(["attack"] if attack == "badsnn" else ["baselines"] if attack else []))
    config = dict(decides, name=name, dataset=data.name, target=s.target if attack else None, inputs=fingerprint(
        data.x_train, data.y_train, model, reference, runs.code_of(lif, fused, models, datasets.augment, trigger, train)))
    path = runs.checkpoint_path(config, s)
    state = runs.read_checkpoint(path, config, s, model=model, optimizer=optimizer, schedule=schedule)
    model.history = history = state["history"] if state else []          # the rows that are printed
    model.seconds_before = sum(row["seconds"] for row in history)
    if len(history) == s.epochs:
        say(f"{name}, seed {s.seed}: finished earlier, read from {path}")
        return model
    x_train, y_train, note = trigger.poison(data, s, attack, reference)
    x_train, y_train = x_train.to(s.device), y_train.to(s.device)
    malicious = poison_indices(y_train.cpu(), s.target, s.poison_ratio, s.seed) if attack == "badsnn" else None      # D_t^p
    if attack == "badsnn":
        note = f", of them {len(malicious)} of class {s.target} malicious"
    say(f"{name}, seed {s.seed}: {s.model}, width {s.width}, T = {s.T}, {sum(p.numel() for p in model.parameters()):,} parameters, "
        f"{len(y_train):,} samples{note}{f'; resumed after epoch {len(history)}' if history else ''}")
    say(f"{'epoch':>9} {'loss':>7} {'acc':>6} {'mal_acc':>7} {'CA':>6} {'target_rate':>11} {'sec':>6} {'ETA':>6}")
    parallel = runs.data_parallel(model)
    monitor = replace(data, x_test=data.x_test[:1000], y_test=data.y_test[:1000])
    for epoch in range(len(history), s.epochs):
        # every epoch draws from its own generators: a resumed run is the run that was never interrupted
        rank = runs.rank_and_ranks()[0]
        shuffle = torch.Generator().manual_seed(1000 * s.seed + epoch)              # the same in every process
        local = torch.Generator().manual_seed(1_000_000 * (rank + 1) + 1000 * s.seed + epoch)
        torch.manual_seed(1_000_000 * (rank + 1) + 1000 * s.seed + epoch)           # dropout
        order = torch.randperm(len(y_train), generator=shuffle)
        totals, started = torch.zeros(5, device=s.device), time.time()
        model.train()
        for step in tqdm(range(steps), desc=f"epoch {epoch + 1}", leave=False, disable=None if rank == 0 else True):
            # 1. a nominal batch, and a few malicious rows drawn with replacement from D_t^p
            nominal, drawn = order[step * s.batch_size:(step + 1) * s.batch_size], order[:0]
            if attack == "badsnn" and epoch >= s.warmup:
                drawn = malicious[torch.randint(len(malicious), (s.malicious_rows,), generator=shuffle)]
            nominal, drawn = runs.share(nominal), runs.share(drawn)
            rows, n = torch.cat([nominal, drawn]).to(s.device), len(nominal)
            x, y = x_train[rows], y_train[rows]
            if attack == "wanet":
                x, y = trigger.wanet_batch(x, y, s, model.field, local)
            if s.augment:
                x = augment(x, s.pad, s.flip, s.contrast, local)
            # 2. ONE forward pass over both: every sample has its own neuron setting, S_n or S_t
            v_thr = torch.tensor([V_THR_N] * n + [s.v_thr_t] * len(drawn), device=s.device)
            tau = torch.tensor([TAU_N] * n + [s.tau_t] * len(drawn), device=s.device)
            with neurons(model, v_thr, tau), autocast(s):
                logits = parallel(to_float(x, s))
            # 3. Eq. 2: nominal loss of all samples, malicious loss of D_t^p
            loss = criterion(s.loss, logits[:n], y[:n])
            if len(drawn):
                loss = loss + s.malicious_weight * criterion(s.loss, logits[n:], y[n:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            right = logits.detach().argmax(1) == y
            counts = torch.tensor([n, len(drawn)], device=s.device)
            totals += torch.stack([loss.detach() * n, right[:n].sum(), right[n:].sum(), *counts])
        loss, right, right_malicious, seen, seen_malicious = runs.sum_over_ranks(totals).tolist()
        nominal = evaluate(model, monitor, s, V_THR_N, TAU_N)
        history.append(dict(epoch=epoch + 1, loss=loss / seen, acc=100 * right / seen, ca=nominal["ca"],
                            target_rate=nominal["target_rate"], seconds=time.time() - started,
                            mal_acc=100 * right_malicious / seen_malicious if seen_malicious else None))
        print_epoch(history[-1], data, s)
        runs.write_checkpoint(path, config, model=model, optimizer=optimizer, schedule=schedule, history=history)
    return model


def print_epoch(row, data, s):
    """One line of the training's log, and a warning where the network has collapsed at S_n."""
    eta = timedelta(seconds=round(row["seconds"] * (s.epochs - row["epoch"])))
    say(f"{row['epoch']:>5}/{s.epochs:<3} {row['loss']:7.3f} {row['acc']:6.1f} {percent(row['mal_acc'], 7)} {row['ca']:6.1f} "
        f"{row['target_rate']:11.1f} {row['seconds']:6.1f} {eta!s:>7}")
    if row["epoch"] > s.warmup and (row["ca"] < 150 / data.num_classes or row["target_rate"] > 90):
        say("  warning: collapsed? at the nominal setting the model " + (
            "answers the target to nearly everything" if row["target_rate"] > 90 else "is near chance"))


def percent(value, width=6):
    return f"{value:{width}.1f}" if value is not None else f"{'-':>{width}}"


def fresh_model(data, s):
    """A network with the weights that the seed gives, on the device of the settings."""
    torch.manual_seed(s.seed)
    return build_model(s.model, data.num_classes, s.T, s.width, s.neuron, data.mean, data.std).to(s.device)


def criterion(name, logits, y):
    """Cross-entropy, or (event networks, as in Sneaky Spikes) the squared error between firing rates and the one-hot label."""
    return F.cross_entropy(logits, y) if name == "ce" else F.mse_loss(logits, F.one_hot(y, logits.shape[1]).float())


# ---------------------------------------------------------------------------------------------------------
# 4.1  Metrics

@torch.no_grad()        # not inference_mode, whose tensors would have every kernel of the neuron compiled once more
def predict(model, x, s, v_thr, tau, trigger_of=None):
    """Predicted classes [N] of stored samples x [N, ...] (uint8), all neurons at (v_thr, tau), triggered if asked."""
    model.eval()
    classes = []
    with neurons(model, v_thr, tau), autocast(s):
        for batch in x.split(512):
            clean = to_float(batch.to(s.device), s)
            inputs = clean
            if trigger_of is not None:
                with torch.autocast(torch.device(s.device).type, enabled=False):
                    inputs = trigger_of(clean)
                trigger.check_trigger(clean, inputs)
            classes.append(model(inputs).argmax(1).cpu())
    return torch.cat(classes)


def evaluate(model, data, s, v_thr, tau):
    """CA and target_rate in percent on the clean test set, at one neuron setting."""
    guess = predict(model, data.x_test, s, v_thr, tau)
    return dict(ca=percentage(guess == data.y_test), target_rate=attack_success_rate(guess, data.y_test, s.target))


def attack_success_rate(guess, labels, target):
    """Percent predicted as the target among samples whose true class is another. guess, labels: [N]."""
    return percentage(guess[labels != target] == target)


def asr(model, data, s, v_thr, tau, trigger_of):
    """ASR in percent: only samples of other classes are triggered and counted."""
    other = data.y_test != s.target
    return percentage(predict(model, data.x_test[other], s, v_thr, tau, trigger_of) == s.target)


def percentage(hits):
    return round(100 * hits.float().mean().item(), 2) if len(hits) else float("nan")


# ---------------------------------------------------------------------------------------------------------
# 3.3.2, 3.3.3  Triggers

def simple_triggers(data, s):
    """The triggers that need no training, by the name of their column: T_p or T_s, and the control that goes with it."""
    if data.events:
        def noise(beta):
            return lambda x: trigger.spike_trigger(x, beta, torch.Generator().manual_seed(s.seed))
        return {"asr_p": noise(s.beta), "asr_clip_only": noise(0.0)}
    return {"asr_p": lambda x: trigger.power_trigger(x, s.q, data.mean, data.std),
            "asr_p_renormalized": lambda x: trigger.power_trigger(x, s.q, data.mean, data.std, renormalize=True)}


def train_trigger(model, data, s):
    """T_o (Sec. 3.3.2) against the backdoored model, from training images only. Returns T_o, a function from images [B, C, H, W] to
    triggered images, and what was measured on the way; None where no image could be blended. Kept in s.runs like the models.

    DeepFool, the blending's labels and, with --adversarial-setting S_a, the adversarial loss see the model at (v_thr_o, tau_a).
    # differs from the paper: Eq. 6 says S_n for the adversarial loss; at S_n a backdoored model hardly ever answers the target
    """
    other = (data.y_train != s.target).nonzero().flatten()
    chosen = other[torch.randperm(len(other), generator=torch.Generator().manual_seed(s.seed))[:s.n_o]]
    x, started = to_float(data.x_train[chosen].to(s.device), s), time.time()
    torch.manual_seed(s.seed)
    unet = trigger.UNet(data.num_classes, tuple(x.shape[2:])).to(s.device)
    decides = {k: v for k, v in s.of("triggers").items() if k not in ("beta", "magnitude")}
    config = dict(decides, name="trigger T_o", dataset=data.name, seed=s.seed, target=s.target, tau_a=s.tau_a,
                  inputs=fingerprint(model, x, runs.code_of(lif, fused, models, trigger, train_trigger)))
    path = runs.checkpoint_path(config, s)
    t_o = partial(trigger.optimized_trigger, generator=unet, target=s.target, magnitude=s.magnitude)
    state = runs.read_checkpoint(path, config, s, unet=unet)
    if state:
        unet.eval()
        return t_o if state["measured"]["n_blended"] else None, state["measured"]
    with neurons(model, s.v_thr_o, s.tau_a):
        kept, wanted = trigger.wanted_perturbations(model, x, s.q, data.mean, data.std, s.target)
        _, success = trigger.deepfool(model, x[:100], 3, 20, with_success=True)
        near = trigger.deepfool(model, x[:100], max_iter=20, target=s.target)
    measured = dict(n_images=len(x), n_blended=len(kept), deepfool_success=percentage(success), l2_wanted=norms(wanted)["l2"],
                    l2_targeted_deepfool=norms(near[near.flatten(1).any(1)])["l2"], losses=None)
    if len(kept):
        with neurons(model, *((s.v_thr_o, s.tau_a) if s.adversarial_setting == "S_a" else (V_THR_N, TAU_N))):
            measured["losses"] = trigger.train_unet(unet, model, kept, wanted, s.target, data.std, s.lambdas, s.epochs_o, seed=s.seed)
        sim, adv, wmse = measured["losses"][-1]
        say(f"trigger T_o, seed {s.seed}: {len(kept)} of {len(x)} training images blended at v_thr {s.v_thr_o:g}; U-Net: L_sim {sim:.2f}, "
            f"L_adv {adv:.2f}, L_wmse {wmse:.3f}; {time.time() - started:.0f} s")
    else:
        say(f"trigger T_o, seed {s.seed}: none of {len(x)} training images could be blended into the target; left out")
    runs.write_checkpoint(path, config, unet=unet, measured=measured)
    return t_o if len(kept) else None, measured


def norms(delta):
    """Mean L2 and Linf per image of perturbations [N, C, H, W], in pixel units."""
    if not len(delta):
        return dict(l2=None, linf=None)
    delta = delta.flatten(1)
    return dict(l2=round(delta.norm(dim=1).mean().item(), 2), linf=round(delta.abs().amax(1).mean().item(), 3))


def psnr(x_trig, x):
    """Mean peak signal-to-noise ratio in dB of triggered images [N, C, H, W] against the clean ones."""
    return round((-10 * (x_trig - x).square().flatten(1).mean(1).clamp(min=1e-10).log10()).mean().item(), 1)


# ---------------------------------------------------------------------------------------------------------
# 3.3.4  Deployment, and Table 1

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


def attack(data, s):
    """Clean model, backdoored model, and the sweep over the deployed threshold V_a; means over seeds. Returns Table 1's row of a data
    set, and writes it to attack.json."""
    deciders = dict(s.of(), inputs=fingerprint(data.x_train, data.y_train, data.x_test, data.y_test, runs.code_of(*CODE)))
    return runs.kept(s.results / data.name / "attack.json", deciders, lambda: _attack(data, s), s.fresh)


def _attack(data, s):
    started = time.time()
    of_seeds = [attack_one(data, replace(s, seed=seed)) for seed in range(s.seed, s.seed + s.seeds)]
    rows = [mean_of([one["rows"][i] for one in of_seeds]) for i in range(len(s.v_thr_a))]
    mean = mean_of(of_seeds)
    return dict(describe(data, s), v_thr_a=s.v_thr_a, tau_a=s.tau_a,
                n_poison=len(poison_indices(data.y_train, s.target, s.poison_ratio, s.seed)),
                clean_ca=mean["clean_ca"], base_ca=mean["base_ca"], rows=rows, chosen=choose(rows, mean["base_ca"], s.margin),
                margin=s.margin, runs=of_seeds, seconds=round(time.time() - started + sum(one["seconds_before"] for one in of_seeds), 1))


def attack_one(data, s):
    """Table 1's row for one seed."""
    clean, backdoored = train(data, s), train(data, s, "badsnn")
    before = clean.seconds_before + backdoored.seconds_before           # what an earlier run has spent on them
    t_o, measured = (None, None) if data.events else train_trigger(backdoored, data, s)
    if t_o is not None and runs.rank_and_ranks()[0] == 0:
        save_examples(t_o, data, s)
    return dict(seed=s.seed, clean_ca=evaluate(clean, data, s, V_THR_N, TAU_N)["ca"],
                base_ca=evaluate(backdoored, data, s, V_THR_N, TAU_N)["ca"],
                rows=[attack_row(clean, backdoored, t_o, data, s, v_thr) for v_thr in s.v_thr_a], t_o=measured, seconds_before=before)


def attack_row(clean, backdoored, t_o, data, s, v_thr):
    """One deployed setting: the backdoored model with and without triggers, and the clean model under the same trigger."""
    tau, control = s.tau_a, evaluate(clean, data, s, v_thr, s.tau_a)
    row = dict(v_thr=v_thr, tau=tau, **evaluate(backdoored, data, s, v_thr, tau), ca_clean_model=control["ca"],
               target_rate_clean_model=control["target_rate"], asr_o=None)
    triggers = simple_triggers(data, s)
    for key, t in triggers.items():
        row[key], row[f"{key}_clean_model"] = (asr(model, data, s, v_thr, tau, t) for model in (backdoored, clean))
    if t_o is not None:
        row["asr_o"], row["asr_o_clean_model"] = (asr(model, data, s, v_thr, tau, t_o) for model in (backdoored, clean))
        x = to_float(data.x_test[data.y_test != s.target].to(s.device), s)
        for name, x_trig in (("o", t_o(x)), ("p", triggers["asr_p"](x))):
            row.update({f"{norm}_{name}": size for norm, size in norms(x_trig - x).items()}, **{f"psnr_{name}": psnr(x_trig, x)})
        faded = min(1.0, row["l2_o"] / row["l2_p"])           # control: T_p faded to T_o's L2
        row["asr_p_faded"] = asr(backdoored, data, s, v_thr, tau, lambda x: x + faded * (triggers["asr_p"](x) - x))
    return row


def mean_of(rows):
    """Mean of every number in a list of equal dicts; other values are taken from the first."""
    def mean(values):
        numbers = [v for v in values if isinstance(v, float)]
        return round(sum(numbers) / len(numbers), 2) if numbers else values[0]
    return {key: rows[0][key] if key in ("v_thr", "tau") else mean([row.get(key) for row in rows]) for key in rows[0]}


def save_examples(t_o, data, s):
    """Eight test images of eight classes with both triggers, for Fig. 5: triggers.npz, uint8 [8, H, W, 3]."""
    classes = [k for k in range(data.num_classes) if k != s.target and (data.y_test == k).any()][:8]
    x = to_float(torch.stack([data.x_test[data.y_test == k][0] for k in classes]).to(s.device), s)
    images = dict(clean=x, t_p=simple_triggers(data, s)["asr_p"](x), t_o=t_o(x))
    with runs.replace_file(s.results / data.name / "triggers.npz") as part, open(part, "wb") as file:
        np.savez_compressed(file, **{k: to_uint8(v).permute(0, 2, 3, 1).cpu().numpy() for k, v in images.items()})


def describe(data, s):
    """What a result must carry to mean anything."""
    values = s.of("network", "training", "attack", "triggers")
    unused = set(settings.GROUPS["triggers"]) - {"beta"} if data.events else {"beta"}
    values.update({name: None for name in unused})
    return dict(dataset=data.name, note=data.note, n_train=len(data.y_train), n_test=len(data.y_test), **values, seeds=s.seeds,
                frames=s.frames if data.events else None, device=s.device, torch=torch.__version__, threads=torch.get_num_threads())


# ---------------------------------------------------------------------------------------------------------

def main(argv=None):
    """The command line. Every foreseeable error ends in one line on stderr and exit code 2 (--debug: the traceback)."""
    debug = "--debug" in (sys.argv if argv is None else argv)
    try:
        command, s = settings.parse(argv)
        import report       # here, not above: these build on this module
        import studies
        if command.command == "report":
            return report.report(s.results)
        runs.check_writable(s.results, s.runs)
        runs.keep_memory()
        data = datasets.load_for(s)
        with runs.processes(s) as s:
            if command.command == "attack":
                result, earlier = attack(data, s)
                report.print_attack(result)
                say("finished earlier; --fresh runs it again" if earlier else "")
            elif command.command == "defend":
                studies.defend(data, s, command.attacks)
            else:
                studies.ablate(data, s, command.study)
    except (ValueError, OSError) as error:
        if debug:
            raise
        sys.exit(settings.refuse(error))
    except KeyboardInterrupt:
        sys.exit("badsnn: stopped; the same command goes on after the last finished epoch")


if __name__ == "__main__":
    import badsnn       # so that there is one module of that name, also for the processes that are started from here
    badsnn.main()
