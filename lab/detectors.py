"""Three detectors of backdoors, none of them in the paper: two judge inputs, the third judges the model.

    entropy = strip(model, x, clean)           how unsure the model stays when images are added to x: low is suspicious
    score = spike_deviation(model, x, clean)   how far the number of spikes leaves what clean images cause
    result = threshold_scan(model, clean)      does another threshold make the MODEL sure of one class?

They leave the model as it was. Answers may be logits, probabilities or spike rates: see reading_of. Each raises
ValueError for a network or images that hold no numbers (NaN): a neuron may turn a NaN into "no spike" and hide it.
"""
import torch
import torch.nn.functional as F

from kit.sources import need
from kit.training import generator
from lab.libraries import get_threshold, neurons_of, scaled
from lif import LIF, count_spikes
from models import frozen

SCAN = (0.5, 0.6, 0.7, 0.8, 0.9, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 1.9, 2.0)     # times the shipped threshold

# ----- What a network says


def logits_of(model, x, reading=None):
    """A network's answers to x [B, ...] as logits [B, K], differentiable. reading: see reading_of, which makes it from
    these answers alone where there is none."""
    answers = checked(model(x), x)
    return to_logits(answers, reading or reading_of(answers))


def checked(answers, x):
    """A network's answers to x, if they are numbers [N, K]; else ValueError."""
    tensor = isinstance(answers, torch.Tensor)
    need(tensor and answers.dim() == 2 and len(answers) == len(x) and answers.shape[1] > 1,
         f"a network must answer {list(x.shape)} with logits [N, K], K at least 2 (the mean over its steps), not with "
         f"{list(answers.shape) if tensor else type(answers).__name__}")
    need((answers < torch.inf).all(), "the network's answers are no numbers (NaN or infinite)")
    return answers


def reading_of(answers):
    """What answers [N, K] are: "logits", "probabilities" (softmax: rows sum to 1, few zeros) or "rates" (of spikes, or
    numbers of spikes; sigmoids as well), and by what they are multiplied to become logits. A full vote becomes 10, of
    which softmax is sure (event networks have ten voters per class). A full vote is 1; of numbers, and of rates that
    stay below one half, the largest. A silent network tells nothing: decide at the shipped thresholds."""
    answers = answers.detach().float()
    most, whole = answers.max().item(), (answers == answers.round()).all()
    if answers.min() < 0 or most > 1 and not whole:
        return "logits", 1
    if ((answers.sum(1) - 1).abs() < 0.01).all() and (answers > 0).float().mean() > 0.5:
        return "probabilities", 1
    return "rates", 10 / (most if most > 1 or 0 < most < 0.5 else 1)


def to_logits(answers, reading):
    kind, scale = reading
    return answers.clamp(min=1e-9).log() if kind == "probabilities" else answers * scale


@torch.no_grad()
def answers_of(model, x, batch=256):
    """What the model says to x [N, ...]: float32 [N, K], in batches, in eval mode, each batch from rest."""
    with frozen(model), scaled(model):
        return torch.cat([checked(model(part), part) for part in x.split(batch)]).float()


def probabilities(model, x, reading=None):
    """Softmax of the logits for x [N, ...]: float32 [N, K]."""
    answers = answers_of(model, x)
    return to_logits(answers, reading or reading_of(answers)).softmax(1)


def check_finite(model, *images):
    """Raises ValueError where a network or images hold something that is no number."""
    for name, values in (*model.named_parameters(), *model.named_buffers(), *(("the images", x) for x in images)):
        need(values.isfinite().all(), f"NaN or infinite numbers in {name}: what the network says means nothing")


def entropy(p):
    """Of probabilities [..., K]: [...], in nats, from 0 (sure) to log K (no idea)."""
    return torch.special.entr(p).sum(-1)


# ----- The detectors


