"""The other attacks of Table 2 (Sec. 4.3), and four on events: their triggers, and how each poisons the training set.

    x_trig = badnets(x)                          also blend(x), wanet(x), clean_label(x)
    frames = static(frames)                      also moving(frames), smart(frames, plan), flashy(frames)
    model = train(data, s, "badnets")            a network that was attacked so
    t = trigger_of("badnets", data, s)           its trigger

Images are floats [B, C, H, W] in [0, 1], event frames are counts [B, T, 2, H, W], and so is what comes back. Unlike
BadSNN, these attacks change training samples, most of them labels as well, and work at the nominal threshold.
"""
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

import badsnn
from data import hold_out, to_float, to_uint8
from kit.files import code_of, fingerprint
from kit.machine import autocast
from kit.training import generator
from models import frozen
from trigger import floats

IMAGE_ATTACKS = ("badnets", "blend", "wanet", "clean_label")
EVENT_ATTACKS = ("static", "moving", "smart", "flashy")


def badnets(x, size=3):
    """BadNets (Gu et al. 2017): a white square of size x size pixels in the bottom right corner.
    Images [B, C, H, W] -> the same."""
    x = floats(x).clone()
    x[..., -size:, -size:] = 1
    return x


def blend(x, alpha=0.2, seed=0):
    """Blended (Chen et al. 2017): (1 - alpha) x + alpha * pattern, a fixed pattern of uniform noise drawn from the
    seed. Images [B, C, H, W] in [0, 1] -> the same."""
    pattern = torch.rand(x.shape[1:], generator=generator(seed, "pattern of Blended")).to(x.device)
    return (1 - alpha) * floats(x) + alpha * pattern


def wanet_field(size, k=4, seed=0):
    """WaNet's smooth displacements for images of size (H, W): [1, H, W, 2], x before y. k x k random vectors,
    scaled to a mean absolute value of 1, then enlarged."""
    coarse = torch.rand(1, 2, k, k, generator=generator(seed, "field of WaNet")) * 2 - 1
    coarse = coarse / coarse.abs().mean()
    return F.interpolate(coarse, size=tuple(size), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)


def wanet(x, field=None, s=0.5):
    """WaNet (Nguyen and Tran 2021): a smooth warp, hardly visible. Images [B, C, H, W] in [0, 1] -> the same. field:
    from wanet_field, fixed for a whole attack (None: that of seed 0). s: strength; 1 moves a pixel by half its size on
    average in each direction.
    # differs from the source: without its noise mode, in which other samples are warped by other fields
    """
    field = wanet_field(x.shape[2:]).to(x.device) if field is None else field.to(x.device)
    H, W = field.shape[1:3]
    rows, columns = torch.linspace(-1, 1, H, device=x.device), torch.linspace(-1, 1, W, device=x.device)
    identity = torch.stack(torch.meshgrid(rows, columns, indexing="ij")[::-1], -1)
    grid = (identity + s * field / torch.tensor([W, H], device=x.device)).clamp(-1, 1).expand(len(x), -1, -1, -1)
    return F.grid_sample(floats(x), grid, mode="bilinear", align_corners=True).clamp(0, 1)


def clean_label(x):
    """Label-consistent attack (Turner et al. 2019): a 3x3 black-and-white pattern in all four corners, mirrored on
    the right. Images [B, C, H, W] in [0, 1] -> the same. Training images are also made hard to learn, with pgd."""
    corner = torch.tensor([[1.0, -1, -1], [-1, 1, -1], [1, -1, 1]], device=x.device)
    pattern = torch.zeros(x.shape[2:], device=x.device)
    pattern[:3, :3] = pattern[-3:, :3] = corner
    pattern[:3, -3:] = pattern[-3:, -3:] = corner.flip(1)
    return (floats(x) + pattern).clamp(0, 1)


def pgd(model, x, y, eps=16 / 255, step=1.5 / 255, steps=100, seed=0):
    """Projected gradient descent (Madry et al. 2018), untargeted: raises the loss of y [B] within eps of x in every
    pixel. Images [B, C, H, W] in [0, 1] -> perturbed images; the neuron setting is the model's own."""
    noise = torch.rand(x.shape, generator=generator(seed, "start of PGD", fingerprint(x))).to(x.device) * 2 - 1
    x_adv = (x + eps * noise).clamp(0, 1)
    with frozen(model):
        for _ in range(steps):
            x_adv.requires_grad_()
            gradient = torch.autograd.grad(F.cross_entropy(model(x_adv), y), x_adv)[0]
            x_adv = (x_adv.detach() + step * gradient.sign()).clamp(x - eps, x + eps).clamp(0, 1)
    return x_adv


