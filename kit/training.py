"""What a training needs beside its mathematics: random numbers, checkpoints, a log."""
import hashlib
import io
import json
import time
from datetime import timedelta

import torch
from tqdm.auto import tqdm

from kit.files import fingerprint, replace_file
from kit.machine import compiling, rank, say, wait_for_all


def generator(seed, *purpose):
    """A torch.Generator of a seed; every purpose (words and numbers, such as "shuffle", 3) draws numbers of its own."""
    digest = hashlib.sha256(json.dumps([seed, *purpose]).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def checkpoint_path(config, s):
    """Where the model or trigger that `config` (everything that decides it) describes is kept."""
    name = f"{config['name'].replace(' ', '-')}-seed{config['seed']}-{fingerprint(config)[:8]}.pt"
    return s.runs / config["dataset"] / name


def write_checkpoint(path, config, **state):
    """state: objects with a state_dict, or plain values, so that reading it never runs anything."""
    if rank() == 0:
        state = {name: value.state_dict() if hasattr(value, "state_dict") else value for name, value in state.items()}
        whole = io.BytesIO()            # torch.save into a full disk would raise what no caller expects
        torch.save(dict(state, config=config), whole)
        with replace_file(path) as part:
            part.write_bytes(whole.getbuffer())
    wait_for_all()


def read_checkpoint(path, config, s, **parts):
    """Loads a checkpoint into `parts`, objects with a load_state_dict, and returns it; None if there is none, or with
    --fresh. Raises ValueError for a damaged file or one of another run."""
    if s.fresh or not path.exists():
        return None
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        if state["config"] != config:
            raise ValueError("it belongs to a run with other settings")
        for name, part in parts.items():
            part.load_state_dict(state[name])
        return state
    except Exception as error:      # torch.load has many: zip, pickle, key, type and runtime errors
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:150]
        raise ValueError(f"{path}: not a checkpoint of this run ({reason}); delete it, or use --fresh") from None


class TrainingLog:
    """The epochs of one training: their random numbers, the line printed for each, the checkpoint after each. name,
    config: what is trained, a dict of all that decides the outcome. parts: model, optimizer and schedule, whose state
    the checkpoint keeps. history: a dict per epoch. Raises ValueError."""

    def __init__(self, name, config, s, steps, **parts):
        self.s, self.n_steps, self.parts, self.config = s, steps, parts, dict(config, name=name)
        self.path = checkpoint_path(self.config, s)
        state = read_checkpoint(self.path, self.config, s, **parts)
        self.history = parts["model"].history = state["history"] if state else []
        self.finished = len(self.history) == s.epochs
        size = sum(p.numel() for p in parts["model"].parameters())
        note = f"{s.model}, width {s.width}, T = {s.T}, {size:,} parameters, {steps} steps an epoch"
        if self.finished:
            note = f"finished earlier, read from {self.path}"
        elif self.history:
            note += f"; resumed after epoch {len(self.history)}"
        say(f"{name}, seed {config['seed']}: {note}")

    def epochs(self):
        """Yields each epoch still to be trained, and two generators: the first draws the same in every process. So a
        resumed run is the run that was never interrupted."""
        say("    epoch  T    loss    acc mal_acc     CA target_rate    sec     ETA")
        for epoch in range(len(self.history), self.s.epochs):
            self.totals, self.seen, self.started = torch.zeros(4, device=self.s.device), 0, time.time()
            torch.manual_seed(generator(self.s.seed, "dropout", epoch, rank()).initial_seed())
            shuffle = generator(self.s.seed, "shuffle", epoch)
            local = generator(self.s.seed, "augmentation", epoch, rank())
            with compiling(self.n_steps * self.s.epochs >= 2000):       # else it costs more than it saves
                yield epoch, shuffle, local

    def steps(self):
        """The numbers of an epoch's steps, with a progress bar on a terminal."""
        return tqdm(range(self.n_steps), leave=False, disable=None if rank() == 0 else True)

    def step(self, loss, right, n, marked):
        """Adds up a batch. right, marked: bool [B], the rows answered right, and those that carry the attack: so do
        all beyond the first n, the nominal ones. acc is of these n rows, mal_acc of the marked ones."""
        marked[n:] = True
        self.seen += n          # the rest is added up where it is: no step waits for a GPU
        self.totals += torch.stack([loss.detach() * n, right[:n].sum(), marked.sum(), (right & marked).sum()])

    def end_epoch(self, ca, target_rate, chance):
        """Prints the epoch's line and writes the checkpoint; all in percent. ValueError if the training diverged."""
        (loss, right, n_marked, right_marked), seen = self.totals.tolist(), self.seen
        epoch, T, seconds = len(self.history) + 1, self.parts["model"].T, time.time() - self.started
        if not all((p.detach().abs() < 1e6).all() for p in (self.totals / seen, *self.parts["model"].parameters())):
            raise ValueError(f"training diverged in epoch {epoch}: huge weights or NaN; lower --lr ({self.s.lr:g})")
        loss, acc = loss / seen, 100 * right / seen
        mal_acc = 100 * right_marked / n_marked if n_marked else None
        self.history.append(dict(epoch=epoch, T=T, loss=loss, acc=acc, ca=ca, target_rate=target_rate,
                                 mal_acc=mal_acc, seconds=seconds))
        eta = timedelta(seconds=round(seconds * (self.s.epochs - epoch) * self.s.T / T))
        shown = "-" if mal_acc is None else f"{mal_acc:.1f}"
        say(f"{epoch:>5}/{self.s.epochs:<3} {T:>2} {loss:7.3f} {acc:6.1f} {shown:>7} {ca:6.1f} {target_rate:11.1f} "
            f"{seconds:6.1f} {eta!s:>7}")
        if T == self.s.T and epoch > 2 and (ca < 1.5 * chance or target_rate > 90):
            say("  warning: collapsed? at the nominal setting CA is near chance, or nearly all answers are the target")
        write_checkpoint(self.path, self.config, **self.parts, history=self.history)
