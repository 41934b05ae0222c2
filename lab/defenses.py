"""Defences against backdoors (Sec. 4.3, Table 2): five published ones, and two that only move the thresholds.

x: a few clean images [N, C, H, W] in [0, 1], y: their labels [N]; augment shifts or mirrors them. Each returns a NEW
model, leaves its argument as it was, and works at the model's own neuron setting (lif.neurons). None sees a trigger,
and no value was chosen on an ASR.
"""
import copy
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.optim.lr_scheduler import CosineAnnealingLR

from kit.sources import need
from kit.training import generator
from lab.detectors import logits_of, probabilities
from lab.libraries import scaled
from lif import LIF, TAU_N, V_THR_N, neurons
from models import NMNISTNet, Pool

BATCH = 32      # at most; differs from the sources, 64 to 256: of a hundred images that makes too few steps


def restore(model):
    """Sets every neuron back to v_thr = 1.0, tau = 0.5 (Sec. 4.1); a PLIF keeps the tau that it learned. It stops only
    who does not expect it: a network whose BatchNorm weights and biases are divided by V_a spikes alike at 1.0."""
    with neurons(model, V_THR_N, TAU_N):
        return copy.deepcopy(model)


def recentre(model, x, keep=0.9):
    """Moves all thresholds to the middle of the range in which the answers to a few images x [N, C, H, W], without
    labels, stay what they are as shipped: up and down from there in steps of 5 %, as long as `keep` of them do. Who
    ships close to where the network breaks, as BadSNN must, is moved away from there; a change of unit hides nothing
    (ours)."""
    wanted = probabilities(model, x).argmax(1)

    def stays(percent):
        with scaled(model, percent / 100):
            return (probabilities(model, x).argmax(1) == wanted).float().mean() >= keep
    low = high = 100
    while low > 25 and stays(low - 5):
        low -= 5
    while high < 400 and stays(high + 5):
        high += 5
    centred = copy.deepcopy(model)
    for m in centred.modules():
        if isinstance(m, LIF):
            m.v_thr = m.v_thr * (low + high) / 200
    return centred


