"""What a training needs beside its mathematics: random numbers, checkpoints, a log.

    generator(seed, "shuffle", epoch)       a random number generator of its own for every purpose
    log = TrainingLog(name, deciders, s, model=model, optimizer=optimizer)
    for epoch, shuffle, local in log.epochs():      what an earlier run has finished is left out
        log.step(...), log.end_epoch(...)           one line is printed, one checkpoint written
"""
import hashlib
import io
import json
import time
from datetime import timedelta

import torch
from tqdm.auto import tqdm

from kit.files import fingerprint, replace_file
from kit.machine import compiling, of_rank_0, rank, say


def generator(seed, *purpose):
    """A torch.Generator for one purpose (words and numbers, such as "shuffle", 3) of a seed. No two purposes draw
    the same numbers."""
    digest = hashlib.sha256(json.dumps([seed, *purpose]).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def checkpoint_path(config, s):
    """Where the model or trigger that `config` (everything that decides it) describes is kept."""
    return (s.runs / config["dataset"]
            / f"{config['name'].replace(' ', '-')}-seed{config['seed']}-{fingerprint(config)[:8]}.pt")


def write_checkpoint(path, config, **state):
    """Tensors and plain values only, so that reading it never runs anything. state: objects with a state_dict, or
    such values."""
    if rank() == 0:
        state = {name: value.state_dict() if hasattr(value, "state_dict") else value for name, value in state.items()}
        whole = io.BytesIO()            # torch.save into a full disk would raise what no caller expects
        torch.save(dict(state, config=config), whole)
        with replace_file(path) as part:
            part.write_bytes(whole.getbuffer())


def read_checkpoint(path, config, s, **parts):
    """Loads the state in a checkpoint into `parts`, objects with a load_state_dict, and returns it; None if there
    is none yet, or with --fresh. Raises ValueError for a damaged file or one of another run."""
    there = not s.fresh and rank() == 0 and path.exists()
    try:
        state = of_rank_0(torch.load(path, weights_only=True, map_location="cpu") if there else None)
        if state is None:
            return None
        if state["config"] != config:
            raise ValueError("it belongs to a run with other settings")
        for name, part in parts.items():
            part.load_state_dict(state[name])
        return state
    except Exception as error:      # torch.load has many: zip, pickle, key, type and runtime errors
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:150]
        raise ValueError(f"{path}: not a checkpoint of this run ({reason}); delete it, "
                         "or start anew with --fresh") from None


class TrainingLog:
    """The epochs of one training: their random numbers, the line printed for each, the checkpoint after each.

    name, config: what is trained, and a dict of everything that decides the outcome, among it dataset and seed. parts:
    model, optimizer and schedule, whose state goes into the checkpoint, and comes from it where one is there.
    history: a dict per epoch. Raises ValueError.
    """
    COLUMNS = dict(epoch=9, T=2, loss=7, acc=6, mal_acc=7, CA=6, target_rate=11, sec=6, ETA=7)

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
        """Yields, per epoch still to be trained, its number and two generators: one that draws the same in every
        process, one of this process. So a resumed run is the run that was never interrupted."""
        say(" ".join(f"{name:>{width}}" for name, width in self.COLUMNS.items()))
        for epoch in range(len(self.history), self.s.epochs):
            self.totals, self.started = torch.zeros(5, dtype=torch.float32, device=self.s.device), time.time()
            torch.manual_seed(generator(self.s.seed, "dropout", epoch, rank()).initial_seed())
            with compiling(self.n_steps * self.s.epochs >= 2000):       # else it costs more than it saves
                yield (epoch, generator(self.s.seed, "shuffle", epoch),
                       generator(self.s.seed, "augmentation", epoch, rank()))

    def steps(self):
        """The numbers of an epoch's steps, with a progress bar on a terminal."""
        return tqdm(range(self.n_steps), leave=False, disable=None if rank() == 0 else True)

    def step(self, loss, right, n, marked):
        """Adds up one batch: its loss, which rows were answered right (of the first n, nominal ones: acc), and which
        rows carry the attack (mal_acc): poisoned ones and all beyond n. bool [B] each."""
        marked[n:] = True
        counts = loss.detach() * n, n, right[:n].sum(), marked.sum(), right[marked].sum()
        self.totals += torch.stack([torch.as_tensor(v, dtype=torch.float32, device=self.s.device) for v in counts])

    def end_epoch(self, ca, target_rate, chance):
        """Prints the epoch's line, warns of a collapse, and writes the checkpoint. Raises ValueError where the
        training has diverged."""
        loss, seen, right, n_marked, right_marked = self.totals.tolist()
        epoch, T = len(self.history) + 1, self.parts["model"].T
        if not all((p.detach().abs() < 1e6).all() for p in (self.totals / seen, *self.parts["model"].parameters())):
            raise ValueError(f"training diverged in epoch {epoch}: weights are huge, or no numbers; lower --lr "
                             f"({self.s.lr:g})")
        self.history.append(dict(epoch=epoch, T=T, loss=loss / seen, acc=100 * right / seen, ca=ca,
                                 target_rate=target_rate, mal_acc=100 * right_marked / n_marked if n_marked else None,
                                 seconds=time.time() - self.started))
        self.print_epoch(self.history[-1])
        if T == self.s.T and epoch > 2 and (ca < 1.5 * chance or target_rate > 90):
            say("  warning: collapsed? at the nominal setting the model " + (
                "answers the target to nearly everything" if target_rate > 90 else "is near chance"))
        write_checkpoint(self.path, self.config, **self.parts, history=self.history)

    def print_epoch(self, row):
        eta = timedelta(seconds=round(row["seconds"] * (self.s.epochs - row["epoch"]) * self.s.T / row["T"]))
        mal_acc = f"{row['mal_acc']:.1f}" if row["mal_acc"] is not None else "-"
        texts = (f"{row['epoch']:>5}/{self.s.epochs:<3}", row["T"], f"{row['loss']:.3f}", f"{row['acc']:.1f}", mal_acc,
                 f"{row['ca']:.1f}", f"{row['target_rate']:.1f}", f"{row['seconds']:.1f}", eta)
        say(" ".join(f"{text!s:>{width}}" for text, width in zip(texts, self.COLUMNS.values())))
