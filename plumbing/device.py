"""
Where a run computes, in which precision, and on how many cores.
"""
import os
import sys
import time

import torch

ALL_THREADS = torch.get_num_threads()                  # before anything has changed their number
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str) -> torch.device:
    """auto: a GPU where there is one. Under torchrun each process takes the GPU of its rank."""
    if name == "auto":
        name = "cpu"
        if torch.backends.mps.is_available():
            name = "mps"
        if torch.cuda.is_available():
            name = "cuda"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.empty(0, device=name).device
        if device.type == "cuda":
            torch.cuda.set_device(device)              # because Triton launches its kernels there
        return device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        # torch's own message runs over many lines of which the first names the problem
        raise ValueError(f"--device {name}: {reason}; give auto, cpu, cuda, cuda:N or "
                         "mps") from error


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """auto: bfloat16 where the hardware multiplies it, float16 on older GPUs, else float32."""
    if name == "auto":
        name = "float32"
        if device.type == "cuda":
            # a T4, say, emulates bfloat16 slowly and multiplies float16 fast
            fast_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
            name = "bfloat16" if fast_bf16 else "float16"
        elif device.type == "cpu" and cpu_multiplies_bfloat16():
            name = "bfloat16"
    if name not in DTYPES:
        raise ValueError(f"--dtype {name}: give auto, {', '.join(DTYPES)}")
    if name == "float16" and device.type != "cuda":
        raise ValueError(f"--dtype float16 needs a GPU (its loss scaling does), not {device.type}; "
                         "give auto, float32 or bfloat16")
    if name == "bfloat16" and device.type == "cpu" and not cpu_multiplies_bfloat16():
        print("--dtype bfloat16: this processor has no AVX512-BF16 and emulates it, about ten "
              "times slower than float32; give --dtype auto or float32", file=sys.stderr)
    return DTYPES[name]


def cpu_multiplies_bfloat16() -> bool:
    """False also where the environment (ATEN_CPU_CAPABILITY=avx2) takes AVX512 away."""
    has_avx512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return has_avx512 and torch.cpu._is_avx512_bf16_supported()


def peak_memory(device: torch.device) -> int:
    """Bytes held at most so far: allocated on the GPU, resident of the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:                               # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# ---------------------------------------------------------------------- cores

def pick_threads(device: torch.device, seconds: float = 0.1) -> str:
    """Compute with fewer threads where all of them are slower, because other processes need the
    cores: a thread that waits for its turn holds up all others. Returns what was changed, for the
    reader; "" where nothing was.

    seconds: how long each number of threads is tried. OMP_NUM_THREADS in the environment is obeyed
    untried.
    """
    n = ALL_THREADS
    before = torch.get_num_threads()
    if device.type != "cpu" or n == 1 or "OMP_NUM_THREADS" in os.environ:
        return ""
    # on a machine with nothing else to do, more threads win by far
    speeds = {}
    for threads in sorted({n, n - 1, max(1, n // 2), 1}, reverse=True):
        torch.set_num_threads(threads)
        speeds[threads] = small_matmuls_per_second(seconds)
    best = max(speeds, key=speeds.get)
    # a quarter faster at least, because a short trial is noisy
    if speeds[best] < 1.25 * speeds[n]:
        best = n
    torch.set_num_threads(best)
    if best == before:
        return ""
    if best == n:
        return f"all {n} threads compute again"
    return (f"other processes are busy: {best} of {n} threads compute, which is "
            f"{speeds[best] / speeds[n]:.1f} times as fast; OMP_NUM_THREADS={n} insists on all")


def small_matmuls_per_second(seconds: float) -> float:
    """Of the size of a small model's, after each of which all threads wait for the last one."""
    x = torch.full((1024, 128), 0.01)
    w = torch.full((128, 128), 0.01)
    n = 0
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        (x @ w).relu_()
        n += 1
    return n / (time.perf_counter() - start)


class CoreWatch:
    """Notices, while a run goes on, that other processes take cores away from it, or may have given
    them back.

    On a quiet machine the processor time of all threads is their number times the time that
    passes, because a thread that waits for the others spins.
    """

    def __init__(self, device: torch.device):
        self.on_cpu = device.type == "cpu"
        self.restart()

    def restart(self) -> None:
        self.clock = time.perf_counter()
        self.processor = time.process_time()

    def share(self) -> float:
        """Processor time per thread and time that passed, since the restart: 1 on a quiet
        machine."""
        passed = time.perf_counter() - self.clock
        return (time.process_time() - self.processor) / passed / torch.get_num_threads()

    def has_changed(self) -> bool:
        """Whether it is time to pick the number of threads again: after five seconds with less than
        three quarters of the cores, or half a minute with fewer threads than there are. Five
        seconds with all of them begin a new count, because old ones would hide a change."""
        passed = time.perf_counter() - self.clock
        n = torch.get_num_threads()
        if not self.on_cpu or passed < 5:
            return False
        # a single thread is slowed down by others, but waits for none
        if n > 1 and self.share() < 0.75:
            return True
        if n == ALL_THREADS:
            self.restart()
        return n < ALL_THREADS and passed > 30
