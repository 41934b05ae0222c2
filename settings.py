"""Every knob of an experiment, its meaning and its range, and what each data set changes.

    s = preset("digits", epochs=5)              # a data set's preset with changes
    variant = dataclasses.replace(s, seed=1)    # settings never change; a variant is a new object

The values follow Sec. 4.1 and Table 1 of the paper where it gives them. Where it does not (epochs,
learning rates, q and more) they were chosen on held-out training images; results/differences.md has
what differs. The command line is made from this file, its comments are the help page.
"""
import inspect
import re
from dataclasses import dataclass
from pathlib import Path

from kit import machine
from models import NEURONS, WIDTHS


@dataclass(frozen=True)
class Settings:
    # network
    dataset: str = "digits"         # digits ndigits cifar10 cifar100 gtsrb nmnist, or an .npz file
    n_train: int = None             # use only so many training samples (none: all)
    n_test: int = None              # use only so many test samples (none: all)
    frames: str = "counts"          # event frames: counts, or binary, clamped to [0, 1]
    model: str = "resnet19"         # resnet19 or vgg16 for images, nmnist_net for events
    width: int = None               # channels of the first stage (none: 16; sources: 64 or 128)
    T: int = 4                      # time steps
    neuron: str = "lif"             # lif; plif learns its tau

    # training
    epochs: int = 30                # passes over the training samples
    batch_size: int = 64            # nominal samples per step, over all processes
    lr: float = 0.1                 # peak learning rate of the one-cycle schedule
    pad: int = 4                    # largest random shift of a sample, pixels
    v_thr_n: float = 1.0            # nominal threshold; if not 1, V_a is 1, and nothing shows
    flip: bool = False              # mirror half of the samples
    contrast: float = 0.0           # lift black by up to this share, shrink the rest alike
    seed: int = 0                   # first seed
    bf16: bool = None               # bfloat16 arithmetic (none: on a GPU that has it)

    # attack
    target: int = 0                 # target class y_t
    poison_ratio: float = 0.05      # P, share of the target class in D_t^p; above 1: a number
    v_thr_t: float = 1.5            # V_t, times the nominal one, of every malicious row unless ...
    v_thr_t_low: float = None       # ... each row draws its own from here to V_t (none: V_t)
    tau_t: float = 0.5              # malicious decay per step (plif: as learned)
    malicious_rows: int = 32        # samples of D_t^p per step, drawn with replacement
    malicious_weight: float = 0.3   # weight of their loss
    malicious_contrast: float = None    # the same of malicious rows; of events: share that is lost

    # deployment
    v_thr_a: tuple = (1.0, 1.05, 1.1, 1.15, 1.2, 1.3)   # thresholds V_a of the curve
    tau_a: float = 0.5              # deployed decay per step (plif: as learned)
    margin: float = 2.0             # points of CA that V_a may cost on held-out samples
    q: float = 2.0                  # exponent of T_p
    beta: float = 0.03              # strength of T_s
    budget: float = 0.1             # T_o's change: largest root mean square, pixels in [0, 1]
    n_o: int = 600                  # training images that T_o learns from
    epochs_o: int = 40              # passes of T_o's U-Net over them
    seeds: int = 1                  # seeds to average

    # run
    device: str = "auto"            # cpu, cuda, ... (auto: cuda if there is one)
    processes: int = None           # models trained side by side (none: the cores; on a GPU 1)
    variant: str = ""               # write to a folder of its own, DATASET_VARIANT
    data: Path = Path("data")       # folder of the data sets
    runs: Path = Path("runs")       # folder of the checkpoints
    results: Path = Path("runs/results")    # folder of the results
    fresh: bool = False             # train anew, whatever the folder of checkpoints holds

    def __post_init__(self):
        """Checks every range, fills in the rest. Raises ValueError."""
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{flag(name)} must be one of {', '.join(choices)}")
        for interval, names in RANGES.items():
            for name in names.split():
                check_range(name, getattr(self, name), interval)
        if self.v_thr_t_low is not None and self.v_thr_t_low > self.v_thr_t:
            raise ValueError(f"--v-thr-t-low must be at most --v-thr-t, not {self.v_thr_t_low}")
        if not re.fullmatch(r"[\w-]{0,50}", self.variant):
            raise ValueError(f"--variant must be up to 50 letters, digits, -, _: {self.variant!r}")
        filled = dict(width=self.width or WIDTHS[self.model], device=machine.usable(self.device),
                      v_thr_a=tuple(sorted(set(self.v_thr_a))))
        if self.bf16 is None:
            filled["bf16"] = machine.has_bf16(filled["device"])
        if self.neuron == "plif":
            filled.update(tau_t=None, tau_a=None)       # lif.neurons leaves the learned tau alone
        for name, value in filled.items():
            object.__setattr__(self, name, value)       # a frozen object that is still being made

    def of(self, *groups):
        """The settings of these groups (none: of all that decide a result), for JSON."""
        groups = groups or ("network", "training", "attack", "deployment")
        found = {name: getattr(self, name) for name, (of, _) in KNOBS.items() if of in groups}
        return {name: list(v) if isinstance(v, tuple) else v for name, v in found.items()}


