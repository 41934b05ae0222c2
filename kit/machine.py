"""Processes and devices: models trained side by side, one model trained by several processes, compiling, memory."""
import contextlib
import ctypes
import functools
import logging
import multiprocessing
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from tqdm.auto import tqdm

_worker = {}        # in a worker: the name of the job whose lines it prints


def say(line):
    """Prints, in rank 0 only; in a worker behind the name of its job."""
    if rank() == 0:
        print(f"{_worker['name']:<22} {line}" if _worker else line, flush=True)


def side_by_side(function, jobs, s):
    """[function(*job) for job in jobs] in as many processes as there are jobs and cores; on a GPU in s.processes (none:
    in order). function, jobs: picklable. Raises what a job raises; a killed worker ends the others: ValueError."""
    at_once = s.processes or (1 if s.device.startswith("cuda") else cores())
    workers = min(len(jobs), at_once)
    if workers < 2 or dist.is_initialized():
        return [function(*job) for job in jobs]
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, [workers])
    try:
        tasks = [pool.submit(_run_job, function, job) for job in jobs]
        pool.submit(int)        # wakes the pool, which otherwise may not watch its last worker
        return [task.result() for task in tasks]
    except BrokenProcessPool:
        raise ValueError("a worker ended early: out of memory (the same command goes on after the last epoch), or the "
                         "program is no file with commands below if __name__ == '__main__': (processes=1)") from None
    finally:
        for process in list((pool._processes or {}).values()):      # after an error or Ctrl-C they would train on
            process.kill()
        pool.shutdown(cancel_futures=True)


def _start_worker(workers):
    """Ctrl-C is the parent's business; the end of the parent, kill -9 included, is the end of this process."""
    set_threads(workers)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    tqdm.set_lock(threading.RLock())        # its default is a semaphore, which a killed process would leave behind
    keep_memory()

    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)
    threading.Thread(target=end_with_parent, daemon=True).start()


def _run_job(function, job):
    words = [f"seed {part.seed}" if hasattr(part, "seed") else part for part in job]
    _worker["name"] = " ".join(word for word in words if isinstance(word, str))
    return function(*job)


def set_threads(processes=1):
    """Unless OMP_NUM_THREADS says how many: one (a busy neighbour on one core stops all), or four and more."""
    each = cores() // processes
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(each if each >= 4 else 1)


def cores():
    """How many cores this process may use: its affinity, or the quota of its container (cgroup's cpu.max)."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):          # no such file; "max": no quota
        quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text().split())
        allowed = min(allowed, -(-quota // period))         # rounded up
    return max(1, allowed)


# ----- One model by several processes of one host (torchrun); only rank 0 prints and writes

def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def share(rows):        # this process's part of a batch's rows
    return rows[rank()::dist.get_world_size()] if dist.is_initialized() else rows


def wait_for_all():     # or a process may read what rank 0 has not written yet
    if dist.is_initialized():
        dist.barrier()


def data_parallel(model):
    """The model, its gradients averaged over the processes; BatchNorm sees the rows of all only on GPUs."""
    if not dist.is_initialized():
        return model
    if next(model.parameters()).is_cuda:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return nn.parallel.DistributedDataParallel(model)


@contextlib.contextmanager
def processes(s):
    """Yields the settings. Under torchrun it joins the group first, one process per device. Raises ValueError."""
    ranks, cuda = int(os.environ.get("WORLD_SIZE", 1)), s.device.startswith("cuda")
    if s.batch_size % ranks or s.malicious_rows % ranks:
        raise ValueError(f"--batch-size {s.batch_size}, --malicious-rows {s.malicious_rows}: no multiples of {ranks}")
    if ranks > 1:
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(minutes=30))
        s = replace(s, device=f"cuda:{os.environ['LOCAL_RANK']}") if cuda else s
    try:
        yield s
    finally:
        if ranks > 1:
            dist.destroy_process_group()


def usable(device):
    """The device's name (auto: cuda if there is one), checked by putting a number there. Raises ValueError."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=device).item()
    except Exception as error:      # torch has many: runtime, assertion, import and other errors
        raise ValueError(f"--device {device} is not usable here ({' '.join(str(error).split())[:150]})") from None
    return device


def has_bf16(device):
    return device.startswith("cuda") and torch.cuda.is_bf16_supported()


def autocast(s, **options):
    """bfloat16 arithmetic where the settings say so. The neuron itself always computes in float32."""
    return torch.autocast(torch.device(s.device).type, torch.bfloat16, enabled=bool(s.bf16), **options)


# warnings of CUDA files beside no GPU, and of a missing C++ compiler, without which the neuron runs as it is written
for _name in ("torch.utils.cpp_extension", "torch._dynamo"):
    logging.getLogger(_name).setLevel(logging.ERROR)
_compiling = dict(wanted=False)


@contextlib.contextmanager
def compiling(wanted):
    """Inside, functions made by `compiled` are compiled, if wanted: it takes seconds to minutes, once."""
    before, _compiling["wanted"] = _compiling["wanted"], wanted
    try:
        yield
    finally:
        _compiling["wanted"] = before


def compiled(function):
    """The function under torch.compile inside `compiling`; as it is elsewhere, inside somebody's own torch.compile, and
    where compiling fails (no C++ compiler, say)."""
    @functools.cache
    def fast():
        torch._dynamo.config.recompile_limit = 64       # a graph for every T, dtype and layout
        torch._dynamo.config.suppress_errors = True
        return torch.compile(function, dynamic=True)

    def run(*args):
        wanted = _compiling["wanted"] and not torch.compiler.is_compiling()
        return (fast() if wanted else function)(*args)
    return run


def keep_memory():
    """Tells glibc to keep freed memory instead of handing it back at every step: up to 1.6x faster on a CPU."""
    with contextlib.suppress(OSError, AttributeError):          # another system, another C library
        libc = ctypes.CDLL("libc.so.6")
        # M_MMAP_THRESHOLD first: old ones refuse more than 32 MiB, and M_TRIM_THRESHOLD alone would make it slower
        if libc.mallopt(-3, 2 ** 31 - 1) or libc.mallopt(-3, 2 ** 25):
            libc.mallopt(-1, 2 ** 31 - 1)
