"""Defences against backdoors (Sec. 4.3, Table 2): five published ones, restoring the neurons, and two detectors.

    repaired = fine_tune(model, x, y)          x: a few clean images [N, C, H, W] in [0, 1], y: their labels [N]
    repaired = clp(model)                      needs no data
    repaired = anp(model, x, y)                also tsbd(...), nad(...)
    repaired = restore(model)                  v_thr and tau back to nominal: costs nothing

Each returns a NEW model and leaves its argument as it was. All work at the model's own neuron setting, that is, on the
network as the attacker ships it (see lif.neurons). None of them sees a trigger. Their
settings are fixed but for the learning rate of fine-tuning and NAD (badsnn.py's --defense-lr); that rate on digits and ANP's
threshold were fixed after a look at the ASR of BadNets on digits, seed 0, so that row flatters the three.

    entropy = strip(model, x, clean)           how sure the model stays when other images are laid over x: low = suspicious
    score = spike_deviation(model, x, clean)   how far the number of spikes leaves what clean images cause

augment, where it is an argument, is a function from a batch of images to a randomly shifted or mirrored batch.
"""
import copy

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from lif import LIF, PLIF, TAU_N, V_THR_N, count_spikes
from models import Pool, frozen


def restore(model):
    """Sets every neuron back to the nominal setting v_thr = 1.0, tau = 0.5 (Sec. 4.1); a PLIF keeps the tau it learned, and all
    weights stay. The paper does not try this defence."""
    model = copy.deepcopy(model)
    for m in model.modules():
        if isinstance(m, LIF):
            m.v_thr = V_THR_N
            m.tau = m.tau if isinstance(m, PLIF) else TAU_N
    return model


# ---------------------------------------------------------------------------------------------------------
# Fine-tuning

