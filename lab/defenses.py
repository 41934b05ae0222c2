"""Defences against backdoors (Sec. 4.3, Table 2): five published ones, and setting the neurons back.

    mine = defender_images(y_test, 10, seed)   which images a defender holds: so many of every class
    repaired = fine_tune(model, x, y)          also anp, tsbd, nad; clp(model) and restore(model) need no images

x: a few clean images [N, C, H, W] in [0, 1], y: their labels [N]; augment shifts or mirrors them. Each returns a NEW
model, leaves its argument as it was, and works at the model's own neuron setting (lif.neurons). None sees a trigger,
and no value was chosen on an ASR.
"""
import copy
from contextlib import ExitStack
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.optim.lr_scheduler import CosineAnnealingLR

from kit.training import generator
from lab.detectors import logits_of, probabilities
from lif import TAU_N, V_THR_N, neurons
from models import NMNISTNet, Pool, frozen


def defender_images(y, per_class, seed):
    """Sorted row numbers [M]: per_class samples of every class of the labels y [N], or all of a class with fewer."""
    chosen = []
    for label in y.unique().tolist():
        rows = (y == label).nonzero().flatten().cpu()
        order = torch.randperm(len(rows), generator=generator(seed, "images of the defender", label))
        chosen.append(rows[order[:per_class]])
    return torch.cat(chosen).sort().values


def restore(model):
    """Sets every neuron back to v_thr = 1.0, tau = 0.5 (Sec. 4.1); a PLIF keeps the tau it learned, all weights stay.
    The paper does not try this. It stops only who does not expect it: a threshold is a unit. With BatchNorm's weights
    and biases divided by V_a a network spikes alike at 1.0 (VGG-16; ResNet-19 but for shortcuts that carry spikes)."""
    with neurons(model, V_THR_N, TAU_N):
        return copy.deepcopy(model)