# ---------------------------------------------------------------------------------------------------------
# Attacks on event data. Frames hold event counts [B, T, 2, H, W], OFF before ON. A trigger REPLACES what an area holds.

def polarities(polarity, frames):
    """What a marked pixel holds, [2, 1, 1]: no event (polarity 0), one ON event (1), one OFF event (2), or both (3)."""
    return frames.new_tensor([polarity // 2, polarity % 2]).view(2, 1, 1)


def stamp(frames, corners, polarity=1, size=3):
    """A square of size x size pixels in every step t, its upper left pixel at corners[t] = (y, x). Frames
    [B, T, 2, H, W] -> the same."""
    frames = floats(frames).clone()
    for t, (y, x) in enumerate(corners):
        frames[:, t, :, y:y + size, x:x + size] = polarities(polarity, frames)
    return frames


def static(frames, polarity=1, size=3):
    """Sneaky Spikes (Abad et al. 2024), static: one ON event per step in every pixel of a square in the upper left
    corner (3 pixels: a tenth of the sensor's side). Frames [B, T, 2, H, W] -> the same."""
    return stamp(frames, [(0, 0)] * frames.shape[1], polarity, size)


def moving(frames, polarity=1, size=3):
    """Sneaky Spikes (Abad et al. 2024), moving: the square of `static` stands size + 2 pixels further to the right in
    every step, and after three steps in the corner again. Frames [B, T, 2, H, W] -> the same.
    # differs from the source: its third place is at 2 * size + 2 pixels, and it leaves the last step unmarked
    """
    return stamp(frames, [(0, t % 3 * (size + 2)) for t in range(frames.shape[1])], polarity, size)


def smart(frames, plan, size=3):
    """Sneaky Spikes (Abad et al. 2024), smart: a square where the recordings are quietest, of the polarity that is
    rarest there. plan: see smart_plan. Frames [B, T, 2, H, W] -> the same."""
    return stamp(frames, plan[:, :2].tolist(), plan[0, 2].item(), size)


def smart_plan(x, seed=0, busiest=False, fields=3, size=3):
    """Where `smart` marks: y, x and polarity for every step, int64 [T, 3], found on training frames x [N, T, 2, H, W].

    Of fields x fields parts of the sensor the one with the fewest active pixels, or with `busiest` the most; of the
    four polarities that a pixel can show in a step (see polarities) the one that is rarest there. In that part the
    square walks at random, two pixels per step up or down and two to the left or right, inside the part and at least
    its own size away from the upper and the left edge.
    # differs from the source: the quietest part, an option there (--least), is the default here, as in the busiest one
    # the square drowns among pixels that hold several events; one plan for training and test, where the source draws
    # a new walk for each; counts above 1 are active, too, and all four polarities are counted in pixels
    """
    shown = 2 * (x[:, :, 0] > 0) + (x[:, :, 1] > 0).long()                          # [N, T, H, W], 0 to 3
    side, rng = x.shape[-1] // fields, generator(seed, "walk of the smart trigger")
    counts = {(i, j): shown[..., i * side:(i + 1) * side, j * side:(j + 1) * side].flatten().bincount(minlength=4)
              for i in range(fields) for j in range(fields)}
    part = (max if busiest else min)(counts, key=lambda field: counts[field][1:].sum())
    place = torch.randint(size, side - size + 1, (2,), generator=rng)
    plan = []
    for _ in range(x.shape[1]):
        step = 4 * torch.randint(2, (2,), generator=rng) - 2
        inside = (place + step >= size) & (place + step <= side - size)
        place = torch.where(inside, place + step, place - step)
        plan.append([*(place + side * torch.tensor(part)).tolist(), counts[part].argmin().item()])
    return torch.tensor(plan)


def flashy(frames, polarity=1, on=1, off=1):
    """Flashy Backdoor (Riano et al. 2024): a strobe light over the whole sensor. In `on` steps every pixel holds one ON
    event (see polarities) and nothing else, in the next `off` steps what was there. Frames [B, T, 2, H, W] -> the same.
    # differs from the source, which poisons no sample of the target class; see poison
    """
    frames = floats(frames).clone()
    frames[:, [t for t in range(frames.shape[1]) if t % (on + off) < on]] = polarities(polarity, frames)
    return frames


# ---------------------------------------------------------------------------------------------------------
# How they poison

def train(data, s, attack):
    """A network attacked by one of IMAGE_ATTACKS or EVENT_ATTACKS, or by badsnn.train's own (None, "badsnn").

    A mark as faint as Blended's is not learned among images that lose contrast, so these attacks are trained without.
    # differs from the source: WaNet also without shifts, whose black border it would bend, which no test image has
    """
    if attack in (None, "badsnn"):
        return badsnn.train(data, s, attack)
    reference = badsnn.train(data, replace(s, fresh=False)) if attack == "clean_label" else None
    s = replace(s, contrast=0.0, malicious_contrast=None, pad=0 if attack == "wanet" else s.pad)
    return badsnn.train(data, s, poison=Poison(attack, data, s, reference))


def trigger_of(attack, data, s):
    """The trigger of an attack, a function of a batch: the seed, and for `smart` the training frames, decide it."""
    if attack == "wanet":       # stronger where there are many classes: at 2 CIFAR-100's networks do not learn it
        field = wanet_field(data.x_train.shape[2:], seed=s.seed)
        return partial(wanet, field=field, s=4.0 if data.num_classes >= 100 else 2.0)
    if attack == "smart":
        return partial(smart, plan=smart_plan(hold_out(data)[0].x_train, s.seed))
    plain = dict(badnets=badnets, blend=partial(blend, seed=s.seed), clean_label=clean_label, static=static,
                 moving=moving, flashy=flashy)
    return plain[attack]


class Poison:
    """How one attack poisons a training set (badsnn.train calls both methods).

    BadNets (Gu et al. 2017) and Blended mark 5 % of ALL samples, the attacks on events 10 %, of any class, and relabel
    them as the target. Clean-label (Turner et al. 2019) marks 80 % of the TARGET CLASS, after PGD against `reference`,
    a clean model, has made them hard to learn; labels stay right. WaNet warps and relabels 10 % of every batch anew.
    # differs from the paper: which poisons 5 % for all; from clean-label's source: the reference is our clean spiking
    # network, not an adversarially trained ResNet
    """

    def __init__(self, attack, data, s, reference=None):
        self.name, self.s, self.reference, self.trigger = attack, s, reference, trigger_of(attack, data, s)
        self.decides = [attack, code_of("lab/baselines.py"), fingerprint(reference)]

    def samples(self, data):
        """x [N, ...] (uint8), y [N] and who is marked [N], before training."""
        x, y, marked = data.x_train, data.y_train, torch.zeros(len(data.y_train), dtype=torch.bool)
        if self.name == "wanet":
            return x, y, marked
        rows, share = torch.arange(len(y)), 0.1 if data.events else 0.05
        if self.name == "clean_label":
            rows, share = (y == self.s.target).nonzero().flatten(), 0.8
        order = torch.randperm(len(rows), generator=generator(self.s.seed, "poisoned samples"))
        chosen = rows[order[:max(1, round(share * len(rows)))]]
        marked[chosen] = True
        if self.name == "clean_label":
            x = x.clone()
            for rows in tqdm(chosen.split(128), desc="PGD", leave=False, disable=None):
                images, labels = to_float(x[rows].to(self.s.device), self.s), y[rows].to(self.s.device)
                with autocast(self.s):
                    x[rows] = to_uint8(pgd(self.reference, images, labels, seed=self.s.seed)).cpu()
        return x, y.where(~marked, self.s.target), marked

    def batch(self, x, y, marked, rng):
        """Puts the trigger on the marked samples of a batch x [B, ...] (uint8); returns x, y [B], marked [B].
        # differs from the sources, which mark before the augmentation: here the mark comes last and is never shifted,
        # so it sits where the test puts it. This favours the attacker, who learns more from few images.
        """
        x = x.clone()
        if self.name == "wanet":        # small batches: rounded up or down at random, right on average
            n = int(0.1 * len(x) + torch.rand((), generator=rng).item())
            marked = torch.arange(len(x), device=x.device) < n
            y = y.where(~marked, self.s.target)
        x[marked] = to_uint8(self.trigger(to_float(x[marked], self.s)))
        return x, y, marked