def fine_tune(model, x, y, epochs=20, lr=0.01, batch=32, augment=None, seed=0):
    """Trains all weights (Sec. 4.3) on a few clean images x [N, C, H, W] in [0, 1] with labels y [N]; SGD, cosine schedule.

    # differs from BackdoorBench: 20 epochs in batches of 32, not 100 of 256; lr is its 0.01, but 0.1, the peak of training, on digits
    """
    student = copy.deepcopy(model).train()
    for rows, optimizer in _steps(student, len(x), epochs, lr, batch, seed):
        loss = F.cross_entropy(student(_augmented(x[rows], augment)), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return student.eval()


def _steps(model, n, epochs, lr, batch, seed):
    """Yields shuffled batches of row numbers and the optimiser, for so many epochs; steps the schedule after each."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * max(1, n // batch))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(n, generator=generator)
        for i in range(max(1, n // batch)):
            yield order[i * batch:(i + 1) * batch], optimizer
            schedule.step()


def _augmented(x, augment):
    return x if augment is None else augment(x)


# ---------------------------------------------------------------------------------------------------------
# Pruning

def clp(model, u=3.0):
    """Channel Lipschitz pruning (Zheng et al. 2022), without data: a backdoor's channels react more strongly than others.

    In every layer, the channels whose Lipschitz constants [C] exceed mean + u * standard deviation are switched off (u = 3: Sec. 4.3).
    """
    model = copy.deepcopy(model)
    for conv, bn in conv_bn_pairs(model):
        constant = channel_lipschitz(conv, bn)
        switch_off(bn, constant > constant.mean() + u * constant.std())
    return model


def channel_lipschitz(conv, bn):
    """CLP's bound per output channel [C]: largest singular value of the kernel [C_in, k * k], times BatchNorm's factor."""
    sigma = torch.linalg.svdvals(conv.weight.detach().flatten(2))[:, 0]
    return sigma * bn.weight.detach().abs() / (bn.running_var + bn.eps).sqrt()


def conv_bn_pairs(model):
    """Every BatchNorm of the model with the convolution before it."""
    pairs, conv = [], None
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            conv = m
        elif isinstance(m, nn.BatchNorm2d):
            pairs.append((conv, m))
    return pairs


@torch.no_grad()
def switch_off(bn, channels, keep_bias=False):
    """Makes channels (bool [C]) constant: weight 0, and bias 0 too, else a channel with bias >= v_thr would always spike."""
    bn.weight[channels] = 0
    if not keep_bias:
        bn.bias[channels] = 0


def anp(model, x, y, eps=0.4, alpha=0.5, lr=0.2, iterations=200, batch=32, threshold=0.6, augment=None, seed=0):
    """Adversarial neuron pruning (Wu and Wang 2021): channels that a small change of weights turns into the backdoor are pruned.

    Every BatchNorm channel gets a mask m, learned in anp_masks; those that end below the fixed threshold are switched off in
    the original network. eps, alpha: Sec. 4.3. x: images [N, C, H, W] in [0, 1], y: labels [N].
    # differs from the source: 200 iterations of 32 images, not 2000 of 128, to fit a CPU; the masks then stay nearer to 1, so the
    # threshold is 0.6, not 0.2. The bias is switched off as well
    """
    masks = anp_masks(model, x, y, eps, alpha, lr, iterations, batch, augment, seed)
    model = copy.deepcopy(model)
    for name, bn in _batch_norms(model):
        switch_off(bn, masks[name] < threshold)
    return model


def anp_masks(model, x, y, eps, alpha, lr, iterations, batch, augment=None, seed=0):
    """ANP's masks in [0, 1], a dict from the names of BatchNorm layers to [C].

    min over m of alpha * loss(m) + (1 - alpha) * max over noise of loss(m + noise): the network with masked channels must stay
    good even when its weights and biases are disturbed by up to 2 eps. BatchNorm uses the batch's statistics.
    """
    net = copy.deepcopy(model).train().requires_grad_(False)
    norms = dict(_batch_norms(net))
    masks = {name: torch.ones_like(bn.weight, requires_grad=True) for name, bn in norms.items()}
    optimizer = torch.optim.SGD(masks.values(), lr=lr, momentum=0.9)
    generator = torch.Generator().manual_seed(seed)

    def loss_of(images, labels, noise):
        weights = {f"{name}.weight": bn.weight * (masks[name] + noise[name][0]) for name, bn in norms.items()}
        biases = {f"{name}.bias": bn.bias * (1 + noise[name][1]) for name, bn in norms.items()}
        return F.cross_entropy(functional_call(net, weights | biases, (images,)), labels)

    none = {name: torch.zeros(2, len(bn.weight), device=bn.weight.device) for name, bn in norms.items()}
    for _ in range(iterations):
        rows = torch.randint(len(x), (batch,), generator=generator)
        images, labels = _augmented(x[rows], augment), y[rows]
        noise = worst_noise(lambda noise: loss_of(images, labels, noise), none, eps, generator)
        loss = alpha * loss_of(images, labels, none) + (1 - alpha) * loss_of(images, labels, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for mask in masks.values():
                mask.clamp_(0, 1)
    return {name: mask.detach() for name, mask in masks.items()}


def worst_noise(loss_of, like, eps, generator):
    """A random start in [-eps, eps], then one step of eps up the sign of the gradient: noise in [-2 eps, 2 eps], shaped as `like`."""
    noise = {name: (eps * (2 * torch.rand(z.shape, generator=generator) - 1)).to(z.device).requires_grad_() for name, z in like.items()}
    gradients = torch.autograd.grad(loss_of(noise), list(noise.values()))
    return {name: (z + eps * g.sign()).detach() for (name, z), g in zip(noise.items(), gradients)}


def _batch_norms(model):
    return [(name, m) for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]


# ---------------------------------------------------------------------------------------------------------
# TSBD

def tsbd(model, x, y, neurons=0.15, weights=0.7, unlearn_lr=0.01, max_unlearn=50, epochs=20, lr=0.01, batch=32, augment=None, seed=0):
    """Two-stage backdoor defence (Lin et al. 2024): weights that move when clean data are UNLEARNED are the backdoor's too.

    1. unlearn  2. find the neurons (convolution channels) that changed most  3. set their most changed weights to zero
    4. repair with fine-tuning that also punishes steep loss. x: images [N, C, H, W] in [0, 1], y: labels [N].
    # differs from the source: unlearning at learning rate 0.01, not 1e-4, which on few images takes hundreds of epochs; batches of 32,
    # not 256
    """
    change = weight_change(model, unlearn(model, x, y, unlearn_lr, max_unlearn, batch, seed))
    student = zero_reinit(model, change, neurons, weights).train()
    for rows, optimizer in _steps(student, len(x), epochs, lr, batch, seed):
        images = _augmented(x[rows], augment)
        gradient = activeness_aware_gradient(student, lambda: F.cross_entropy(student(images), y[rows]))
        for p, g in zip(student.parameters(), gradient):
            p.grad = g
        optimizer.step()
    return student.eval()


def unlearn(model, x, y, lr, max_epochs, batch=32, seed=0):
    """Step 1: gradient ASCENT on the loss of clean images until the accuracy is down to chance, 1 / K. Returns a new model."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        chance = 1 / model(x[:1]).shape[1]
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(max_epochs):
        model.train()
        for rows in torch.randperm(len(x), generator=generator).split(batch):
            loss = -F.cross_entropy(model(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 20)     # the loss has no upper end
            optimizer.step()
        with torch.no_grad():
            if (model.eval()(x).argmax(1) == y).float().mean() <= chance:
                break
    return model


def weight_change(model, other):
    """Step 2: |difference| of every convolution's weights between two models, without shortcuts: a dict from names to [C, ...]."""
    after = dict(other.named_modules())
    return {name: (m.weight - after[name].weight).detach().abs() for name, m in model.named_modules()
            if isinstance(m, nn.Conv2d) and "shortcut" not in name}


@torch.no_grad()
def zero_reinit(model, change, neurons, weights):
    """Step 3: of the `neurons` share of channels with the largest summed change, sets the `weights` share of weights that
    changed most to zero; both shares over all layers together. Returns a new model."""
    model = copy.deepcopy(model)
    modules = dict(model.named_modules())
    per_neuron = torch.cat([c.flatten(1).sum(1) for c in change.values()])
    least = per_neuron.topk(max(1, round(neurons * len(per_neuron)))).values[-1]
    chosen = {name: c.flatten(1).sum(1) >= least for name, c in change.items()}
    pool = torch.cat([c[chosen[name]].flatten() for name, c in change.items()])
    least = pool.topk(max(1, round(weights * len(pool)))).values[-1]
    for name, c in change.items():
        mask = (c >= least) & chosen[name].view(-1, *[1] * (c.dim() - 1))
        modules[name].weight[mask] = 0
    return model


def activeness_aware_gradient(model, loss_of, r=0.05, a=0.7):
    """Step 4: (1 - a) g1 + a g2, where g2 is the gradient a distance r further up the slope, per parameter tensor: it favours
    flat minima, where no neuron is very active. Parameters are left as they were; BatchNorm's statistics are taken once."""
    parameters = list(model.parameters())
    g1 = torch.autograd.grad(loss_of(), parameters)
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    steps = [r * g / g.norm().clamp(min=1e-12) for g in g1]
    with torch.no_grad():
        for p, step in zip(parameters, steps):
            p += step
    g2 = torch.autograd.grad(loss_of(), parameters)
    with torch.no_grad():
        for p, step in zip(parameters, steps):
            p -= step
        for name, b in model.named_buffers():
            b.copy_(buffers[name])
    return [(1 - a) * first + a * second for first, second in zip(g1, g2)]


# ---------------------------------------------------------------------------------------------------------
# NAD

def nad(model, x, y, betas=(500, 1000, 1000), teacher_epochs=10, epochs=20, lr=0.01, batch=32, augment=None, seed=0):
    """Neural attention distillation (Li et al. 2021): a fine-tuned copy teaches the model where to look.

    The teacher is the model fine-tuned on the clean images; the student, the model again, learns the labels and the teacher's
    attention maps in three stages, weighted by betas. x: images [N, C, H, W] in [0, 1], y: labels [N].
    # differs from the source: a learning rate falling on a cosine from 0.01 (0.1 on digits), where it has steps 0.1, 0.01, 1e-4;
    # batches of 32, not 64
    """
    teacher = fine_tune(model, x, y, teacher_epochs, lr, batch, augment, seed).requires_grad_(False)
    student = copy.deepcopy(model).train()
    for rows, optimizer in _steps(student, len(x), epochs, lr, batch, seed):
        images = _augmented(x[rows], augment)
        with torch.no_grad():
            _, wanted = with_maps(teacher, images)
        logits, maps = with_maps(student, images)
        loss = F.cross_entropy(logits, y[rows]) + distillation_loss(maps, wanted, betas)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return student.eval()


def with_maps(model, x):
    """Logits [B, K], and the firing rates [B, C, H, W], the mean over T, of the last convolution of the last three stages."""
    maps, hooks = [], []
    for stage in model.stages[-3:]:
        last = [layer for layer in stage if not isinstance(layer, Pool)][-1]
        hooks.append(last.register_forward_hook(lambda module, args, spikes: maps.append(spikes.mean(0, dtype=torch.float32))))
    try:
        return model(x), maps
    finally:
        for hook in hooks:
            hook.remove()


def distillation_loss(maps, wanted, betas):
    """NAD's loss: beta * mean squared difference of normalised attention maps, summed over stages."""
    return sum(beta * F.mse_loss(attention(a), attention(b)) for a, b, beta in zip(maps, wanted, betas))


def attention(f):
    """[B, C, H, W] -> [B, H * W]: the sum of squares over channels, scaled to length 1 per sample."""
    f = f.square().sum(1).flatten(1)
    return f / (f.norm(dim=1, keepdim=True) + 1e-6)


# ---------------------------------------------------------------------------------------------------------
# Detectors: not in the paper. They look at one input at a time and change nothing in the model.

@torch.no_grad()
def strip(model, x, clean, overlays=20, seed=0):
    """STRIP (Gao et al. 2019): mean entropy [B], in nats, of the predictions for x with clean images laid over it.

    x: images to judge [B, C, H, W], clean: images that the defender trusts [N, C, H, W], all in [0, 1]. A trigger that survives
    any overlay keeps the answer fixed: LOW entropy is suspicious. Overlaying is adding and clipping, as in the authors' code.
    """
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(len(x), device=x.device)
    with frozen(model):
        for _ in range(overlays):
            over = clean[torch.randint(len(clean), (len(x),), generator=generator)]
            p = model((x + over).clamp(0, 1)).softmax(1)
            total -= (p * p.clamp(min=1e-12).log()).sum(1)
    return total / overlays


@torch.no_grad()
def spike_deviation(model, x, clean):
    """|spikes of x - mean| / standard deviation [B], mean and deviation over clean images; HIGH is suspicious. Images in [0, 1].
    Sec. 3.2 says that triggers change the number of spikes; here that is turned against them."""
    with frozen(model):
        trusted, counts = count_spikes(model, clean), count_spikes(model, x)
    return (counts - trusted.mean()).abs() / trusted.std().clamp(min=1e-12)