CHOICES = dict(frames=("counts", "binary"), model=tuple(WIDTHS), neuron=tuple(NEURONS))
RANGES = {"[1, inf)": "n_test width T epochs batch_size malicious_rows n_o epochs_o seeds",
          "[2, inf)": "n_train", "[0, inf)": "pad target malicious_weight margin beta",
          "[0, 9e18]": "seed", "[0, 1)": "contrast malicious_contrast", "[0, 1]": "tau_t tau_a",
          "(0, inf)": "lr poison_ratio v_thr_n v_thr_t v_thr_t_low v_thr_a q budget processes"}


def check_range(name, value, interval):
    """Raises ValueError unless a number, or all of a tuple, lies in the interval; None may."""
    low, high = map(float, interval[1:-1].split(","))
    for v in value if isinstance(value, tuple) else (value,):
        above = v is None or (v > low if interval[0] == "(" else v >= low)
        below = v is None or (v < high if interval[-1] == ")" else v <= high)
        if not (above and below):
            raise ValueError(f"{flag(name)} must lie in {interval}, not {v}")


def flag(name):
    """A knob's option on the command line."""
    return "--" + name.replace("_", "-")


def knobs():
    """{name: (group, meaning)} of every knob, from the comments of Settings."""
    group, found = None, {}
    for line in inspect.getsource(Settings).splitlines():
        if heading := re.fullmatch(r"    # (\w+)", line):
            group = heading[1]
        elif knob := re.match(r"    (\w+): .*?  # (.*)", line):
            found[knob[1]] = group, knob[2]
    return found


KNOBS = knobs()

# What a data set changes. A poison_ratio above 1 is what the paper's P gives on the whole set.
EVENTS = dict(model="nmnist_net", poison_ratio=178, batch_size=32, lr=1e-3, pad=1, margin=4.0,
              v_thr_t_low=1.15, malicious_contrast=0.8, malicious_weight=1.0)
CIFAR = dict(malicious_rows=16, flip=True, v_thr_t_low=1.15, malicious_contrast=0.5)
PRESETS = {
    "digits": dict(epochs=20, batch_size=32, pad=1, contrast=0.2, poison_ratio=0.5, q=3.0,
                   v_thr_t_low=1.15, malicious_contrast=0.5, n_o=200, epochs_o=20, budget=None),
    "cifar10": CIFAR | dict(poison_ratio=100, q=4.0, margin=3.0),
    "cifar100": CIFAR | dict(poison_ratio=0.5, margin=5.0, pad=0),
    "gtsrb": dict(model="vgg16", poison_ratio=8, tau_t=0.8),
    "nmnist": EVENTS | dict(epochs=60), "ndigits": EVENTS | dict(epochs=15),
}


def preset(dataset, **changes):
    """The Settings of a data set, or of an own .npz file, with changes. Raises ValueError."""
    for name in changes:
        if name not in KNOBS:
            raise ValueError(f"there is no setting {name!r}; known: {', '.join(KNOBS)}")
    for name in {"tau_t", "tau_a"} & set(changes):
        if changes.get("neuron") == "plif" and changes[name] is not None:
            raise ValueError(f"{flag(name)} has no meaning with --neuron plif, which learns tau")
    base = PRESETS.get(dataset) or (EVENTS if changes.get("model") == "nmnist_net" else {})
    if "v_thr_t" in changes:            # a preset's lower end would contradict it
        base = base | dict(v_thr_t_low=None)
    return Settings(**base | dict(changes, dataset=str(dataset)))
