"""Detectors of backdoors: two judge inputs, the third judges the model. (For the time being: moved from defenses.py.)"""
import torch
import torch.nn.functional as F

from kit.training import generator
from lab.libraries import get_threshold, neurons_of, put_back, set_threshold
from lif import count_spikes
from models import frozen


def logits_of(model, x):
    """A network's answers to x as logits [B, K]. Event networks answer with firing rates, the mean of ten voters per
    class; ten times that, the number of votes per step, makes a full vote sure under softmax, and silence unsure.
    Raises ValueError where the answers are anything else."""
    answers = model(x)
    if not isinstance(answers, torch.Tensor) or answers.dim() != 2 or len(answers) != len(x):
        raise ValueError(f"a network must answer samples {list(x.shape)} with logits [N, K]")
    return answers * (10 if x.dim() == 5 else 1)


@torch.no_grad()
def strip(model, x, clean, overlays=20, seed=0):
    """STRIP (Gao et al. 2019): mean entropy [B], in nats, of the predictions for x with clean images added to it.

    x: images to judge [B, C, H, W], clean: images that the defender trusts [N, C, H, W], all in [0, 1]. A trigger that
    survives any overlay keeps the answer fixed: LOW entropy is suspicious. The sum is not clipped, so it leaves [0, 1].
    # differs from the source: 20 overlays, not 100, to fit a CPU; nats, not bits, which changes no ranking
    """
    over = torch.randint(len(clean), (len(x), overlays), generator=generator(seed, "STRIP overlays"))
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
        before = [set_threshold(m, get_threshold(m) * (threshold / shipped)) for m in found]
        try:
            answers.append(probabilities(model, x))
        finally:
            for m, old in zip(found, before):
                put_back(m, old)
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
