"""Defences against backdoors (Sec. 4.3, Table 2): five published ones, restoring the neurons, and three detectors.

    mine = defender_images(y_test, 10, seed)   which images a defender holds: so many of every class
    repaired = fine_tune(model, x, y)          x: a few clean images [N, C, H, W] in [0, 1], y: their labels [N]
    repaired = clp(model)                      needs no data; also anp(model, x, y), tsbd(...), nad(...)
    repaired = restore(model)                  v_thr and tau back to nominal: costs nothing
    pruned_channels(model, repaired)           how many channels clp or anp switched off

Each returns a NEW model and leaves its argument as it was. All work at the model's own neuron setting, that is, on
the network as the attacker ships it (see lif.neurons). None of them sees a trigger, and no setting was chosen on an
ASR. augment, where it is an argument, is a function from a batch of images to a randomly shifted or mirrored batch.

    entropy = strip(model, x, clean)           how unsure the model stays when images are added to x: low = suspicious
    score = spike_deviation(model, x, clean)   how far the number of spikes leaves what clean images cause
    result = threshold_scan(model, clean)      does another threshold make the MODEL sure of one class?
"""
import copy

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import runs
from libraries import get_threshold, neurons_of
from lif import LIF, PLIF, TAU_N, V_THR_N, count_spikes, neurons
from models import Pool, frozen


def defender_images(y, per_class, seed):
    """Sorted row numbers [M]: per_class samples of every class of the labels y [N], or all of a class with fewer."""
    chosen = []
    for label in y.unique().tolist():
        rows = (y == label).nonzero().flatten().cpu()
        order = torch.randperm(len(rows), generator=runs.generator(seed, "images of the defender", label))
        chosen.append(rows[order[:per_class]])
    return torch.cat(chosen).sort().values


def restore(model):
    """Sets every neuron back to the nominal setting v_thr = 1.0, tau = 0.5 (Sec. 4.1); a PLIF keeps the tau it learned,
    and all weights stay. The paper does not try this defence."""
    model = copy.deepcopy(model)
    for m in model.modules():
        if isinstance(m, LIF):
            m.v_thr = V_THR_N
            m.tau = m.tau if isinstance(m, PLIF) else TAU_N
    return model


# ---------------------------------------------------------------------------------------------------------
# Fine-tuning

