"""plumbing/device.py: precision by processor, and threads on a machine that others use as well."""
import pytest
import torch

from plumbing import device as device_file
from plumbing.device import CoreWatch, pick_dtype, pick_threads

CPU = torch.device("cpu")


@pytest.fixture
def two_threads(monkeypatch):
    """Two cores, whatever this machine has; after the test as many threads as before."""
    monkeypatch.setattr(device_file, "ALL_THREADS", 2)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def speeds(monkeypatch, by_threads: dict[int, float]) -> None:
    """So many matmuls a second with so many threads."""
    monkeypatch.setattr(device_file, "small_matmuls_per_second",
                        lambda seconds: by_threads[torch.get_num_threads()])


@pytest.mark.parametrize("capability, has_bf16, dtype", [
    ("AVX512", True, torch.bfloat16), ("AVX512", False, torch.float32),
    ("AVX2", True, torch.float32)])                 # ATEN_CPU_CAPABILITY=avx2 on a newer processor
def test_auto_is_bfloat16_only_where_the_processor_multiplies_it(monkeypatch, capsys, capability,
                                                                 has_bf16, dtype):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bf16)
    assert pick_dtype("auto", CPU) == dtype
    assert capsys.readouterr().err == ""
    assert pick_dtype("bfloat16", CPU) == torch.bfloat16
    warned = "ten times slower" in capsys.readouterr().err
    assert warned == (dtype == torch.float32)


def test_a_busy_machine_is_computed_on_with_fewer_threads(monkeypatch, two_threads):
    speeds(monkeypatch, {2: 25, 1: 1200})
    said = pick_threads(CPU)
    assert torch.get_num_threads() == 1
    assert "1 of 2 threads compute, which is 48.0 times as fast" in said
    assert pick_threads(CPU) == "" and torch.get_num_threads() == 1      # nothing has changed
    speeds(monkeypatch, {2: 4900, 1: 2700})
    assert pick_threads(CPU) == "all 2 threads compute again" and torch.get_num_threads() == 2


def test_a_small_gain_is_taken_for_noise(monkeypatch, two_threads):
    speeds(monkeypatch, {2: 1000, 1: 1200})
    assert pick_threads(CPU) == "" and torch.get_num_threads() == 2


def test_a_number_of_threads_that_the_user_gave_is_obeyed_untried(monkeypatch, two_threads):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    speeds(monkeypatch, {})
    assert pick_threads(CPU) == "" and torch.get_num_threads() == 2


def test_the_trial_counts_matmuls():
    assert device_file.small_matmuls_per_second(0.01) > 10


def changed(monkeypatch, passed: float, processor: float) -> bool:
    """What the watch says after so many seconds, and so many of processor time."""
    clock = [0.0]
    busy = [0.0]
    monkeypatch.setattr(device_file.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(device_file.time, "process_time", lambda: busy[0])
    cores = CoreWatch(CPU)
    clock[0] = passed
    busy[0] = processor
    return cores.has_changed()


def test_a_run_notices_that_cores_are_taken_away_or_may_be_free_again(monkeypatch, two_threads):
    assert changed(monkeypatch, 10.0, 12.0)              # 1.2 of 2 cores
    assert not changed(monkeypatch, 10.0, 19.9)          # a quiet machine
    assert not changed(monkeypatch, 3.0, 1.0)            # too early to tell
    torch.set_num_threads(1)
    assert not changed(monkeypatch, 10.0, 5.0)           # nobody waits for a single thread
    assert changed(monkeypatch, 31.0, 31.0)              # time to try two again
