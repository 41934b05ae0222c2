"""The paper's three spiking networks (Sec. 4.1): ResNet-19, VGG-16 and N-MNIST-Net.

    model = build_model("resnet19", num_classes=10, T=4, width=16, mean=(0.5,) * 3, std=(0.25,) * 3)
    logits = model(images)          # floats [B, 3, H, W] in [0, 1] -> [B, K], the mean over T steps
    logits = model(images, every_step=True)         # [T, B, K], an answer per step (for TET's loss)
    model.T = 8                                     # any number of steps: no weight depends on it

An image is shown as a constant current: the first convolution sees it once and its output is fed to
the first neurons T times ("direct coding"). From there on everything is spikes, [T, B, C, H, W],
time first. Convolutions and BatchNorm know no time, they see T * B images; only the neurons connect
one step to the next.
"""
import contextlib

import torch
import torch.nn.functional as F
from torch import nn

from lif import LIF, PLIF

WIDTHS = {"resnet19": 16, "vgg16": 16, "nmnist_net": 16}    # for two cores; sources: 128, 64, 128
NEURONS = {"lif": LIF, "plif": PLIF}


def per_step(layers, s):
    """Applies layers that know no time to all steps at once: [T, B, ...] -> [T, B, ...]."""
    shape, s = s.shape[:2], s.flatten(0, 1)
    for layer in layers:
        s = layer(s)
    return s.unflatten(0, shape)


class ConvLIF(nn.Module):
    """3x3 convolution - BatchNorm - neuron: [T, B, in, H, W] -> spikes [T, B, out, H, W]."""

    def __init__(self, c_in, c_out, neuron, bias):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, 3, padding=1, bias=bias)
        self.bn = nn.BatchNorm2d(c_out)
        self.lif = neuron()

    def forward(self, s):
        return self.lif(per_step([self.conv, self.bn], s))


class Pool(nn.Module):
    """Halves H and W of [T, B, C, H, W]."""

    def __init__(self, pool):
        super().__init__()
        self.pool = pool

    def forward(self, s):
        return per_step([self.pool], s)


class Block(nn.Module):
    """Residual block with the neuron AFTER the addition: spikes [T, B, in, H, W] -> [T, B, out,
    H/stride, W/stride]."""

    def __init__(self, c_in, c_out, stride, neuron):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.lif1 = neuron()
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.project = stride != 1 or c_in != c_out
        if self.project:
            self.pool = nn.AvgPool2d(stride, ceil_mode=True)    # odd sizes: as the convolution
            self.shortcut = nn.Conv2d(c_in, c_out, 1, bias=False)
            self.shortcut_bn = nn.BatchNorm2d(c_out)
        self.lif2 = neuron()

    def forward(self, s):
        h = self.lif1(per_step([self.conv1, self.bn1], s))
        h = per_step([self.conv2, self.bn2], h)
        if self.project:
            s = per_step([self.pool, self.shortcut, self.shortcut_bn], s)
        return self.lif2(h + s)


