"""The triggers: what an attacker does to an input so that the deployed network answers with the target class.

    x_trig = power_trigger(x, q=2, mean=data.mean, std=data.std)        # T_p, Eq. 3: images
    x_trig = spike_trigger(frames, beta=0.03)                           # T_s, Eq. 7: event frames

Images are floats [B, C, H, W] in [0, 1], event frames are counts [B, T, 2, 34, 34]; so is what comes back.
"""
import torch


def _channels(values, x):
    return torch.as_tensor(values, dtype=torch.float32, device=x.device).view(1, -1, 1, 1)


def power_trigger(x, q, mean, std, renormalize=False):
    """T_p (Sec. 3.3.2, Eq. 3): raises every pixel to the power q. Images [B, C, H, W] in [0, 1] -> the same.

    Eq. 3 taken literally de-normalises, raises to q, and feeds the result x^q to the network as it is: where the network
    expects (pixel - mean) / std it gets x^q. In pixels that is mean + std * x^q, a washed-out image of low contrast.
    renormalize=True is the other reading, the plain darkened image x^q (then q = 1 changes nothing). q > 0; mean and std
    per channel as in the network's first layer. Raises ValueError for q <= 0.
    """
    if not 0 < q < float("inf"):
        raise ValueError(f"q must be greater than 0, not {q}")
    x = x ** q
    return x if renormalize else (_channels(mean, x) + _channels(std, x) * x).clamp(0, 1)


def spike_trigger(frames, beta, generator=None):
    """T_s (Sec. 3.3.3, Eq. 7): clip(frames + U(-beta, beta), 0, 1). Event frames [B, T, 2, H, W] -> the same, in [0, 1].

    beta >= 0 is the strength (the paper's: 0.03); generator makes the noise repeatable. Raises ValueError for beta < 0.
    Frames are event COUNTS, so the clip alone changes every pixel with more than one event: report beta = 0 beside it.
    """
    if not 0 <= beta < float("inf"):
        raise ValueError(f"beta must be at least 0, not {beta}")
    noise = torch.rand(frames.shape, generator=generator).to(frames.device) * 2 - 1
    return (frames + beta * noise).clamp(0, 1)


def check_trigger(x, x_trig):
    """Raises ValueError unless a triggered batch is a valid input: same shape and dtype as x, finite, images in [0, 1]
    (event frames: not below 0). Called before any ASR is computed."""
    if x.shape != x_trig.shape or x.dtype != x_trig.dtype:
        raise ValueError(f"the trigger turned {list(x.shape)} {x.dtype} into {list(x_trig.shape)} {x_trig.dtype}")
    most = 1 if x.dim() == 4 else float("inf")
    low, high = x_trig.aminmax()
    if not (low >= 0 and high <= most and high < float("inf")):
        raise ValueError(f"the trigger left the valid range: [{low:.3g}, {high:.3g}]")
