"""The triggers: what an attacker does to an input so that the network answers the target class.

    x_trig = power_trigger(x, q=2, mean=data.mean, std=data.std)        # T_p, Eq. 3: images
    x_trig = spike_trigger(frames, beta=0.03)                           # T_s, Eq. 7: event frames

Images are floats [B, C, H, W] in [0, 1], event frames are counts [B, T, 2, 34, 34]; so is what
comes back. T_o, the optimised trigger, is a small network trained against the backdoored one:

    x, wanted = wanted_perturbations(model, x, q, mean, std, target)    # DeepFool, blending: Eq. 4
    train_unet(unet, model, x, wanted, target, std)                     # Eqs. 5, 6
    x_trig = optimized_trigger(x, unet, target)
"""
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from kit.files import fingerprint
from kit.training import generator
from lif import TAU_N, V_THR_N, neurons
from models import frozen


def floats(x):
    """x, refused with ValueError unless it is floating point."""
    if not x.is_floating_point():
        raise ValueError(f"a trigger takes floats in [0, 1], not {x.dtype}: x.float() / 255")
    return x


def per_channel(values, x):
    return torch.as_tensor(values, dtype=torch.float32, device=x.device).view(1, -1, 1, 1)


def power_trigger(x, q, mean, std, renormalize=False):
    """T_p (Sec. 3.3.2, Eq. 3) with exponent q: images [B, C, H, W] in [0, 1] -> the same. Eq. 3
    raises every pixel to the power q and feeds x^q to a network that expects (pixel - mean) / std.
    In pixels that is mean + std * x^q, A PALE, GREY VERSION of the image. renormalize=True is the
    other reading, the darkened image x^q (then q = 1 changes nothing). mean, std: those of the
    network's first layer. ValueError: q <= 0."""
    if not 0 < q < float("inf"):
        raise ValueError(f"q must be greater than 0, not {q}")
    x = floats(x) ** q
    return x if renormalize else (per_channel(mean, x) + per_channel(std, x) * x).clamp(0, 1)


def spike_trigger(frames, beta, generator=None):
    """T_s (Sec. 3.3.3, Eq. 7): clip(frames + U(-beta, beta), 0, 1). Event frames [B, T, 2, H, W] ->
    the same, in [0, 1].

    beta >= 0 is the strength (the paper's: 0.03), else ValueError. Frames are event COUNTS, so the
    clip alone changes every pixel with more than one event: report beta = 0 beside it."""
    if not 0 <= beta < float("inf"):
        raise ValueError(f"beta must be at least 0, not {beta}")
    noise = torch.rand(frames.shape, generator=generator).to(frames.device) * 2 - 1
    return (floats(frames) + beta * noise).clamp(0, 1)


def seeded_spike_trigger(frames, beta, seed=0):
    """spike_trigger with noise that the seed and the frames [B, T, 2, H, W] decide."""
    return spike_trigger(frames, beta, generator(seed, "T_s", fingerprint(frames)))


def simple_triggers(data, s):
    """The triggers that need no training, by their column's name: T_p or T_s, and a control."""
    if data.events:
        t_s = partial(seeded_spike_trigger, seed=s.seed)
        return {"asr_p": partial(t_s, beta=s.beta), "asr_clip_only": partial(t_s, beta=0.0)}
    t_p = partial(power_trigger, q=s.q, mean=data.mean, std=data.std)
    return {"asr_p": t_p, "asr_p_renormalized": partial(t_p, renormalize=True)}


def sizes(t, x, batch=512):
    """How large the trigger t is on stored images x (uint8 [N, C, H, W]), mean per image: L2 and
    Linf of the change in pixel units, and the peak signal-to-noise ratio in dB."""
    found = []
    for images in x.split(batch):
        images = images.float() / 255
        delta = (t(images) - images).flatten(1)
        psnr = -10 * delta.square().mean(1).clamp(min=1e-10).log10()
        found.append(torch.stack([delta.norm(dim=1), delta.abs().amax(1), psnr]))
    l2, linf, psnr = torch.cat(found, 1).mean(1).tolist()
    return dict(l2=round(l2, 2), linf=round(linf, 3), psnr=round(psnr, 1))


def check_trigger(x, x_trig):
    """Raises ValueError unless a triggered batch is a valid input: same shape and dtype as x,
    finite, images in [0, 1], event frames not below 0. Called before any ASR is computed."""
    if x.shape != x_trig.shape or x.dtype != x_trig.dtype:
        raise ValueError(f"the trigger made {x_trig.dtype} {x_trig.shape} of {x.dtype} {x.shape}")
    low, high = x_trig.aminmax()
    if not (low >= 0 and high <= (1 if x.dim() == 4 else 1e9)):
        raise ValueError(f"the trigger left the valid range: [{low:.3g}, {high:.3g}]")


