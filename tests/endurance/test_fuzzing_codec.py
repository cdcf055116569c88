"""Mutated files: an error of ours, or the very picture; never another one, a crash or a hang.

`tests/endurance/fuzzing/codec.py` does the same 100,000 times.
"""

from __future__ import annotations

from ldm_vae.codec.codec import LatentCodec
from tests.endurance.fuzzing.codec import fuzz


def test_no_mutated_file_gives_a_wrong_picture(codec: LatentCodec, photo) -> None:
    outcome = fuzz(codec, photo, count=2000, seed=0)
    assert outcome["wrong"] == outcome["crashed"] == outcome["slow"] == []
    assert outcome["refused"] > 1500
    assert outcome["past the checksums"] > 300  # many mutations come with checksums that are right
