from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import many_samples


def test_a_large_index_is_read_from_its_begin_and_far_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(many_samples, "IMAGES", 20)
    config = many_samples.Config(output=tmp_path, samples=5000, num_workers=1)
    many_samples.make_index(config)
    for position in (0, 10**11):
        found = many_samples.measure(config, position)
        assert found["samples"] == 5000
        assert found["first"] == position
        assert 0 < found["worker_private_mib"] < found["worker_share_mib"] < found["worker_resident_mib"]
        assert found["worker_resident_mib"] < 300e6 / 2**20
        assert found["first_batch_seconds"] < 60