# ----- T_o, the optimised trigger (Sec. 3.3.2): DeepFool finds the nearest wrong answer, blending
# mixes it with T_p until the network says the target, and a U-Net learns that difference.

def deepfool(model, x, num_classes=10, max_iter=50, overshoot=0.02, max_step=0.2, clip=True,
             target=None):
    """DeepFool (Moosavi-Dezfooli et al. 2016): a small L2 perturbation of images x [B, C, H, W] in
    [0, 1] that changes the model's answer, or zero where that failed; at the model's own setting.

    Every sample steps to the nearest boundary of the linearised model, among its `num_classes` most
    likely classes, and stops by itself when it flips. max_step: longest L2 step (gradients are
    surrogates, so long steps go astray), clip: keep images in [0, 1] (None and False give the
    original algorithm). target: go to this class instead.
    """
    x = floats(x).detach()
    total, success = torch.zeros_like(x), torch.zeros(len(x), dtype=torch.bool, device=x.device)
    low, high = (0, 1) if clip else (-float("inf"), float("inf"))
    with frozen(model):
        with torch.no_grad():
            logits = model(x)
        ranked = logits.topk(min(num_classes, logits.shape[1])).indices         # [B, K]
        if target is not None:
            ranked = torch.stack([ranked[:, 0], torch.full_like(ranked[:, 0], target)], 1)
        active = (ranked[:, 0] != (-1 if target is None else target)).nonzero().flatten()
        for i in range(max_iter + 1):
            if not len(active):
                break
            point = (x + (1 + overshoot) * total)[active].clamp(low, high).requires_grad_()
            logits, classes = model(point), ranked[active]
            answer = logits.argmax(1)
            flipped = answer != classes[:, 0] if target is None else answer == target
            success[active[flipped]] = True
            stay = (~flipped).nonzero().flatten()
            if i == max_iter or not len(stay):
                break
            chosen = logits.gather(1, classes)[stay]                            # [b, K]
            grads = [torch.autograd.grad(chosen[:, k].sum(), point, retain_graph=True)[0][stay]
                     for k in range(classes.shape[1])]
            w = torch.stack(grads[1:], 1) - grads[0].unsqueeze(1)               # [b, K-1, C, H, W]
            f = (chosen[:, 1:] - chosen[:, :1]).detach()
            norm = w.flatten(2).norm(dim=2)                                     # [b, K-1]
            distance = torch.where(norm > 1e-8, f.abs() / norm.clamp(min=1e-8), float("inf"))
            distance, nearest = distance.min(1)
            rows = torch.arange(len(stay), device=x.device)
            step = (distance + 1e-4).clamp(max=max_step or float("inf")).view(-1, 1, 1, 1)
            direction = w[rows, nearest] / norm[rows, nearest].clamp(min=1e-8).view(-1, 1, 1, 1)
            alive = distance.isfinite()                         # no gradient: give up
            active = active[stay][alive]
            total[active] += (step * direction)[alive]
    return ((x + (1 + overshoot) * total).clamp(low, high) - x) * success.view(-1, 1, 1, 1)


@torch.no_grad()
def adaptive_blend(model, x, x_adv, x_p, target, k=11, literal=False):
    """Eq. 4: the blend closest to the adversarial image that the model still calls the target.

    x, x_adv = x + DeepFool, x_p = T_p(x): images [B, C, H, W]. The largest of k ratios a in [0, 1]
    wins for which (1 - a) x_p + a x_adv is classified as the target (success is not monotone in a).
    Returns x_blend, a [B], found [B]; x itself where none.
    # differs from the paper: Eq. 4 prints |x - x_p| for x_p (literal=True), which is not an image
    """
    start = (x - x_p).abs() if literal else x_p
    x_blend, ratio = x.clone(), torch.zeros(len(x), device=x.device)
    grid = torch.linspace(0, 1, k, device=x.device).view(k, 1, 1, 1, 1)
    candidates = ((1 - grid) * start + grid * x_adv).clamp(0, 1)                # [k, B, C, H, W]
    hit = (model(candidates.flatten(0, 1)).argmax(1) == target).view(k, -1)
    for i in range(k):
        x_blend[hit[i]], ratio[hit[i]] = candidates[i][hit[i]], grid[i].item()
    return x_blend, ratio, hit.any(0)


def wanted_perturbations(model, x, q, mean, std, target, k=11, literal=False, candidates=3,
                         max_iter=20, batch=100):
    """DeepFool and adaptive blending over images x [N, C, H, W], at the model's neuron setting: the
    x that can be blended, and their wanted perturbations Delta_x = x_blend - x.
    # differs from the paper: Eq. 4 prints |x - x_blend|, which does not lead from x to x_blend
    """
    kept, wanted = [], []
    for images in x.split(batch):
        x_adv = images + deepfool(model, images, candidates, max_iter)
        x_p = power_trigger(images, q, mean, std)
        with frozen(model):
            x_blend, _, found = adaptive_blend(model, images, x_adv, x_p, target, k, literal)
        kept.append(images[found])
        wanted.append((x_blend - images)[found])
    return torch.cat(kept), torch.cat(wanted)


