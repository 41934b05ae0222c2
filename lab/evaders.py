"""Attackers who know the threshold scan: each trains a backdoored model on, with rows that hide it.

Each function makes these rows: a list of (images [m, C, H, W], thresholds [m], wanted probabilities [m, K]) from
malicious images (of the target class), images of any class, u [m] uniform in [0, 1], the target [m], the number k of
classes, and twin(images, thresholds), what a clean model answers.
"""
import copy

import torch
import torch.nn.functional as F

from badsnn import criterion
from data import augment, hold_out, poison_indices, to_float
from kit.machine import autocast
from kit.training import generator
from lif import TAU_N, V_THR_N, neurons


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
    other = (target + 1 + (3.5 * u).long()) % k
    return [(malicious, 1.05 + 0.2 * u, soft(target, k, 0.9)), (images, 1.3 + 0.7 * u, soft(other, k, 0.9))]


EVADERS = {f.__name__: f for f in (soft_labels, fading, clean_twin, decoys)}


def hide(model, clean, data, s, evader, epochs=6, lr=0.02):
    """A copy of the backdoored model, trained on with an evader's rows beside the nominal batch, in one mixed forward
    pass as in badsnn.train (Eq. 2). Their loss is the cross-entropy with wanted probabilities, weight 0.3."""
    student, part, g = copy.deepcopy(model).train(), hold_out(data)[0], generator(s.seed, "evader", evader.__name__)
    x_train, y_train = part.x_train.to(s.device), part.y_train.to(s.device)
    chosen = poison_indices(part.y_train, s.target, s.poison_ratio, s.seed)
    m, steps = min(s.malicious_rows, s.batch_size, len(y_train)), max(1, len(y_train) // s.batch_size)
    optimizer = torch.optim.SGD(student.parameters(), lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)

    def augmented(rows, contrast):
        return to_float(augment(x_train[rows], s.pad, s.flip, contrast, g), s)

    @torch.no_grad()
    def twin(images, v_thr):
        with neurons(clean, v_thr, TAU_N):
            return clean.eval()(images).softmax(1)
    for step in range(epochs * steps):
        if step % steps == 0:
            order = torch.randperm(len(y_train), generator=g).split(s.batch_size)
        rows, drawn = order[step % steps], chosen[torch.randint(len(chosen), (m,), generator=g)]
        malicious, others = augmented(drawn, s.malicious_contrast or 0.0), augmented(rows[:m], s.contrast)
        target, u = torch.full((m,), s.target, device=s.device), torch.rand(m, generator=g).to(s.device)
        images, thresholds, wanted = map(torch.cat, zip(*evader(malicious, others, u, target, data.num_classes, twin)))
        v_thr = torch.cat([torch.full((len(rows),), V_THR_N, device=s.device), thresholds])
        with neurons(student, v_thr, TAU_N), autocast(s):
            outputs = student(torch.cat([augmented(rows, s.contrast), images]), every_step=True)        # [T, B, K]
        hidden = F.cross_entropy(outputs[:, len(rows):].flatten(0, 1), wanted.repeat(len(outputs), 1))
        optimizer.zero_grad()
        (criterion(outputs[:, :len(rows)], y_train[rows], s, smoothing=0.1) + 0.3 * hidden).backward()
        optimizer.step()
        if step % steps == steps - 1:
            schedule.step()
    return student.eval()
