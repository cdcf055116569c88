"""Configurations: frozen dataclasses on the command line and in `config.json`. No torch here."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import tyro

from ldm_vae.data.reader import ReadOptions
from ldm_vae.data.workers import default_workers
from ldm_vae.errors import ConfigError, RunError

Reading = tyro.conf.OmitArgPrefixes[ReadOptions]
"""Flags of all that reads images."""
Config = TypeVar("Config")
MixedPrecision = Literal["auto", "no", "bf16"]
PRESET_FIELDS = ("architecture", "denoiser")
"""A trainer's configuration has one of them, which is the name of its preset."""
OF_ONE_RUN = ("output", "extend", "like")
"""Fields that another run does not take over."""


@dataclass(frozen=True, kw_only=True)
class Range:
    """The values that a flag may take, beside its default: `steps: Annotated[int, Range(at_least=1)] = 100`."""

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


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Flags of every trainer. Each trainer extends it in a straight line, with a `check` that calls its parent's."""

    output: Path = tyro.MISSING
    """Run directory; the same command again resumes it."""
    like: Path | None = None
    """Take the settings of this run, and its preset; a flag that is given wins."""
    seed: int = 0
    steps: Annotated[int, Range(at_least=1)] = 100_000
    """Optimizer steps."""
    extend: bool = False
    """Train a run that was begun with fewer --steps on, at the learning rate of the longer schedule."""
    batch_size: Annotated[int, Range(at_least=1)] = 32
    """Images a step, over all processes and micro-batches."""
    gradient_accumulation_steps: Annotated[int, Range(at_least=1)] = 1
    """Micro-batches a step in each process."""
    learning_rate: Annotated[float, Range(above=0)] = 2e-4
    """Absolute: not scaled with the batch or the processes."""
    warmup_steps: tyro.conf.Suppress[Annotated[int, Range(at_least=0)]] = 100
    """Steps of linear warm-up; a cosine to zero follows."""
    max_grad_norm: tyro.conf.Suppress[Annotated[float, Range(above=0)]] = 1.0
    ema_decay: tyro.conf.Suppress[Annotated[float, Range(at_least=0, below=1)]] = 0.999
    mixed_precision: MixedPrecision = "auto"
    """Of autocast. auto: bf16 where the device computes it fast, float32 elsewhere; a resumed run keeps its own."""
    gradient_checkpointing: bool = False
    compile: bool = False
    """torch.compile the network."""
    num_workers: Annotated[int | None, Range(at_least=0)] = None
    """Processes that decode images, for each training process; up to 8, as the cores allow, unless given."""
    log_every: Annotated[int, Range(at_least=1)] = 20
    sample_every: Annotated[int, Range(at_least=1)] = 500
    checkpoint_every: Annotated[int, Range(at_least=1)] = 500
    tracker: str = "tensorboard"
    """Any that Accelerate knows by name (tensorboard, wandb, ...), or none; metrics.jsonl is always written."""

    def check(self, num_processes: int) -> None:
        """Raises ConfigError for flags that cannot work, alone or together."""
        check_ranges(self)
        parts = num_processes * self.gradient_accumulation_steps
        if self.batch_size % parts:
            raise ConfigError(
                f"batch size {self.batch_size} is not a multiple of {num_processes} processes x "
                f"{self.gradient_accumulation_steps} micro-batches: try {-(-self.batch_size // parts) * parts}"
            )

    @property
    def loader_processes(self) -> int:
        """Of --num-workers."""
        return default_workers() if self.num_workers is None else self.num_workers

    def effective_batch(self, num_processes: int) -> str:
        micro = self.gradient_accumulation_steps
        return (
            f"effective batch {self.batch_size} = {num_processes} processes x "
            f"{self.batch_size // num_processes // micro} images x {micro} micro-batches, "
            f"learning rate {self.learning_rate:g} as given"
        )


def parse_config(
    presets: Mapping[str, tuple[str, Config]], *, description: str, args: Sequence[str] | None = None
) -> Config:
    """`PRESET --flag value ...` -> the preset's configuration with these flags changed.

    With `--like RUN` it is the run's configuration, and PRESET may be left out.

    Args:
        presets: name -> (one line of help, configuration).
        args: the command line; sys.argv's unless given.

    Raises:
        ConfigError: what tyro rejects, in one line; or a run that is none of these presets'.
        RunError: a run whose configuration cannot be read.
    """
    args = list(sys.argv[1:] if args is None else args)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--like")
    with tyro_errors():
        run = parser.parse_known_args(args)[0].like
    if run is not None:
        name, config = config_like(Path(run), presets, args)
        if args[0] not in presets:
            args = [name, *args]
        if args[0] != name:
            raise ConfigError(f"--like {run} is a run of {name}, not of {args[0]}: leave out one of the two")
        presets = {**presets, name: (presets[name][0], config)}
    with tyro_errors():
        return tyro.extras.overridable_config_cli(dict(presets), description=description, args=args)


