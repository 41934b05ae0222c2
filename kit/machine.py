"""Processes and devices: models trained side by side, one model trained by several processes, compiling, memory.

One thread per process: threads of one process wait for each other at every step, so that a busy neighbour on one core
stops all of them. Several models side by side use several cores better.
"""
import contextlib
import ctypes
import logging
import multiprocessing
import os
import signal
import threading
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from tqdm.auto import tqdm

# ----- Several models side by side

_worker = {}        # in a worker: the name of the job whose lines it prints


def say(line):
    """Prints, once however many processes train together; in a worker behind the name of its job."""
    if rank() == 0:
        print(f"{_worker['name']:<22} {line}" if _worker else line, flush=True)


def side_by_side(function, jobs, s, names=None):
    """[function(*job) for job in jobs], in as many processes as there are jobs and cores; in order where there is one
    core, under torchrun, and on a GPU unless s.processes says how many share it. function and jobs: picklable. Raises
    what a job raises; a killed worker ends the others: ValueError. No worker outlives this process.
    """
    workers = min(len(jobs), s.processes or (1 if s.device.startswith("cuda") else cores()))
    if workers < 2 or dist.is_initialized():
        return [function(*job) for job in jobs]
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker,
                               (os.getpid(), threads_each(cores(), workers)))
    try:
        names = names or [str(i) for i in range(len(jobs))]
        tasks = [pool.submit(_run_job, name, function, job) for name, job in zip(names, jobs)]
        pool.submit(int)        # wakes the pool, which otherwise may not watch its last worker
        return [task.result() for task in tasks]
    except BrokenProcessPool:
        raise ValueError("a process that trained a model ended early: out of memory, or the program that runs here is "
                         "no file with its commands below if __name__ == '__main__': (set processes=1 then); the same "
                         "command goes on after the last finished epoch") from None
    finally:
        for process in list((pool._processes or {}).values()):      # after an error or Ctrl-C they would train on
            process.kill()
        pool.shutdown(cancel_futures=True)


def _start_worker(parent, threads):
    """Ctrl-C is the parent's business; the end of the parent, kill -9 included, is the end of this process."""
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    tqdm.set_lock(threading.RLock())        # its default is a semaphore, which a killed process would leave behind

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()
    keep_memory()


def _run_job(name, function, job):
    _worker["name"] = name
    return function(*job)


def threads_each(free, processes=1):
    """Threads for each of so many processes on so many cores: 1, unless each can have four; or OMP_NUM_THREADS."""
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    own = free // processes if free // processes >= 4 else 1
    return int(asked) if asked.isascii() and asked.isdigit() and int(asked) else own


def cores():
    """How many cores this process may use: its affinity, or the quota of its container (cgroup's cpu.max)."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):          # no such file; "max": no quota
        quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text().split())
        allowed = min(allowed, -(-quota // period))
    return max(1, allowed)


# ----- One model by several processes (torchrun): PyTorch's own DistributedDataParallel

def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def share(rows):
    """This process's part of a batch's rows."""
    return rows[rank()::dist.get_world_size()] if dist.is_initialized() else rows


def of_rank_0(value):
    """What rank 0 has, for every process, once all have come here: rank 0 alone reads and writes files."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


def first_alone(function, *arguments):
    """function(*arguments) in every process, first in rank 0: it may download what the others then find."""
    result = function(*arguments) if rank() == 0 else None
    of_rank_0(None)
    return result if rank() == 0 else function(*arguments)


def data_parallel(model):
    """The model; its gradients averaged over the processes if there are several. BatchNorm sees a process's own rows on
    CPUs, and on GPUs those of all."""
    if not dist.is_initialized():
        return model
    on_gpu = next(model.parameters()).is_cuda
    return nn.parallel.DistributedDataParallel(nn.SyncBatchNorm.convert_sync_batchnorm(model) if on_gpu else model)


@contextlib.contextmanager
def processes(s):
    """Under torchrun: joins the group, one process per device. Alone: nothing. Yields the settings."""
    if "WORLD_SIZE" not in os.environ:
        yield s
        return
    ranks, cuda = int(os.environ["WORLD_SIZE"]), s.device.startswith("cuda")
    if s.batch_size % ranks or s.malicious_rows % ranks:
        raise ValueError(f"--batch-size {s.batch_size} and --malicious-rows {s.malicious_rows} must be multiples of "
                         f"the {ranks} processes")
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(minutes=30))
    if cuda:
        s = replace(s, device=f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(s.device)
    try:
        yield s
    finally:
        dist.destroy_process_group()


# ----- Arithmetic, compiling and memory

def usable(device):
    """The device's name (auto: cuda if there is one), checked by putting a number there. Raises ValueError."""
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        torch.zeros(1, device=device).item()
    except Exception as error:      # torch has many: runtime, assertion, import and other errors
        raise ValueError(f"--device {device} is not usable here ({' '.join(str(error).split())[:150]})") from None
    return device


def name_of(device):
    return f"{device}, {torch.cuda.get_device_name(device)}" if device.startswith("cuda") else device


def has_bf16(device):
    return device.startswith("cuda") and torch.cuda.is_bf16_supported()


def autocast(s, **options):
    """bfloat16 arithmetic where the settings say so. The neuron itself always computes in float32."""
    return torch.autocast(torch.device(s.device).type, torch.bfloat16, enabled=bool(s.bf16), **options)


logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)     # warns of CUDA files beside no GPU
_compiling = dict(wanted=False, possible=os.environ.get("BADSNN_COMPILE", "1") != "0")


@contextlib.contextmanager
def compiling(wanted):
    """Inside, functions made by `compiled` are compiled, if wanted: compiling takes seconds to minutes, once."""
    before, _compiling["wanted"] = _compiling["wanted"], wanted
    try:
        yield
    finally:
        _compiling["wanted"] = before


def compiled(function):
    """The function under torch.compile inside `compiling`; as it is elsewhere, where compiling fails (no C++ compiler,
    say; said once), and inside somebody's own torch.compile."""
    made = []

    def run(*args):
        if not (_compiling["wanted"] and _compiling["possible"]) or torch.compiler.is_compiling():
            return function(*args)
        try:
            if not made:
                torch._dynamo.config.recompile_limit = 64       # a graph for every T, dtype and layout
                made.append(torch.compile(function, dynamic=True))
            return made[0](*args)
        except Exception as error:
            result = function(*args)        # raises as well if the arguments are to blame, not the compiler
            _compiling["possible"] = False
            warnings.warn(f"torch.compile fails here ({error!r:.99}); the neuron runs uncompiled, slower")
            return result
    return run


def keep_memory():
    """Tells glibc to keep freed memory instead of handing it back at every step: up to 1.6x faster on a CPU."""
    with contextlib.suppress(OSError, AttributeError):          # another system, another C library
        libc = ctypes.CDLL("libc.so.6")
        # M_MMAP_THRESHOLD first: old ones refuse more than 32 MiB, and M_TRIM_THRESHOLD alone would make it slower
        if libc.mallopt(-3, 2 ** 31 - 1) or libc.mallopt(-3, 2 ** 25):
            libc.mallopt(-1, 2 ** 31 - 1)
