"""The fuzzer of the codec, with few files. `python -m tests.endurance.fuzzing.codec` takes 100,000."""

from __future__ import annotations

from pathlib import Path

from tests.endurance.fuzzing.codec import fuzz, fuzz_tables, untrained_codec


def test_no_mutated_file_gives_a_wrong_picture() -> None:
    outcome = fuzz(*untrained_codec(), count=2000, seed=0)
    assert outcome["wrong"] == outcome["crashed"] == outcome["slow"] == []
    assert outcome["refused"] > 1500
    assert outcome["past the checksums"] > 300  # many mutations come with checksums that are right


def test_no_mutated_tables_code_symbols_that_do_not_come_back(tmp_path: Path) -> None:
    codec, _ = untrained_codec()
    outcome = fuzz_tables(codec.tables, count=300, seed=0, folder=tmp_path)
    assert outcome["wrong"] == outcome["crashed"] == outcome["slow"] == []
    assert 100 < outcome["refused"] < 300
