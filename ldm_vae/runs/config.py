"""Configurations: frozen dataclasses on the command line and in `config.json`."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, get_type_hints

import tyro

from ldm_vae.errors import ConfigError

Config = TypeVar("Config")


@dataclass(frozen=True, kw_only=True)
class Range:
    """The numbers that a flag may have, beside its default: `steps: Annotated[int, Range(at_least=1)] = 100`."""

    at_least: float = -math.inf
    above: float = -math.inf
    at_most: float = math.inf
    below: float = math.inf

    def holds(self, value: float) -> bool:
        inside = self.at_least <= value <= self.at_most and self.above < value < self.below
        return math.isfinite(value) and inside

    def __str__(self) -> str:
        bounds = {"at least": self.at_least, "more than": self.above, "at most": self.at_most, "less than": self.below}
        named = [f"{words} {bound:g}" for words, bound in bounds.items() if math.isfinite(bound)]
        return " and ".join(named) or "a number"


def check_ranges(config: Any) -> None:
    """Raises ConfigError for the first field of a dataclass, or number of a tuple, outside its Range; None passes."""
    for name, hint in get_type_hints(type(config), include_extras=True).items():
        for bounds in (m for m in getattr(hint, "__metadata__", ()) if isinstance(m, Range)):
            value = getattr(config, name)
            numbers = () if value is None else value if isinstance(value, tuple) else (value,)
            if not all(bounds.holds(number) for number in numbers):
                raise ConfigError(f"--{name.replace('_', '-')} is {value}: it must be {bounds}")


def parse_config(
    presets: Mapping[str, tuple[str, Config]], *, description: str, args: Sequence[str] | None = None
) -> Config:
    """`PRESET --flag value ...` -> the preset's configuration with the flags put in.

    Args:
        presets: name -> (one line of help, configuration).
        args: the command line; sys.argv's unless given.

    Raises:
        ConfigError: what tyro did not accept, in one line.
    """
    with tyro_errors():
        return tyro.extras.overridable_config_cli(dict(presets), description=description, args=args)


def parse_flags(config_class: type[Config], *, description: str, args: Sequence[str] | None = None) -> Config:
    """`--flag value ...` -> a configuration, for scripts without presets. Raises ConfigError like `parse_config`."""
    with tyro_errors():
        return tyro.cli(config_class, description=description, args=args)


@contextlib.contextmanager
def tyro_errors() -> Iterator[None]:
    """Turns tyro's framed page about a wrong flag into a ConfigError of one line; --help passes through."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            yield
    except SystemExit as exit_:
        if not exit_.code:
            raise
        text = re.sub(r"\x1b\[[0-9;]*m|[\u2500-\u257f]", " ", said.getvalue())  # without colours and boxes
        raise ConfigError(" ".join(text.split())) from None


def as_json(config: Any) -> dict[str, Any]:
    """A dataclass as what JSON gives back: tuples as lists, paths as strings."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    return plain


def differences(saved: Mapping[str, Any], config: Any, *, free: Sequence[str]) -> list[str]:
    """`field: saved -> now` for each field of a configuration that changed, those in `free` left out.

    A field that there was not when it was saved has its default.
    """
    now = as_json(config)
    defaults = {f.name: f.default for f in dataclasses.fields(config) if f.default is not dataclasses.MISSING}
    saved = json.loads(json.dumps(defaults, default=str)) | dict(saved)
    keys = [k for k in sorted({*saved, *now}) if k not in free and saved.get(k) != now.get(k)]
    return [f"{k}: {saved.get(k)} -> {now.get(k)}" for k in keys]