class ImageSNN(nn.Module):
    """Spiking network for static images: a convolution, `stages` from spikes to spikes, a head."""

    def __init__(self, stages, width, features, num_classes, T, neuron, bias, mean, std):
        super().__init__()
        self.T = T
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1))
        self.conv = nn.Conv2d(self.mean.shape[1], width, 3, padding=1, bias=bias)
        self.bn = nn.BatchNorm2d(width)
        self.lif = neuron()
        self.stages = nn.ModuleList(stages)
        self.head = nn.Linear(features, num_classes)

    def forward(self, x, every_step=False):
        """x: images [B, C, H, W], floats in [0, 1] -> logits [B, K]; of every step [T, B, K]."""
        if not (x.is_floating_point() and x.dim() == 4 and x.shape[1] == self.mean.shape[1]):
            raise ValueError(f"this network takes floats [B, {self.mean.shape[1]}, H, W] in "
                             f"[0, 1]: x.float() / 255; not {x.dtype} {[*x.shape]}")
        x = ((x - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        current = self.bn(self.conv(x))                             # once per image: [B, C, H, W]
        s = self.lif(current.expand(self.T, *current.shape))
        for stage in self.stages:
            s = stage(s)
        # the head is linear, so the mean of its T answers is its answer to the mean
        rate = s.mean((3, 4) if every_step else (0, 3, 4), dtype=torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            return self.head(rate)


def resnet19(num_classes, T, width, neuron, mean, std):
    """Spiking ResNet-19, [B, 3, H, W] -> [B, K], as in SEENN (Li et al. 2023): 3, 3 and 2 blocks of
    1x, 2x, 4x width. Width 128 (the source's): 12,569,226 parameters for 10 classes."""
    stages, c_in = [], width
    for c_out, blocks, stride in ((width, 3, 1), (2 * width, 3, 2), (4 * width, 2, 2)):
        first = Block(c_in, c_out, stride, neuron)
        others = [Block(c_out, c_out, 1, neuron) for _ in range(blocks - 1)]
        stages.append(nn.Sequential(first, *others))
        c_in = c_out
    return ImageSNN(stages, width, 4 * width, num_classes, T, neuron, False, mean, std)


def vgg16(num_classes, T, width, neuron, mean, std):
    """Spiking VGG-16, [B, 3, H, W] -> [B, K], configuration D as in SEENN (Li et al. 2023): 13
    convolutions, 4 pools. Width 64 (the source's): 14,728,266 parameters for 10 classes.
    # differs from SEENN: PyTorch's default initialisation, not He-normal with n = 9 * channels
    """
    stages, c_in = [], width
    for multiple, convs in ((1, 1), (2, 2), (4, 3), (8, 3), (8, 3)):    # ImageSNN has the first one
        layers = []
        for _ in range(convs):
            layers.append(ConvLIF(c_in, multiple * width, neuron, bias=True))
            c_in = multiple * width
        if len(stages) < 4:
            layers.append(Pool(nn.AvgPool2d(2)))
        stages.append(nn.Sequential(*layers))
    return ImageSNN(stages, width, 8 * width, num_classes, T, neuron, True, mean, std)


class NMNISTNet(nn.Module):
    """N-MNIST-Net (Abad et al. 2024, "Sneaky Spikes"): 2 convolutions, 2 fully connected layers,
    all spiking. 10 neurons vote for each class; the output is the firing rate of the voters. Width
    128 (the source's): 17,134,436 parameters for 10 classes.
    # differs from the source: its neuron has no leak (Sec. 4.1 says LIF) and ATan, a detached reset
    """

    def __init__(self, num_classes, T, width, neuron, mean=None, std=None):
        super().__init__()
        self.T = T
        self.stages = nn.ModuleList(
            nn.Sequential(ConvLIF(c_in, width, neuron, bias=False), Pool(nn.MaxPool2d(2)))
            for c_in in (2, width))
        self.fc1, self.lif1 = nn.Linear(width * 8 * 8, 16 * width), neuron()
        self.fc2, self.lif2 = nn.Linear(16 * width, 10 * num_classes), neuron()

    def forward(self, x, every_step=False):
        """x: event counts [B, T, 2, 34, 34], floats -> firing rates [B, K], or [T, B, K]."""
        if not x.is_floating_point() or x.shape[1:] != (self.T, 2, 34, 34):
            raise ValueError(f"this network takes event counts [B, {self.T}, 2, 34, 34] as floats "
                             f"(x.float()), not {x.dtype} {list(x.shape)}")
        s = x.transpose(0, 1)                                        # [T, B, 2, 34, 34]
        s = s.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, s.shape[:2])
        for stage in self.stages:
            s = stage(s)
        s = self.lif1(self.fc1(self.dropout(s.flatten(2))))
        s = self.lif2(self.fc2(self.dropout(s)))                     # [T, B, 10 K]
        return s.float().unflatten(2, (-1, 10)).mean(3 if every_step else (0, 3))

    def dropout(self, s):
        """Drops half of the features, the same ones at every step: [T, B, N] -> [T, B, N]."""
        return s * F.dropout(torch.ones_like(s[0]), 0.5, self.training)


def build_model(name, num_classes, T=4, width=None, neuron="lif", mean=None, std=None):
    """One of the networks of Sec. 4.1 with fresh weights; ValueError for an unknown name or a bad
    number. name: resnet19 | vgg16 (images [B, 3, H, W] in [0, 1]) | nmnist_net (events [B, T, 2,
    34, 34]). T: time steps. width: channels of the first stage (None: WIDTHS). neuron: lif | plif.
    mean, std: per channel, the network's own first layer (images only)."""
    if name not in WIDTHS:
        raise ValueError(f"unknown model {name!r}; known: {', '.join(WIDTHS)}")
    if neuron not in NEURONS:
        raise ValueError(f"unknown neuron {neuron!r}; known: {', '.join(NEURONS)}")
    width = WIDTHS[name] if width is None else width
    for what, value, least in (("T", T, 1), ("width", width, 1), ("num_classes", num_classes, 2)):
        if int(value) != value or value < least:
            raise ValueError(f"{what} must be a whole number of at least {least}, not {value}")
    build = dict(resnet19=resnet19, vgg16=vgg16, nmnist_net=NMNISTNet)[name]
    model = build(num_classes, T, width, NEURONS[neuron], mean or (0.5,) * 3, std or (0.25,) * 3)
    return model.to(memory_format=torch.channels_last)


def fresh_model(data, s):       # with the weights that the seed gives
    torch.manual_seed(s.seed)
    shape = data.num_classes, s.T, s.width, s.neuron, data.mean, data.std
    return build_model(s.model, *shape).to(s.device)


@contextlib.contextmanager
def frozen(model):
    """Inside the block: eval mode, and no gradients for the weights; then as before."""
    training, needed = model.training, [p.requires_grad for p in model.parameters()]
    model.eval().requires_grad_(False)
    try:
        yield model
    finally:
        model.train(training)
        for p, need in zip(model.parameters(), needed):
            p.requires_grad_(need)