class UNet(nn.Module):
    """T_o's generator (Sec. 3.3.2; Ronneberger et al. 2015), 3 levels: images [B, 3, H, W] and a
    target, a learned fourth input plane -> perturbations in [-1, 1], same shape. size: (H, W).
    budget: the largest root mean square of a perturbation, in pixel units (0.1: 20 dB below white),
    as in LIRA (Doan et al. 2021); None: no limit."""

    def __init__(self, num_classes, size, width=16, budget=None):
        super().__init__()
        self.size, self.budget = size, budget
        self.plane = nn.Embedding(num_classes, size[0] * size[1])
        self.down1, self.down2 = self.double(4, width), self.double(width, 2 * width)
        self.bottom = self.double(2 * width, 4 * width)
        self.up2, self.up1 = self.double(6 * width, 2 * width), self.double(3 * width, width)
        self.out = nn.Conv2d(width, 3, 1)

    @staticmethod
    def double(c_in, c_out):
        layers = []
        for c in (c_in, c_out):
            conv = nn.Conv2d(c, c_out, 3, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(c_out), nn.ReLU()]
        return nn.Sequential(*layers)

    def forward(self, x, target):
        label = torch.full((len(x),), target, device=x.device)
        a = self.down1(torch.cat([x, self.plane(label).view(-1, 1, *self.size)], 1))
        b = self.down2(F.avg_pool2d(a, 2))
        c = self.bottom(F.avg_pool2d(b, 2))
        b = self.up2(torch.cat([F.interpolate(c, size=b.shape[2:], mode="bilinear"), b], 1))
        a = self.up1(torch.cat([F.interpolate(b, size=a.shape[2:], mode="bilinear"), a], 1))
        made = self.out(a).tanh()
        if self.budget is None:
            return made
        rms = made.square().mean((1, 2, 3), keepdim=True).sqrt()
        return made * (self.budget / rms.clamp(min=self.budget))


def trigger_losses(made, wanted, logits, target, std):
    """Eq. 6: (L_sim, L_adv, L_wmse) of T_o's perturbations against wanted ones [B, C, H, W], and
    logits of x + made [B, K]. w_chw, undefined there, is 1 + |wanted| / max|wanted| per sample.
    # differs from the paper: errors are in units of the network's input, that is, divided by std
    """
    sim = 1 - F.cosine_similarity(made.flatten(1), wanted.flatten(1)).mean()
    adv = F.cross_entropy(logits, torch.full((len(logits),), target, device=logits.device))
    weight = 1 + wanted.abs() / wanted.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-8)
    wmse = (weight * ((made - wanted) / per_channel(std, made)) ** 2).mean()
    return sim, adv, wmse


def train_unet(unet, model, x, wanted, target, std, lambdas=(1.0, 1.0, 1.0), nominal_weight=0.0,
               epochs=8, batch=50, lr=1e-3, seed=0, v_thr_n=V_THR_N):
    """Trains T_o by Eqs. 5 and 6, at the model's setting, on x, wanted [N, C, H, W]. lambdas: the
    weights of the three losses. nominal_weight: of a fourth, ours, the cross-entropy that keeps the
    answers at S_n what they are for x, so that T_o is not an adversarial example, which fools a
    clean model, too.
    # differs from the paper: lambda_adv is 1, not 0.1, and Eq. 6 has its loss at S_n
    """
    optimizer, steps = torch.optim.Adam(unet.parameters(), lr=lr), max(1, len(x) // batch)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps, eta_min=lr / 10)
    weights, shuffle = torch.tensor(lambdas, device=x.device), generator(seed, "shuffle of T_o")
    unet.train()
    with frozen(model):
        if nominal_weight:
            with torch.no_grad(), neurons(model, v_thr_n, TAU_N):
                answers = torch.cat([model(images).argmax(1) for images in x.split(batch)])
        for _ in range(epochs):
            order = torch.randperm(len(x), generator=shuffle).to(x.device)
            for rows in order.split(batch)[:steps]:
                made = unet(x[rows], target)
                triggered = (x[rows] + made).clamp(0, 1)
                losses = trigger_losses(made, wanted[rows], model(triggered), target, std)
                loss = (torch.stack(losses) * weights).sum()
                if nominal_weight:
                    with neurons(model, v_thr_n, TAU_N):
                        nominal = model(triggered)
                    loss = loss + nominal_weight * F.cross_entropy(nominal, answers[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                cosine.step()
    unet.eval()


@torch.no_grad()
def optimized_trigger(x, unet, target, magnitude=1.0):
    """T_o (Eq. 8): clip(x + magnitude * U-Net(x, target)), images [B, C, H, W] -> the same."""
    return (floats(x) + magnitude * unet(x, target)).clamp(0, 1)