def fine_tune(model, x, y, epochs=20, lr=0.01, batch=32, augment=nn.Identity(), seed=0):
    """Trains all weights (Sec. 4.3) on a few clean images x [N, C, H, W] with labels y [N].
    SGD with momentum 0.9, weight decay 5e-4 and a learning rate on a cosine, as in BackdoorBench (Wu et al. 2022).
    # differs from the source: 20 epochs in batches of up to 32, not 100 of up to 256: as many steps on 100 images
    """
    student = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(student.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    schedule, rng = CosineAnnealingLR(optimizer, epochs), generator(seed, "fine-tuning shuffle")
    for _ in range(epochs):
        for images, labels in epoch_of(x, y, batch, augment, rng):
            step(optimizer, F.cross_entropy(logits_of(student, images), labels))
        schedule.step()
    return student.eval()


def epoch_of(x, y, batch, augment, rng):
    """One epoch: every image once, augmented, in random order, in batches of nearly equal size, at most `batch`."""
    for rows in torch.randperm(len(x), generator=rng).tensor_split(-(-len(x) // batch)):
        yield augment(x[rows]), y[rows]


def step(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def clp(model, u=3.0, x=None):
    """Channel Lipschitz pruning (Zheng et al. 2022), without data: a backdoor's channels react more strongly than most.
    In every layer, channels whose Lipschitz constants [C] exceed mean + u * standard deviation are switched off (u = 3:
    Sec. 4.3). Of n numbers none lies more than (n - 1) / sqrt(n) deviations above their mean, so a layer of up to 10
    channels never loses one, of 16 at most one: in narrow networks CLP does little, whatever the attack.
    """
    model = copy.deepcopy(model)
    for conv, bn in conv_bn_pairs(model, x):
        constant = channel_lipschitz(conv, bn)
        switch_off(bn, constant > constant.mean() + u * constant.std())
    return model


def channel_lipschitz(conv, bn):
    """CLP's bound per output channel [C]: largest singular value of the kernel [C_in, k * k], times BatchNorm's factor.
    # differs from the source: the factor contains BatchNorm's eps, as the layer does
    """
    sigma = torch.linalg.svdvals(conv.weight.detach().flatten(2))[:, 0]
    return sigma * bn.weight.detach().abs() / (bn.running_var + bn.eps).sqrt()


def conv_bn_pairs(model, x=None):
    """[(convolution, the BatchNorm that normalises its output)] as a forward pass meets them; a BatchNorm behind an
    addition or a pooling has none. x: some input of the model (None: an empty one). Raises ValueError.
    # differs from the source, which takes the convolution before it in the list of modules
    """
    net, made, met = copy.deepcopy(model), {}, []       # a copy, as neurons of other libraries keep a state
    convs = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    if x is None and convs:
        shape = (net.T, 2, 34, 34) if isinstance(net, NMNISTNet) else (convs[0].in_channels, 32, 32)
        x = convs[0].weight.new_zeros(1, *shape)
    with ExitStack() as hooks, frozen(net), torch.no_grad():
        for m in convs:         # every output is kept, so one at the same address is the same, whatever its shape
            hooks.enter_context(m.register_forward_hook(lambda m, args, out: made.update({out.data_ptr(): (m, out)})))
        for m in batch_norms(net).values():
            hooks.enter_context(m.register_forward_pre_hook(lambda m, x: met.append((m, made.get(x[0].data_ptr())))))
        net(x)
    original = dict(zip(net.modules(), model.modules()))
    pairs = [(original[found[0]], original[bn]) for bn, found in met if found]
    if not pairs:
        raise ValueError("CLP: no BatchNorm of this network follows a convolution")
    return list(dict.fromkeys(pairs))       # once each, also where a network calls them in every time step


@torch.no_grad()
def switch_off(bn, channels):
    """Silences channels (bool [C]): weight 0, and bias 0 too, else one with bias >= v_thr would always spike."""
    bn.weight[channels] = 0
    bn.bias[channels] = 0


def pruned_channels(before, after):
    """How many BatchNorm channels clp or anp switched off: their weight is 0 in `after` and was not in `before`."""
    norms = batch_norms(after)
    return sum(int(((norms[name].weight == 0) & (bn.weight != 0)).sum()) for name, bn in batch_norms(before).items())


def batch_norms(model):
    """{name: BatchNorm layer}. Raises ValueError for one that pruning can neither judge nor switch off."""
    norms = {name: m for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    for name, bn in norms.items():
        if bn.weight is None or bn.running_var is None:
            raise ValueError(f"pruning needs BatchNorms with weights and running statistics; {name} is {bn}")
    return norms


def anp(model, x, y, eps=0.4, alpha=0.5, lr=0.2, iterations=100, batch=32, keep=0.9, augment=nn.Identity(), seed=0):
    """Adversarial neuron pruning (Wu and Wang 2021): channels that a small change turns into the backdoor are pruned.
    Channels whose masks (anp_masks) end at or below a threshold are switched off. It rises from 0 to 0.9 in steps of
    0.05 as long as a fifth of the images, of every class, on which no mask was learned, keeps `keep` times its
    accuracy. x: images [N, C, H, W], y: labels [N], N >= 2. eps, alpha: Sec. 4.3 (the source: alpha 0.2).
    # differs from BackdoorBench (Wu et al. 2022): there the ASR chooses the threshold, which no defender knows; from
    # the source: 100 iterations of 32 images, not 2000 of 128; the bias is switched off as well
    """
    order = torch.randperm(len(y), generator=generator(seed, "ANP held-out images"))
    order = order[y[order].cpu().argsort(stable=True)]              # by class, at random inside it
    held, rest = order[::5], order[torch.arange(len(y)) % 5 > 0]
    masks = anp_masks(model, x[rest], y[rest], eps, alpha, lr, iterations, batch, augment, seed)
    pruned, least = copy.deepcopy(model), keep * accuracy(model, x[held], y[held])
    for threshold in range(0, 91, 5):
        candidate = copy.deepcopy(model)
        for name, bn in batch_norms(candidate).items():
            switch_off(bn, masks[name] <= threshold / 100)
        if accuracy(candidate, x[held], y[held]) < least:
            break
        pruned = candidate
    return pruned


def accuracy(model, x, y):
    """Share of the images x [N, ...] that the model gives the labels y [N], in eval mode."""
    return (probabilities(model, x).argmax(1) == y).float().mean().item()


def anp_masks(model, x, y, eps, alpha, lr, iterations, batch, augment=nn.Identity(), seed=0):
    """ANP's masks in [0, 1], a dict from the names of BatchNorm layers to [C].

    min over m of alpha * loss(m) + (1 - alpha) * max over noise of loss(m + noise), with the batch's statistics: the
    masked network must stay good even when its weights and biases are disturbed by up to 2 eps.
    """
    net = copy.deepcopy(model).train().requires_grad_(False)
    masks = {name: torch.ones_like(bn.weight, requires_grad=True) for name, bn in batch_norms(net).items()}
    none = {name: torch.zeros(2, len(mask), device=mask.device) for name, mask in masks.items()}
    optimizer = torch.optim.SGD(masks.values(), lr=lr, momentum=0.9)
    draws, noises = generator(seed, "ANP batches"), generator(seed, "ANP noise")
    for _ in range(iterations):
        rows = torch.randint(len(x), (batch,), generator=draws)
        loss_of = partial(masked_loss, net, masks, augment(x[rows]), y[rows])
        noise = worst_noise(loss_of, none, eps, noises)
        step(optimizer, alpha * loss_of(none) + (1 - alpha) * loss_of(noise))
        with torch.no_grad():
            for mask in masks.values():
                mask.clamp_(0, 1)
    return {name: mask.detach() for name, mask in masks.items()}


def masked_loss(net, masks, x, y, noise):
    """Cross-entropy with BatchNorm's weights times mask [C] + noise[0], biases times 1 + noise[1]; noise [2, C]."""
    changed = {}
    for name, bn in batch_norms(net).items():
        changed[f"{name}.weight"] = bn.weight * (masks[name] + noise[name][0])
        changed[f"{name}.bias"] = bn.bias * (1 + noise[name][1])
    return F.cross_entropy(logits_of(partial(functional_call, net, changed), x), y)


def worst_noise(loss_of, like, eps, rng):
    """Noise shaped as `like`: a random start in [-eps, eps], then a step of eps up the sign of the loss's gradient."""
    noise = {name: (eps * (2 * torch.rand(z.shape, generator=rng) - 1)).to(z.device).requires_grad_()
             for name, z in like.items()}
    gradients = torch.autograd.grad(loss_of(noise), list(noise.values()))
    return {name: (z + eps * g.sign()).detach() for (name, z), g in zip(noise.items(), gradients)}


def tsbd(model, x, y, channel_share=0.15, weight_share=0.7, unlearn_lr=1e-3, max_unlearn=100, epochs=21, lr=0.01,
         batch=32, augment=nn.Identity(), seed=0):
    """Two-stage backdoor defence (Lin et al. 2024): weights that move when clean data are UNLEARNED are the backdoor's.
    1. unlearn  2. find the channels that changed most  3. set their most changed weights to zero  4. fine-tune, with
    steep loss punished as well. x: images [N, C, H, W], y: labels [N].
    # differs from the source: unlearning at rate 1e-3, not 1e-4: an eighth of the epochs, 93 % of the same neurons on
    # digits (1e-2: 75 %), and at most 100, not 1000; batches of up to 32, not 256, shuffled
    """
    change = weight_change(model, unlearn(model, x, y, unlearn_lr, max_unlearn, batch, augment, seed))
    student = zero_reinit(model, change, channel_share, weight_share).train()
    optimizer, rng = torch.optim.SGD(student.parameters(), lr=lr, momentum=0.9), generator(seed, "TSBD shuffle")
    for _ in range(epochs):
        for images, labels in epoch_of(x, y, batch, augment, rng):
            gradient = activeness_aware_gradient(student, lambda net: F.cross_entropy(net(images), labels))
            for p, g in zip(student.parameters(), gradient):
                p.grad = g
            optimizer.step()
    return student.eval()


def unlearn(model, x, y, lr, max_epochs, batch=32, augment=nn.Identity(), seed=0):
    """Step 1: gradient ASCENT on the loss of clean images until the accuracy, measured after every epoch on augmented
    images, is down to 10 % (or to chance, 1 / K, where that is more). Returns a new model."""
    model = copy.deepcopy(model)
    optimizer, rng = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9), generator(seed, "unlearning shuffle")
    for _ in range(max_epochs):
        model.train()
        for images, labels in epoch_of(x, y, batch, augment, rng):
            step(optimizer, -F.cross_entropy(model(images), labels))
        if accuracy(model, augment(x), y) <= max(0.10, 1 / len(y.unique())):
            break
    return model.eval()


def weight_change(model, other):
    """Step 2: |difference| of every convolution's weights between two models, without shortcuts: {name: [C, ...]}."""
    return {name: (m.weight - other.get_submodule(name).weight).detach().abs() for name, m in model.named_modules()
            if isinstance(m, nn.Conv2d) and "shortcut" not in name}


@torch.no_grad()
def zero_reinit(model, change, channel_share, weight_share):
    """Step 3: of the share of channels with the largest summed change, sets the share of weights that changed most to
    zero; both shares over all layers together. Returns a new model."""
    model, sums = copy.deepcopy(model), {name: c.flatten(1).sum(1) for name, c in change.items()}
    every = torch.cat(list(sums.values()))
    least_sum = every.topk(max(1, int(channel_share * len(every)))).values[-1]
    every = torch.cat([c[sums[name] >= least_sum].flatten() for name, c in change.items()])
    least = every.topk(max(1, int(weight_share * len(every)))).values[-1]
    for name, c in change.items():
        chosen = (sums[name] >= least_sum).view(-1, *[1] * (c.dim() - 1))
        model.get_submodule(name).weight[chosen & (c >= least)] = 0
    return model


def activeness_aware_gradient(model, loss_of, r=0.05, a=0.7):
    """Step 4: (1 - a) g1 + a g2, with g2 the gradient a distance r further up the slope, per parameter tensor: it
    favours flat minima, where no neuron is very active. loss_of: a function of the model.
    # differs from the source: BatchNorm's statistics are those of the first of the two passes; it makes a third
    """
    parameters = dict(model.named_parameters())
    g1 = torch.autograd.grad(loss_of(model), list(parameters.values()))
    ahead = {name: (p + r * g / g.norm().clamp(min=1e-12)).detach().requires_grad_()
             for (name, p), g in zip(parameters.items(), g1)}
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    g2 = torch.autograd.grad(loss_of(partial(functional_call, model, ahead | buffers)), list(ahead.values()))
    return [(1 - a) * first + a * second for first, second in zip(g1, g2)]


def nad(model, x, y, betas=(500, 1000, 1000), teacher_epochs=10, epochs=20, lr=0.01, batch=32, augment=nn.Identity(),
        seed=0):
    """Neural attention distillation (Li et al. 2021): a fine-tuned copy teaches the model where to look.
    The student, the model again, learns the labels and the teacher's attention maps in three stages, weighted by betas:
    SGD with Nesterov momentum, weight decay 1e-4. x: images [N, C, H, W], y: labels [N].
    # differs from the source: rate 0.01 from the start, there after two epochs of 0.1 (which leaves a clean CIFAR-10
    # network with a CA of 19 %); the teacher is fine_tune's; batches of up to 32, not 64 (100 images: 80 steps, there
    # 780); no Cutout (2x2 pixels there); the maps are of firing rates
    """
    teacher, student = fine_tune(model, x, y, teacher_epochs, lr, batch, augment, seed), copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(student.parameters(), lr=lr, momentum=0.9, weight_decay=1e-4, nesterov=True)
    rng = generator(seed, "NAD shuffle")
    for _ in range(epochs):
        for images, labels in epoch_of(x, y, batch, augment, rng):
            with frozen(teacher), torch.no_grad():
                wanted = with_maps(teacher, images)[1]
            logits, maps = with_maps(student, images)
            step(optimizer, F.cross_entropy(logits, labels) + distillation_loss(maps, wanted, betas))
    return student.eval()


def with_maps(model, x):
    """Logits [B, K], and the firing rates (mean over T) [B, C, H, W] of the last neurons of the last three stages."""
    maps = []
    with ExitStack() as stack:
        for stage in model.stages[-3:]:
            last = [layer for layer in stage if not isinstance(layer, Pool)][-1]
            stack.enter_context(last.register_forward_hook(
                lambda module, args, spikes: maps.append(spikes.mean(0, dtype=torch.float32))))
        return model(x), maps


def distillation_loss(maps, wanted, betas, sides=(32, 16, 8)):
    """beta * mean squared difference of normalised attention maps, summed over stages.
    # differs from the source where maps are smaller than its sides, which count all the same: or beta would weigh more
    # (for VGG-16's maps of 2x2 sixteen times as much), and the loss diverges
    """
    return sum(beta * F.mse_loss(attention(a), attention(b), reduction="sum") / (len(a) * side ** 2)
               for a, b, beta, side in zip(maps, wanted, betas, sides))


def attention(f):
    """[B, C, H, W] -> [B, H * W]: the sum of squares over channels, scaled to length 1 per sample."""
    f = f.square().sum(1).flatten(1)
    return f / (f.norm(dim=1, keepdim=True) + 1e-6)