def fine_tune(model, x, y, epochs=20, lr=0.01, batch=32, augment=None, seed=0):
    """Trains all weights (Sec. 4.3) on a few clean images x [N, C, H, W] in [0, 1] with labels y [N].

    SGD with momentum 0.9, weight decay 5e-4 and a learning rate on a cosine, as in BackdoorBench (Wu et al. 2022).
    # differs from the source: 20 epochs in batches of up to 32, not 100 in batches of up to 256: as many steps on the
    # few images that a defender holds here (80 and 100 for 100 images), and a fifth of the time
    """
    student = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(student.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    generator = runs.generator(seed, "fine-tuning shuffle")
    for _ in range(epochs):
        for rows in shuffled(len(x), batch, generator):
            step(optimizer, F.cross_entropy(logits_of(student, _augmented(x[rows], augment)), y[rows]))
        schedule.step()
    return student.eval()


def logits_of(model, x):
    """A network's answers to x as logits [B, K]. Event networks answer with firing rates, the mean of ten voters per
    class; ten times that, the number of votes per step, makes a full vote sure under softmax, and silence unsure.
    Raises ValueError where the answers are anything else."""
    answers = model(x)
    if not isinstance(answers, torch.Tensor) or answers.dim() != 2 or len(answers) != len(x):
        raise ValueError(f"a network must answer samples {list(x.shape)} with logits [N, K]")
    return answers * (10 if x.dim() == 5 else 1)


def shuffled(n, batch, generator):
    """One epoch: the row numbers 0 to n - 1 in random order, cut into batches of nearly equal size, at most `batch`."""
    return torch.randperm(n, generator=generator).tensor_split(-(-n // batch))


def step(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def _augmented(x, augment):
    return x if augment is None else augment(x)


# ---------------------------------------------------------------------------------------------------------
# Pruning

def clp(model, u=3.0):
    """Channel Lipschitz pruning (Zheng et al. 2022), without data: a backdoor's channels react more strongly than most.

    In every layer, the channels whose Lipschitz constants [C] exceed mean + u * standard deviation are switched off
    (u = 3: Sec. 4.3). But of n numbers none lies more than (n - 1) / sqrt(n) standard deviations above their mean: a
    layer of up to 10 channels never loses one, a layer of 16 at most one. In narrow networks such as ours CLP does
    little, whatever the attack; pruned_channels says how much it did.
    """
    model = copy.deepcopy(model)
    for conv, bn in conv_bn_pairs(model):
        constant = channel_lipschitz(conv, bn)
        switch_off(bn, constant > constant.mean() + u * constant.std())
    return model


def channel_lipschitz(conv, bn):
    """CLP's bound per output channel [C]: largest singular value of the kernel [C_in, k * k], times BatchNorm's factor.
    # differs from the source: the factor contains BatchNorm's eps, as the layer does
    """
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
def switch_off(bn, channels):
    """Silences channels (bool [C]): weight 0, and bias 0 too, else one with bias >= v_thr would always spike."""
    bn.weight[channels] = 0
    bn.bias[channels] = 0


def pruned_channels(before, after):
    """How many BatchNorm channels a defence switched off: their weight is 0 in `after` and was not in `before`."""
    norms = dict(_batch_norms(after))
    return sum(int(((norms[name].weight == 0) & (bn.weight != 0)).sum()) for name, bn in _batch_norms(before))


def anp(model, x, y, eps=0.4, alpha=0.5, lr=0.2, iterations=100, batch=32, keep=0.9, augment=None, seed=0):
    """Adversarial neuron pruning (Wu and Wang 2021): channels that a small change turns into the backdoor are pruned.

    Every BatchNorm channel gets a mask m, learned in anp_masks; those that end at or below a threshold are switched off
    in the original network. The threshold rises from 0 to 0.9 in steps of 0.05 as long as the accuracy on the
    defender's own images stays at least `keep` times what it was (as in BackdoorBench, Wu et al. 2022, which takes,
    of all thresholds that do, the one with the lowest ASR: no defender knows that). x: images [N, C, H, W] in [0, 1],
    y: labels [N]. eps, alpha: Sec. 4.3 (the source: alpha 0.2).
    # differs from the source: 100 iterations of 32 images, not 2000 of 128, to fit a CPU; masks stay nearer to 1 then,
    # which the rule makes up for; the bias is switched off as well, see switch_off
    """
    masks = anp_masks(model, x, y, eps, alpha, lr, iterations, batch, augment, seed)
    pruned, least = copy.deepcopy(model), keep * accuracy(model, x, y)
    for threshold in range(0, 91, 5):
        candidate = copy.deepcopy(model)
        for name, bn in _batch_norms(candidate):
            switch_off(bn, masks[name] <= threshold / 100)
        if accuracy(candidate, x, y) < least:
            break
        pruned = candidate
    return pruned


def accuracy(model, x, y):
    """Share of the images x [N, ...] that the model gives the labels y [N], in eval mode."""
    return (probabilities(model, x).argmax(1) == y).float().mean().item()


def anp_masks(model, x, y, eps, alpha, lr, iterations, batch, augment=None, seed=0):
    """ANP's masks in [0, 1], a dict from the names of BatchNorm layers to [C].

    min over m of alpha * loss(m) + (1 - alpha) * max over noise of loss(m + noise): the network with masked channels
    must stay good even when its weights and biases are disturbed by up to 2 eps. BatchNorm uses the batch's statistics.
    """
    net = copy.deepcopy(model).train().requires_grad_(False)
    norms = dict(_batch_norms(net))
    masks = {name: torch.ones_like(bn.weight, requires_grad=True) for name, bn in norms.items()}
    optimizer = torch.optim.SGD(masks.values(), lr=lr, momentum=0.9)
    draws, noises = runs.generator(seed, "ANP batches"), runs.generator(seed, "ANP noise")

    def loss_of(images, labels, noise):
        weights = {f"{name}.weight": bn.weight * (masks[name] + noise[name][0]) for name, bn in norms.items()}
        biases = {f"{name}.bias": bn.bias * (1 + noise[name][1]) for name, bn in norms.items()}
        return F.cross_entropy(logits_of(lambda z: functional_call(net, weights | biases, (z,)), images), labels)

    none = {name: torch.zeros(2, len(bn.weight), device=bn.weight.device) for name, bn in norms.items()}
    for _ in range(iterations):
        rows = torch.randint(len(x), (batch,), generator=draws)
        images, labels = _augmented(x[rows], augment), y[rows]
        noise = worst_noise(lambda noise: loss_of(images, labels, noise), none, eps, noises)
        step(optimizer, alpha * loss_of(images, labels, none) + (1 - alpha) * loss_of(images, labels, noise))
        with torch.no_grad():
            for mask in masks.values():
                mask.clamp_(0, 1)
    return {name: mask.detach() for name, mask in masks.items()}


def worst_noise(loss_of, like, eps, generator):
    """Noise shaped as `like`: a random start in [-eps, eps], then a step of eps up the sign of the loss's gradient."""
    noise = {name: (eps * (2 * torch.rand(z.shape, generator=generator) - 1)).to(z.device).requires_grad_()
             for name, z in like.items()}
    gradients = torch.autograd.grad(loss_of(noise), list(noise.values()))
    return {name: (z + eps * g.sign()).detach() for (name, z), g in zip(noise.items(), gradients)}


def _batch_norms(model):
    return [(name, m) for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]


# ---------------------------------------------------------------------------------------------------------
# TSBD

def tsbd(model, x, y, channel_share=0.15, weight_share=0.7, unlearn_lr=1e-3, max_unlearn=100, epochs=21, lr=0.01,
         batch=32, augment=None, seed=0):
    """Two-stage backdoor defence (Lin et al. 2024): weights that move when clean data are UNLEARNED are the backdoor's.

    1. unlearn  2. find the neurons (convolution channels) that changed most  3. set their most changed weights to zero
    4. repair with fine-tuning that also punishes steep loss. x: images [N, C, H, W] in [0, 1], y: labels [N].
    # differs from the source: unlearning at learning rate 1e-3, not 1e-4: an eighth of the epochs, and 93 % of the same
    # neurons on digits (1e-2: 75 %), and at most 100, not 1000; batches of up to 32, not 256, shuffled
    """
    change = weight_change(model, unlearn(model, x, y, unlearn_lr, max_unlearn, batch, augment, seed))
    student = zero_reinit(model, change, channel_share, weight_share).train()
    optimizer = torch.optim.SGD(student.parameters(), lr=lr, momentum=0.9)
    generator = runs.generator(seed, "TSBD shuffle")
    for _ in range(epochs):
        for rows in shuffled(len(x), batch, generator):
            images = _augmented(x[rows], augment)
            gradient = activeness_aware_gradient(student, lambda: F.cross_entropy(student(images), y[rows]))
            for p, g in zip(student.parameters(), gradient):
                p.grad = g
            optimizer.step()
    return student.eval()


def unlearn(model, x, y, lr, max_epochs, batch=32, augment=None, seed=0):
    """Step 1: gradient ASCENT on the loss of clean images until the accuracy, measured after every epoch on augmented
    images, is down to 10 % (or to chance, 1 / K, where that is more). Returns a new model."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    generator = runs.generator(seed, "unlearning shuffle")
    for _ in range(max_epochs):
        model.train()
        for rows in shuffled(len(x), batch, generator):
            step(optimizer, -F.cross_entropy(model(_augmented(x[rows], augment)), y[rows]))
        p = probabilities(model, _augmented(x, augment))
        if (p.argmax(1) == y).float().mean() <= max(0.10, 1 / p.shape[1]):
            break
    return model.eval()


def weight_change(model, other):
    """Step 2: |difference| of every convolution's weights between two models, without shortcuts: {name: [C, ...]}."""
    after = dict(other.named_modules())
    return {name: (m.weight - after[name].weight).detach().abs() for name, m in model.named_modules()
            if isinstance(m, nn.Conv2d) and "shortcut" not in name}


@torch.no_grad()
def zero_reinit(model, change, channel_share, weight_share):
    """Step 3: of the share of channels with the largest summed change, sets the share of weights that changed most to
    zero; both shares over all layers together. Returns a new model."""
    model = copy.deepcopy(model)
    modules = dict(model.named_modules())
    per_channel = torch.cat([c.flatten(1).sum(1) for c in change.values()])
    least = per_channel.topk(max(1, int(channel_share * len(per_channel)))).values[-1]
    chosen = {name: c.flatten(1).sum(1) >= least for name, c in change.items()}
    pool = torch.cat([c[chosen[name]].flatten() for name, c in change.items()])
    least = pool.topk(max(1, int(weight_share * len(pool)))).values[-1]
    for name, c in change.items():
        mask = (c >= least) & chosen[name].view(-1, *[1] * (c.dim() - 1))
        modules[name].weight[mask] = 0
    return model


def activeness_aware_gradient(model, loss_of, r=0.05, a=0.7):
    """Step 4: (1 - a) g1 + a g2, where g2 is the gradient a distance r further up the slope, per parameter tensor: it
    favours flat minima, where no neuron is very active. Parameters are left as they were.
    # differs from the source: BatchNorm's statistics are those of the first of the two passes; it makes a third
    """
    parameters = list(model.parameters())
    g1 = torch.autograd.grad(loss_of(), parameters)
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    ahead = [r * g / g.norm().clamp(min=1e-12) for g in g1]
    with torch.no_grad():
        for p, move in zip(parameters, ahead):
            p += move
    g2 = torch.autograd.grad(loss_of(), parameters)
    with torch.no_grad():
        for p, move in zip(parameters, ahead):
            p -= move
        for name, b in model.named_buffers():
            b.copy_(buffers[name])
    return [(1 - a) * first + a * second for first, second in zip(g1, g2)]


# ---------------------------------------------------------------------------------------------------------
# NAD

def nad(model, x, y, betas=(500, 1000, 1000), teacher_epochs=10, epochs=20, lr=0.01, batch=64, augment=None, seed=0):
    """Neural attention distillation (Li et al. 2021): a fine-tuned copy teaches the model where to look.

    The teacher is the model fine-tuned on the clean images; the student, the model again, learns the labels and the
    teacher's attention maps in three stages, weighted by betas. x: images [N, C, H, W] in [0, 1], y: labels [N].
    # differs from the source: no Cutout (2x2 pixels there); the maps are of firing rates; the learning rate is
    # BackdoorBench's 0.01 (Wu et al. 2022), as the source's 0.1 leaves a clean CIFAR-10 network with a CA of 19 %
    """
    teacher = distill(model, None, x, y, betas, teacher_epochs, lr, batch, augment, seed)
    return distill(model, teacher, x, y, betas, epochs, lr, batch, augment, seed)


def distill(model, teacher, x, y, betas, epochs, lr, batch, augment, seed):
    """A copy of the model, trained as NAD trains: SGD with Nesterov momentum, weight decay 1e-4, and after two epochs a
    tenth of the learning rate. Without a teacher this is plain fine-tuning, from which the teacher itself comes."""
    student = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(student.parameters(), lr=lr, momentum=0.9, weight_decay=1e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2])
    generator = runs.generator(seed, "NAD shuffle", "teacher" if teacher is None else "student")
    for _ in range(epochs):
        for rows in shuffled(len(x), batch, generator):
            images = _augmented(x[rows], augment)
            logits, maps = with_maps(student, images)
            loss = F.cross_entropy(logits, y[rows])
            if teacher is not None:
                with frozen(teacher), torch.no_grad():
                    wanted = with_maps(teacher, images)[1]
                loss = loss + distillation_loss(maps, wanted, betas)
            step(optimizer, loss)
        schedule.step()
    return student.eval()


def with_maps(model, x):
    """Logits [B, K], and the firing rates (mean over T) [B, C, H, W] of the last neurons of the last three stages."""
    maps, hooks = [], []
    for stage in model.stages[-3:]:
        last = [layer for layer in stage if not isinstance(layer, Pool)][-1]
        hooks.append(last.register_forward_hook(
            lambda module, args, spikes: maps.append(spikes.mean(0, dtype=torch.float32))))
    try:
        return model(x), maps
    finally:
        for hook in hooks:
            hook.remove()


def distillation_loss(maps, wanted, betas, sides=(32, 16, 8)):
    """NAD's loss: beta * mean squared difference of normalised attention maps, summed over stages.
    # differs from the source where maps are smaller than its sides: the squares are divided by its number of pixels,
    # or beta would weigh more, for VGG-16's maps of 2x2 sixteen times as much, and the loss diverges
    """
    return sum(beta * F.mse_loss(attention(a), attention(b), reduction="sum") / (len(a) * side ** 2)
               for a, b, beta, side in zip(maps, wanted, betas, sides))


def attention(f):
    """[B, C, H, W] -> [B, H * W]: the sum of squares over channels, scaled to length 1 per sample."""
    f = f.square().sum(1).flatten(1)
    return f / (f.norm(dim=1, keepdim=True) + 1e-6)


# ---------------------------------------------------------------------------------------------------------
# Detectors: not in the paper. They leave the model as it was. Two judge inputs, the third judges the model.

@torch.no_grad()
def strip(model, x, clean, overlays=20, seed=0):
    """STRIP (Gao et al. 2019): mean entropy [B], in nats, of the predictions for x with clean images added to it.

    x: images to judge [B, C, H, W], clean: images that the defender trusts [N, C, H, W], all in [0, 1]. A trigger that
    survives any overlay keeps the answer fixed: LOW entropy is suspicious. The sum is not clipped, so it leaves [0, 1].
    # differs from the source: 20 overlays, not 100, to fit a CPU; nats, not bits, which changes no ranking
    """
    over = torch.randint(len(clean), (len(x), overlays), generator=runs.generator(seed, "STRIP overlays"))
    many = max(1, 256 // overlays)          # images per pass, each with all its overlays
    entropies = [entropy(probabilities(model, (images[:, None] + clean[rows]).flatten(0, 1)))
                 for images, rows in zip(x.split(many), over.split(many))]
    return torch.cat(entropies).view(len(x), overlays).mean(1)


@torch.no_grad()
def probabilities(model, x, batch=256):
    """Softmax of the predictions (see logits_of) for x [N, ...]: float32 [N, K], in batches, in eval mode."""
    with frozen(model):
        return torch.cat([logits_of(model, part).float().softmax(1) for part in x.split(batch)])


def entropy(p):
    """Of probabilities [..., K]: [...], in nats, from 0 (sure) to log K (no idea)."""
    return torch.special.entr(p).sum(-1)


@torch.no_grad()
def spike_deviation(model, x, clean):
    """|spikes of x - mean| / standard deviation [B], mean and deviation over clean images; HIGH is suspicious. Images
    in [0, 1]. Sec. 3.2 says that triggers change the number of spikes; here that is turned against them."""
    with frozen(model):
        trusted, counts = count_spikes(model, clean), count_spikes(model, x)
    return (counts - trusted.mean()).abs() / trusted.std().clamp(min=1e-12)


SCAN = (0.5, 0.6, 0.7, 0.8, 0.9, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 1.9, 2.0)     # times the shipped threshold


def threshold_scan(model, x, v_thr=None, window=4):
    """What a model says of clean images x [N, C, H, W] in [0, 1] when its thresholds are changed. Source: ours; it
    turns Sec. 3.3 of the paper around: what the attacker deploys lies between the nominal and the malicious setting,
    and beyond it lies one at which the model was TAUGHT to be sure of the target. A clean model is unsure there.

    v_thr: thresholds [V] (None: SCAN times the shipped one); neurons whose thresholds differ are scaled alike. A dict:
    share and probability [V, K]: how often each class is predicted, and its mean softmax probability; entropy [V]: of a
    prediction, in nats, and margin [V]: between the two largest probabilities, means over x; score in [1 / K, 1]: the
    largest mean probability that one class has over `window` neighbouring thresholds above, or below, the shipped one
    (HIGH is suspicious); accused: that class; late: the mean probability of the largest class at 1.6 times the shipped
    threshold and above, where a clean model has little left to say. No training, no trigger.

    The model gives logits [B, K]; the firing rates of event networks are scaled first (see logits_of), or they would
    never look sure. Raises ValueError for a model without a neuron that is known. What the scan catches, and what
    evades it: results/README.md.
    """
    found, unknown = neurons_of(model)
    if not found:
        raise ValueError(f"no spiking neuron that is known in this model; unknown modules: {', '.join(unknown)}")
    shipped = get_threshold(found[0])
    shipped = float(shipped.mean() if isinstance(shipped, torch.Tensor) else shipped)
    v_thr = [round(factor * shipped, 4) for factor in SCAN] if v_thr is None else [float(v) for v in v_thr]
    answers = []
    for threshold in v_thr:
        with neurons(model, scale=threshold / shipped):
            answers.append(probabilities(model, x))
    p = torch.stack(answers)                                            # [V, N, K]
    probability, two = p.mean(1), p.topk(2).values
    score, accused = scan_score(*(probability[[i for i, v in enumerate(v_thr) if side(v)]]
                                  for side in (shipped.__gt__, shipped.__lt__)), window)
    late = probability[[i for i, v in enumerate(v_thr) if v >= 1.599 * shipped]].amax(1).mean()
    return dict(v_thr=v_thr, share=F.one_hot(p.argmax(2), p.shape[2]).float().mean(1), probability=probability,
                entropy=entropy(p).mean(1), margin=(two[..., 0] - two[..., 1]).mean(1), score=score,
                accused=accused, late=late.item())


def scan_score(below, above, window):
    """The scan's verdict: (score, accused). below, above: mean probabilities [V, K] of the classes at thresholds on
    either side of the shipped one, in ascending order. The largest mean that one class has over `window` neighbouring
    rows of one side (or over the side, if it is shorter), and that class."""
    means = [side[i:i + window].mean(0) for side in (below, above) for i in range(max(1, len(side) - window + 1))
             if len(side)]
    best = max(means, key=torch.max)
    return best.max().item(), best.argmax().item()