@torch.no_grad()
def strip(model, x, clean, overlays=20, seed=0):
    """STRIP (Gao et al. 2019): mean entropy [B], in nats, of the predictions for x with clean images added to it.

    x: images to judge [B, C, H, W], clean: images that the defender trusts [N, C, H, W], all in [0, 1]. A trigger that
    survives any overlay keeps the answer fixed: LOW entropy is suspicious. The sum is not clipped, so it leaves [0, 1].
    # differs from the source: 20 overlays, not 100, to fit a CPU; nats, not bits, which changes no ranking
    """
    check_finite(model, x, clean)
    reading = reading_of(answers_of(model, clean))
    over = torch.randint(len(clean), (len(x), overlays), generator=generator(seed, "STRIP overlays"))
    many = max(1, 256 // overlays)          # images per pass, each with all its overlays
    entropies = [entropy(probabilities(model, (images[:, None] + clean[rows]).flatten(0, 1), reading))
                 for images, rows in zip(x.split(many), over.split(many))]
    return torch.cat(entropies).view(len(x), overlays).mean(1)


def spike_deviation(model, x, clean):
    """|spikes of x - mean| / standard deviation [B], mean and deviation over clean images; HIGH is suspicious. Images
    in [0, 1]. Sec. 3.2 says that triggers change the number of spikes; here that is turned against them."""
    check_finite(model, x, clean)
    need(any(isinstance(m, LIF) for m in model.modules()), "spikes are counted of the neurons of lif.py alone")
    trusted, counts = count_spikes(model, clean), count_spikes(model, x)
    return (counts - trusted.mean()).abs() / trusted.std().clamp(min=1e-12)


def threshold_scan(model, x, window=4):
    """What a model says of clean images x [N, C, H, W] in [0, 1] when its thresholds are changed. It turns Sec. 3.3 of
    the paper around: what the attacker deploys lies between the nominal and the malicious setting, and beyond it lies
    one at which the model was TAUGHT to be sure of the target. A clean model is unsure there. No training, no trigger.

    A dict: v_thr [V], SCAN times the shipped threshold (neurons whose thresholds differ are scaled alike); share and
    probability [V, K]: how often each class is predicted, and its mean probability; entropy [V]: of a prediction, in
    nats, mean over x; score in [1 / K, 1]: the largest mean probability that one class has over `window` neighbouring
    thresholds above, or below, the shipped one (HIGH is suspicious); accused: that class; shipped [N, K]: the
    probabilities as shipped; reading: see reading_of. Raises ValueError for a model without a neuron that is known.
    # prior art: IBD-PSC (Hou et al. 2024) scales BatchNorm, which amounts to thresholds, to judge inputs
    """
    found, unknown = neurons_of(model)
    need(found, f"no spiking neuron that is known in this model; unknown modules: {', '.join(unknown) or 'none'}")
    thresholds = [torch.as_tensor(get_threshold(m), dtype=torch.float32).cpu() for m in found]
    need(all(((v > 0) & (v < torch.inf)).all() for v in thresholds), "thresholds must be above 0 to be scaled")
    check_finite(model, x)
    answers = answers_of(model, x)
    reading, p = reading_of(answers), []
    for factor in SCAN:
        with scaled(model, factor):
            p.append(probabilities(model, x, reading))
    p = torch.stack(p)                                                  # [V, N, K]
    probability, middle = p.mean(1), sum(factor < 1 for factor in SCAN)
    score, accused = scan_score(probability[:middle], probability[middle:], window)
    return dict(v_thr=[round(factor * thresholds[0].mean().item(), 4) for factor in SCAN],
                share=F.one_hot(p.argmax(2), p.shape[2]).float().mean(1), probability=probability,
                entropy=entropy(p).mean(1), score=score, accused=accused,
                shipped=to_logits(answers, reading).softmax(1), reading=reading[0])


def scan_score(below, above, window):
    """The scan's verdict: (score, accused). below, above: mean probabilities [V, K] of the classes at thresholds on
    either side of the shipped one, in ascending order. The largest mean that one class has over `window` neighbouring
    rows of one side (or over the side, if it is shorter), and that class."""
    means = []
    for side in (below, above):
        means += [side[i:i + window].mean(0) for i in range(max(1, len(side) - window + 1)) if len(side)]
    best = max(means, key=torch.max)
    return best.max().item(), best.argmax().item()
