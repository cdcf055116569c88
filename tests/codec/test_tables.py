from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ldm_vae.codec.codec import LatentCodec
from ldm_vae.codec.tables import load_tables
from ldm_vae.errors import ModelError


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"channels": (0, 0, 1, 2)}, "channels"),
        ({"channels": (0, 1, 2, 9)}, "channels"),
        ({"channels": (0, 1, 2)}, "channels"),
        ({"steps": (128, 512, 256)}, "steps"),
        ({"means": np.zeros(3)}, "means"),
        ({"means": np.array([0, 0, 0, np.nan])}, "finite"),
        ({"sigma": np.zeros(4)}, "above 0"),
    ],
)
def test_tables_that_contradict_each_other_are_refused(
    changes: dict[str, Any], said: str, codec: LatentCodec, tmp_path: Path
) -> None:
    """With the digest that fits them: as somebody would write them who wants to do harm."""
    replace(codec.tables, **changes).save(tmp_path)
    with pytest.raises(ModelError, match=said):
        load_tables(tmp_path)


def test_tables_of_another_version_say_how_to_make_them_anew(codec: LatentCodec, tmp_path: Path) -> None:
    codec.tables.save(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format_version": 1}))
    with pytest.raises(ModelError, match=r"version 1.*fit-codec"):
        load_tables(tmp_path)