def config_like(run: Path, presets: Mapping[str, tuple[str, Config]], args: Sequence[str]) -> tuple[str, Config]:
    """The preset of a run, and its configuration with the run's settings, but for those that the command line names.

    Settings that a configuration no longer has, or values that it no longer takes, are named and left out.

    Raises:
        ConfigError: there is no run, or one of another trainer.
        RunError: its configuration cannot be read.
    """
    saved = saved_config(run)
    if saved is None:
        raise ConfigError(f"--like {run}: there is no run")
    any_config = next(config for _, config in presets.values())
    name = next(str(saved.get(field)) for field in PRESET_FIELDS if hasattr(any_config, field))
    if name not in presets:
        raise ConfigError(f"--like {run} is no run of this trainer, whose presets are {', '.join(presets)}")
    left_out: list[str] = []
    given = {word.partition("=")[0].removeprefix("--").replace("-", "_") for word in args if word.startswith("--")}
    taken = {field: value for field, value in saved.items() if field not in {*OF_ONE_RUN, *given}}
    config = with_saved(presets[name][1], taken, left_out)
    if left_out:
        print(f"--like {run}: left out, as they are no longer there: {', '.join(left_out)}", file=sys.stderr)
    return name, config


def with_saved(config: Any, saved: Mapping[str, Any], left_out: list[str]) -> Any:
    """A dataclass with the values that were saved of it in JSON's types; `left_out` takes what does not fit."""
    hints, values = get_type_hints(type(config)), {}
    for name, value in saved.items():
        hint = hints.get(name)
        choices = get_args(hint)
        if hint is None or (get_origin(hint) is Literal and value not in choices):
            left_out.append(f"{name} {value}")
        elif isinstance(value, dict):
            values[name] = with_saved(getattr(config, name), value, left_out)
        elif isinstance(value, list):
            values[name] = tuple(value)
        elif isinstance(value, str) and get_origin(hint) is tuple:
            values[name] = (value,)
        else:
            values[name] = Path(value) if isinstance(value, str) and Path in choices else value
    return dataclasses.replace(config, **values)


def parse_flags(config_class: type[Config], *, description: str, args: Sequence[str] | None = None) -> Config:
    """`--flag value ...` -> a configuration, for scripts without presets. Raises ConfigError like `parse_config`."""
    with tyro_errors():
        return tyro.cli(config_class, description=description, args=args)


@contextlib.contextmanager
def tyro_errors() -> Iterator[None]:
    """Turns tyro's framed page about a wrong flag into a ConfigError of one line; --help passes through."""
    page = io.StringIO()
    try:
        with contextlib.redirect_stderr(page):
            yield
    except SystemExit as exit_:
        if not exit_.code:
            raise
        text = re.sub(r"\x1b\[[0-9;]*m|[\u2500-\u257f]", " ", page.getvalue())  # without colours and boxes
        message = text.strip().partition("\n")[2]  # its first line is the title, which the message repeats
        raise ConfigError(" ".join(message.split())) from None


def saved_config(directory: Path) -> dict[str, Any] | None:
    """The configuration that a run was begun with; None where no run has begun. Raises RunError for a damaged file."""
    file = directory / "config.json"
    if not file.exists():
        return None
    try:
        return dict(json.loads(file.read_text())["config"])
    except (ValueError, KeyError, TypeError):
        raise RunError(f"{file} is not a run's configuration: choose another folder") from None


def as_json(config: Any) -> dict[str, Any]:
    """A dataclass in JSON's types: tuples as lists, paths as strings."""
    return dict(json.loads(json.dumps(dataclasses.asdict(config), default=str)))


def differences(saved: Mapping[str, Any], config: Any, *, free: Sequence[str]) -> list[str]:
    """`field: saved -> now` for each field of a configuration that changed, but for those in `free`.

    A field that did not exist when it was saved counts as its default, and a text where there is a list now as a list
    of one.
    """
    now = as_json(config)
    defaults = {f.name: f.default for f in dataclasses.fields(config) if f.default is not dataclasses.MISSING}
    plain = {name: as_json(v) if dataclasses.is_dataclass(v) else v for name, v in defaults.items()}
    saved = json.loads(json.dumps(plain, default=str)) | dict(saved)
    saved = {k: [v] if isinstance(v, str) and isinstance(now.get(k), list) else v for k, v in saved.items()}
    keys = [k for k in sorted({*saved, *now}) if k not in free and saved.get(k) != now.get(k)]
    return [f"{k}: {saved.get(k)} -> {now.get(k)}" for k in keys]
