"""Four detectors of backdoors, none of them in the paper: two judge inputs, two the model.

They leave the model as it was, and refuse networks and images that they can say nothing about (check).
"""
import numpy as np
import torch
import torch.nn.functional as F

from kit.sources import need
from kit.training import generator
from lab.libraries import neurons_of, scaled
from lif import LIF, count_spikes
from models import frozen

SCAN = (0.5, 0.6, 0.7, 0.8, 0.9, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 1.9, 2.0)     # times the shipped threshold


def logits_of(model, x):
    """A network's answers to x [B, ...] as logits [B, K], differentiable; rates, for event frames, times 10."""
    answers = model(x)
    shape = list(answers.shape) if isinstance(answers, torch.Tensor) else type(answers).__name__
    need(isinstance(shape, list) and len(shape) == 2 and shape[0] == len(x) and shape[1] > 1,
         f"a network must answer {list(x.shape)} with logits [N, K], K at least 2, the mean over steps, not {shape}")
    need((answers < torch.inf).all(), "the network's answers are no numbers (NaN or infinite)")
    return 10 * answers if x.dim() == 5 else answers


@torch.no_grad()
def answers_of(model, x, batch=256):
    """Logits for x [N, ...], float32 [N, K], in eval mode."""
    with frozen(model), scaled(model):
        return torch.cat([logits_of(model, part) for part in x.split(batch)]).float()


def probabilities(model, x):
    return answers_of(model, x).softmax(1)


def check(model, x, *others):
    """The logits [N, K] for images x. ValueError where a NaN is in the network or in images, since a neuron may turn it
    into "no spike", and where the answers are no logits: softmax would be sure of no class."""
    for name, values in (*model.named_parameters(), *model.named_buffers(), *(("the images", x) for x in (x, *others))):
        need(values.isfinite().all(), f"NaN or infinite numbers in {name}: what the network says means nothing")
    answers = answers_of(model, x)
    need(x.dim() == 5 or answers.min() < 0 or answers.max() > 1 and (answers != answers.round()).any(), "the network "
         "answers with probabilities, rates or spike counts; it must answer with what lies before: mean potentials")
    return answers


@torch.no_grad()
def strip(model, x, clean, overlays=20, seed=0):
    """STRIP (Gao et al. 2019): mean entropy [B], in nats, of the predictions for x [B, C, H, W] with trusted images
    [N, C, H, W] added to it, not clipped. A trigger survives any overlay: LOW is suspicious.
    # differs from the source: 20 overlays, not 100, to fit a CPU; nats, not bits, which changes no ranking
    """
    check(model, clean, x)
    over = torch.randint(len(clean), (len(x), overlays), generator=generator(seed, "STRIP overlays"))
    p = torch.cat([probabilities(model, (images[:, None] + clean[rows]).flatten(0, 1))
                   for images, rows in zip(x.split(12), over.split(12))])
    return torch.special.entr(p).sum(1).view(len(x), overlays).mean(1)


def spike_deviation(model, x, clean):
    """|spikes of x - mean| / standard deviation [B], both over clean images; HIGH is suspicious. Images in [0, 1].
    Sec. 3.2 says that triggers change the number of spikes; here that is turned against them."""
    check(model, clean, x)
    need(any(isinstance(m, LIF) for m in model.modules()), "spikes are counted of the neurons of lif.py alone")
    trusted, counts = count_spikes(model, clean), count_spikes(model, x)
    return (counts - trusted.mean()).abs() / trusted.std().clamp(min=1e-12)


def threshold_scan(model, x):
    """What a model says of clean images x [N, C, H, W] in [0, 1] when its thresholds are scaled. Sec. 3.3 turned
    around: beyond the shipped setting lies one at which the model was TAUGHT to be sure of the target.

    A dict: probability [V, K]: means over the images, at SCAN times the shipped thresholds; score in [1 / K, 1] and
    accused: see scan_score (HIGH is suspicious). ValueError for a model without a neuron that is known.
    # prior art: IBD-PSC (Hou et al. 2024) scales BatchNorm, which amounts to thresholds, to judge inputs
    """
    found, unknown = neurons_of(model)
    need(found, f"no spiking neuron that is known in this model; unknown modules: {', '.join(unknown)}")
    check(model, x)
    probability, middle = [], sum(factor < 1 for factor in SCAN)
    for factor in SCAN:
        with scaled(model, factor):
            probability.append(probabilities(model, x).mean(0))
    probability = torch.stack(probability)
    score, accused = scan_score(probability[:middle], probability[middle:], window=4)
    return dict(probability=probability, score=score, accused=accused)


def margin_scan(model, x, factor=1.5, steps=15, starts=4, seed=0):
    """The largest margin (a class's logit less the largest other) that images in [0, 1] can have for each class when
    the thresholds are `factor` times the shipped ones, by gradient ascent from noise: MM-BD (Wang et al. 2024) turned
    towards the threshold. What natural images do not show of a malicious setting, the best image does. Images x
    [N, ...] give the shape alone.

    A dict: margins [K]; gap: the largest less their median, HIGH is suspicious; accused: whose it is. ValueError.
    """
    k = check(model, x).shape[1]
    classes, margins = torch.arange(k, device=x.device).repeat_interleave(starts), []
    noise = torch.rand(len(classes), *x.shape[1:], generator=generator(seed, "starts of the margin scan")).to(x)
    with frozen(model), scaled(model, factor):
        for images, wanted in zip(noise.split(100), classes.split(100)):
            margins.append(margin(logits_of(model, ascend(model, images, wanted, steps)), wanted))
    margins = torch.cat(margins).view(k, starts).amax(1)
    gap = np.max(margins.tolist()) - np.median(margins.tolist())
    return dict(margins=[round(m, 3) for m in margins.tolist()], gap=float(gap), accused=margins.argmax().item())


def ascend(model, x, classes, steps):
    """Images x [N, ...], moved `steps` times by a step of length 1 towards a larger margin of their class [N]."""
    for _ in range(steps):
        x = x.detach().requires_grad_()
        gradient = torch.autograd.grad(margin(logits_of(model, x), classes).sum(), x)[0]
        length = gradient.flatten(1).norm(dim=1).clamp(min=1e-12).view(-1, *[1] * (x.dim() - 1))
        x = (x + gradient / length).clamp(0, 1)
    return x.detach()


def margin(logits, classes):
    """By how much the logit of its class [N] exceeds the largest other one: [N, K] -> [N]."""
    own = F.one_hot(classes, logits.shape[1]).bool()
    return (logits[own] - logits.masked_fill(own, -torch.inf).amax(1)).float()


def scan_score(below, above, window):
    """(score, accused): the largest mean that one class has over `window` neighbouring rows of one side (or over the
    side, if it is shorter), and that class. below, above: mean probabilities [V, K] at ascending thresholds on either
    side of the shipped one."""
    means = [side.unfold(0, min(window, len(side)), 1).mean(2) for side in (below, above) if len(side)]
    best = torch.cat(means).amax(0)     # of each class
    return best.max().item(), best.argmax().item()