def fine_tune(model, x, y, epochs=20, lr=0.01, augment=nn.Identity(), seed=0):
    """Trains all weights (Sec. 4.3) on x [N, C, H, W], y [N], as BackdoorBench does (Wu et al. 2022)."""
    # differs from the source: 20 epochs, not 100
    student = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(student.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    schedule, rng = CosineAnnealingLR(optimizer, epochs), generator(seed, "fine-tuning shuffle")
    for _ in range(epochs):
        for images, labels in epoch_of(x, y, augment, rng):
            step(optimizer, F.cross_entropy(logits_of(student, images), labels))
        schedule.step()
    return student.eval()


def epoch_of(x, y, augment, rng):
    """One epoch: every image once, augmented, in random order, in batches of nearly equal size, at most BATCH."""
    for rows in torch.randperm(len(x), generator=rng).tensor_split(-(-len(x) // BATCH)):
        yield augment(x[rows]), y[rows]


def step(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def clp(model, u=3.0):
    """Channel Lipschitz pruning (Zheng et al. 2022), without data: a backdoor's channels react more strongly than most.
    In every layer channels whose constants [C] exceed mean + u * standard deviation are switched off (u: Sec. 4.3)."""
    # differs from the source: BatchNorm's factor contains its eps, as the layer does
    model = copy.deepcopy(model)
    for conv, bn in conv_bn_pairs(model):
        sigma = torch.linalg.svdvals(conv.weight.detach().flatten(2))[:, 0]     # the largest, of kernels [C_in, k * k]
        constant = sigma * bn.weight.detach().abs() / (bn.running_var + bn.eps).sqrt()
        switch_off(bn, constant > constant.mean() + u * constant.std())
    return model


@torch.no_grad()
def conv_bn_pairs(model):
    """[(convolution, the BatchNorm that normalises its output)] as a forward pass meets them. Raises ValueError."""
    # differs from the source, which takes the convolution before it in the list of modules
    net, made, met = copy.deepcopy(model).eval(), {}, []        # a copy, as neurons of other libraries keep a state
    convs, norms = [m for m in net.modules() if isinstance(m, nn.Conv2d)], batch_norms(net)
    for m in convs:             # every output is kept, so one at the same address is the same, whatever its shape
        m.register_forward_hook(lambda m, args, out: made.update({out.data_ptr(): (m, out)}))
    for m in norms.values():
        m.register_forward_pre_hook(lambda m, args: met.append((m, made.get(args[0].data_ptr()))))
    if convs:
        shape = (net.T, 2, 34, 34) if isinstance(net, NMNISTNet) else (convs[0].in_channels, 32, 32)
        net(convs[0].weight.new_zeros(1, *shape))
    original = dict(zip(net.modules(), model.modules()))
    pairs = [(original[found[0]], original[bn]) for bn, found in met if found]
    need(pairs, "CLP: no BatchNorm of this network follows a convolution")
    return list(dict.fromkeys(pairs))       # once each, also where a network calls them in every time step


def batch_norms(model):
    """{name: BatchNorm layer}. Raises ValueError for one that pruning can neither judge nor switch off."""
    norms = {name: m for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    for name, bn in norms.items():
        need(bn.affine and bn.track_running_stats, f"{name}, {bn}: pruning needs its weights and running statistics")
    return norms


@torch.no_grad()
def switch_off(bn, channels):
    """Silences channels (bool [C]): weight 0, and bias 0 too, else one with bias >= v_thr would always spike."""
    bn.weight[channels] = 0
    bn.bias[channels] = 0


def anp(model, x, y, iterations=100, augment=nn.Identity(), seed=0):
    """Adversarial neuron pruning (Wu and Wang 2021) on x [N, C, H, W], y [N], N >= 2: channels that a small change
    turns into the backdoor are pruned, those whose masks end at or below a threshold. It rises as long as a fifth of
    the images, of every class, on which no mask was learned, keeps 0.9 times its accuracy."""
    # differs from BackdoorBench (Wu et al. 2022): there the ASR, which no defender knows, chooses the threshold
    order = torch.randperm(len(y), generator=generator(seed, "ANP held-out images"))
    order = order[y[order].cpu().argsort(stable=True)]              # by class, at random inside it
    held, rest = order[::5], order[torch.arange(len(y)) % 5 > 0]
    masks = anp_masks(model, x[rest], y[rest], iterations, augment, seed)
    pruned, least = copy.deepcopy(model), 0.9 * accuracy(model, x[held], y[held])
    for threshold in range(0, 91, 5):
        candidate = copy.deepcopy(model)
        for bn, mask in zip(batch_norms(candidate).values(), masks):
            switch_off(bn, mask <= threshold / 100)
        if accuracy(candidate, x[held], y[held]) < least:
            break
        pruned = candidate
    return pruned


def accuracy(model, x, y):
    return (probabilities(model, x).argmax(1) == y).float().mean().item()


def anp_masks(model, x, y, iterations, augment=nn.Identity(), seed=0, eps=0.4, alpha=0.5):
    """A mask [C] in [0, 1] for every BatchNorm: min over m of alpha * loss(m) + (1 - alpha) * max over noise of
    loss(m + noise). The masked network must stay good even when weights and biases are disturbed by up to 2 eps."""
    # differs from the source: alpha 0.5 (Sec. 4.3), there 0.2; 100 iterations, there 2000
    net = copy.deepcopy(model).train().requires_grad_(False)
    masks = [torch.ones_like(bn.weight, requires_grad=True) for bn in batch_norms(net).values()]
    none = [torch.zeros(2, len(mask), device=mask.device) for mask in masks]
    optimizer = torch.optim.SGD(masks, lr=0.2, momentum=0.9)
    draws, noises = generator(seed, "ANP batches"), generator(seed, "ANP noise")
    for _ in range(iterations):
        rows = torch.randint(len(x), (BATCH,), generator=draws)
        loss_of = partial(masked_loss, net, masks, augment(x[rows]), y[rows])
        start = [(eps * (2 * torch.rand(z.shape, generator=noises) - 1)).to(z.device).requires_grad_() for z in none]
        uphill = torch.autograd.grad(loss_of(start), start)
        worst = [(z + eps * g.sign()).detach() for z, g in zip(start, uphill)]
        step(optimizer, alpha * loss_of(none) + (1 - alpha) * loss_of(worst))
        with torch.no_grad():
            for mask in masks:
                mask.clamp_(0, 1)
    return [mask.detach() for mask in masks]


def masked_loss(net, masks, x, y, noises):
    """Cross-entropy with BatchNorm's weights times mask [C] + noise[0], biases times 1 + noise[1]; noise [2, C]."""
    changed = {}
    for (name, bn), mask, noise in zip(batch_norms(net).items(), masks, noises):
        changed[f"{name}.weight"] = bn.weight * (mask + noise[0])
        changed[f"{name}.bias"] = bn.bias * (1 + noise[1])
    return F.cross_entropy(logits_of(partial(functional_call, net, changed), x), y)


def tsbd(model, x, y, epochs=21, max_unlearn=100, augment=nn.Identity(), seed=0):
    """Two-stage backdoor defence (Lin et al. 2024) on x [N, C, H, W], y [N]: weights that move when clean data are
    UNLEARNED are the backdoor's. They are set to zero, and the rest is fine-tuned, steep loss punished as well."""
    student = zero_reinit(model, unlearn(model, x, y, max_unlearn, augment, seed)).train()
    optimizer, rng = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9), generator(seed, "TSBD shuffle")
    for _ in range(epochs):
        for images, labels in epoch_of(x, y, augment, rng):
            activeness_aware_backward(student, lambda net: F.cross_entropy(net(images), labels))
            optimizer.step()
    return student.eval()


def unlearn(model, x, y, max_epochs, augment=nn.Identity(), seed=0, lr=1e-3):
    """A new model, by gradient ASCENT on the loss of clean images until the accuracy, measured after every epoch on
    augmented images, is down to 10 % (or to chance, 1 / K, where that is more)."""
    # differs from the source: rate 1e-3, not 1e-4: an eighth of the epochs, 93 % of the same neurons on digits
    model = copy.deepcopy(model)
    optimizer, rng = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9), generator(seed, "unlearning shuffle")
    for _ in range(max_epochs):
        model.train()
        for images, labels in epoch_of(x, y, augment, rng):
            step(optimizer, -F.cross_entropy(model(images), labels))
        if accuracy(model, augment(x), y) <= max(0.10, 1 / len(y.unique())):
            break
    return model.eval()


@torch.no_grad()
def zero_reinit(model, unlearned, channel_share=0.15, weight_share=0.7):
    """A new model. Of the channels whose convolution weights (shortcuts aside) changed most in sum, the weights that
    changed most are zero; both shares are over all layers together."""
    model = copy.deepcopy(model)
    names = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and "shortcut" not in name]
    weights = [model.get_submodule(name).weight for name in names]
    changes = [(w - unlearned.get_submodule(name).weight).abs() for name, w in zip(names, weights)]
    sums = [change.flatten(1).sum(1) for change in changes]
    every = torch.cat(sums)
    least_sum = every.topk(max(1, int(channel_share * len(every)))).values[-1]
    every = torch.cat([change[total >= least_sum].flatten() for change, total in zip(changes, sums)])
    least = every.topk(max(1, int(weight_share * len(every)))).values[-1]
    for w, change, total in zip(weights, changes, sums):
        w[(total >= least_sum).view(-1, 1, 1, 1) & (change >= least)] = 0
    return model


def activeness_aware_backward(model, loss_of, r=0.05, a=0.7):
    """Gradients become (1 - a) g1 + a g2, with g2 the gradient a distance r further up the slope, per parameter tensor:
    they favour flat minima, where no neuron is very active. BatchNorm's statistics are those of the first pass."""
    parameters = dict(model.named_parameters())
    g1 = torch.autograd.grad(loss_of(model), list(parameters.values()))
    ahead = {name: (p + r * g / g.norm().clamp(min=1e-12)).detach().requires_grad_()
             for (name, p), g in zip(parameters.items(), g1)}
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    g2 = torch.autograd.grad(loss_of(partial(functional_call, model, ahead | buffers)), list(ahead.values()))
    for p, first, second in zip(model.parameters(), g1, g2):
        p.grad = (1 - a) * first + a * second


def nad(model, x, y, epochs=20, teacher_epochs=10, augment=nn.Identity(), seed=0):
    """Neural attention distillation (Li et al. 2021) on x [N, C, H, W], y [N]: a fine-tuned copy teaches the model
    where to look. The student, the model again, learns the labels and the teacher's attention maps of three stages."""
    # differs from the source: rate 0.01 from the start; the teacher is fine_tune's; no Cutout; maps of firing rates
    teacher = fine_tune(model, x, y, teacher_epochs, augment=augment, seed=seed)
    student, rng = copy.deepcopy(model).train(), generator(seed, "NAD shuffle")
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4, nesterov=True)
    for _ in range(epochs):
        for images, labels in epoch_of(x, y, augment, rng):
            with torch.no_grad():
                wanted = with_maps(teacher, images)[1]
            logits, maps = with_maps(student, images)
            step(optimizer, F.cross_entropy(logits, labels) + distillation_loss(maps, wanted))
    return student.eval()


def with_maps(model, x):
    """Logits [B, K], and the firing rates (mean over T) [B, C, H, W] of the last neurons of the last three stages."""
    maps, hooks = [], []
    for stage in model.stages[-3:]:
        last = [layer for layer in stage if not isinstance(layer, Pool)][-1]
        hooks.append(last.register_forward_hook(lambda m, args, s: maps.append(s.mean(0, dtype=torch.float32))))
    logits = model(x)
    for hook in hooks:
        hook.remove()
    return logits, maps


def distillation_loss(maps, wanted, betas=(500, 1000, 1000), sides=(32, 16, 8)):
    """beta * mean squared difference of normalised attention maps, summed over stages."""
    # differs from the source where maps are smaller than its sides, which count all the same: else the loss diverges
    return sum(beta * F.mse_loss(attention(a), attention(b), reduction="sum") / (len(a) * side ** 2)
               for a, b, beta, side in zip(maps, wanted, betas, sides))


def attention(f):
    """[B, C, H, W] -> [B, H * W]: the sum of squares over channels, scaled to length 1 per sample."""
    f = f.square().sum(1).flatten(1)
    return f / (f.norm(dim=1, keepdim=True) + 1e-6)
