from __future__ import annotations

import statistics
import time

import pytest
import torch

from ldm_vae.timing import peak_flops, peak_memory_of, seconds_of

CPU = torch.device("cpu")


def test_durations_are_those_of_the_calls_after_the_warm_up() -> None:
    calls = []

    def call() -> None:
        time.sleep(0.2 if len(calls) < 2 else 0.02)
        calls.append(1)

    durations = seconds_of(call, device=CPU, seconds=0.1)
    assert len(calls) == len(durations) + 2
    assert len(durations) >= 3
    assert all(0.02 <= d < 0.1 for d in durations)


@pytest.mark.parametrize("mebibytes", [32, 256])
def test_peak_memory_is_what_a_call_takes_beyond_what_was_held(mebibytes: int) -> None:
    held = torch.ones(64 * 2**18)  # 64 MiB, before and after

    def call() -> None:
        torch.ones(mebibytes * 2**18).sum()

    call()
    measured = peak_memory_of(call, device=CPU)
    if measured is None:
        pytest.skip("/proc cannot be read here")
    assert measured / 2**20 == pytest.approx(mebibytes, rel=0.2, abs=4)
    assert held.sum() == 64 * 2**18


def test_the_peak_is_at_least_that_of_one_product() -> None:
    flops = peak_flops(CPU, torch.float32, seconds=0.2)
    a = torch.randn(512, 512)
    durations = seconds_of(lambda: a @ a, device=CPU, seconds=0.2)
    assert flops > 0.3 * 2 * 512**3 / statistics.median(durations)
