"""The steps of a training run: resumed where it stood, logged, saved, stopped by a signal, led back from NaNs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
import tyro
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from tqdm import tqdm

from ldm_vae.errors import ConfigError, RunError
from ldm_vae.files import digest_of_json
from ldm_vae.runs.config import Range, check_ranges
from ldm_vae.runs.run import Run, StopSignal
from ldm_vae.runs.state import Part, load_state
from ldm_vae.runs.step import learning_rate_at

FREE_ON_RESUME = (
    *("gradient_accumulation_steps", "num_workers", "cache_gib", "gradient_checkpointing", "compile"),
    *("log_every", "sample_every", "checkpoint_every", "tracker", "output"),
)
"""Fields that a resumed run may change: no result depends on them beyond rounding."""

FIRST_GRIDS = (10, 100)
UNHEALTHY_LIMIT = 3
Batch = TypeVar("Batch")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Flags of every trainer. Each trainer extends it in a straight line, with a `check` that calls its parent's."""

    output: Path = tyro.MISSING
    """Run directory; the same command again resumes it."""
    seed: int = 0
    steps: Annotated[int, Range(at_least=1)] = 100_000
    """Optimizer steps."""
    batch_size: Annotated[int, Range(at_least=1)] = 32
    """Images a step, over all processes and micro-batches."""
    gradient_accumulation_steps: Annotated[int, Range(at_least=1)] = 1
    """Micro-batches a step in each process."""
    learning_rate: Annotated[float, Range(above=0)] = 2e-4
    """Absolute: not scaled with the batch or the processes."""
    warmup_steps: Annotated[int, Range(at_least=0)] = 100
    """Steps of linear warm-up; a cosine to zero follows."""
    max_grad_norm: Annotated[float, Range(above=0)] = 1.0
    ema_decay: Annotated[float, Range(at_least=0, below=1)] = 0.999
    mixed_precision: Literal["no", "bf16"] = "bf16"
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

    def accelerator(self) -> Accelerator:
        """Raises ConfigError for a launch that nothing here was written for."""
        accelerator = Accelerator(
            gradient_accumulation_steps=self.gradient_accumulation_steps,
            mixed_precision=self.mixed_precision,
            log_with=None if self.tracker == "none" else self.tracker,
            project_dir=self.output,
        )
        if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
            raise ConfigError("FSDP 1 cannot be used: launch with configs/fsdp_unet.yaml, which is FSDP 2")
        slow = accelerator.device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2"
        if slow and self.mixed_precision == "bf16":
            accelerator.print("note: bf16 is very slow on a CPU without AVX-512: add --mixed-precision no")
        return accelerator

    def effective_batch(self, num_processes: int) -> str:
        micro = self.gradient_accumulation_steps
        return (
            f"effective batch {self.batch_size} = {num_processes} processes x "
            f"{self.batch_size // num_processes // micro} images x {micro} micro-batches, "
            f"learning rate {self.learning_rate:g} as given"
        )


class Loop:
    """Where a run stands: the step to go on from, the facts so far, and what is due after each step.

    ```
    with Loop(run, state.parts(), config, accelerator) as loop:
        for step, batches in loop.steps(lambda step: batches_from(step, ...)):
            result = train_step(batches, ...)
            loop.finish(healthy=..., waited=..., bad_images=...)
            if loop.logging: ...
    ```

    Args:
        parts: what a checkpoint holds; the newest whole one is put into them.
        made_from: what a run must find unchanged when it is resumed, such as fingerprints; as JSON gives it back.

    Raises:
        RunError: none of the checkpoints is whole, it was made from something else, or other processes see another
            one; or, while stepping, losses that stay not finite.
    """

    def __init__(
        self,
        run: Run,
        parts: Mapping[str, Part],
        config: RunConfig,
        accelerator: Accelerator,
        *,
        made_from: Mapping[str, Any] | None = None,
    ) -> None:
        self.run, self.parts, self.config, self.accelerator = run, parts, config, accelerator
        self.made_from = dict(made_from or {})
        self.step = 0
        self.facts: dict[str, Any] = {"seconds": 0.0, "skipped_steps": 0, "made_from": self.made_from}
        if not self.resume():
            self.run.forget_after(0)
        self.stopping = self.logging = self.drawing = self.saving = False
        self.waited, self.unhealthy_in_a_row, self.gone_back = 0.0, 0, False
        self.logged_at = (self.step, self.facts["seconds"])
        self.bad_images: dict[str, str] = {}

    def resume(self) -> bool:
        """Puts the newest whole checkpoint into the parts; False when there is none."""
        checkpoint = self.run.load_newest()
        found = (checkpoint.step, digest_of_json(checkpoint.facts)) if checkpoint else (0, "")
        if len(set(gather_object([found]))) > 1:  # each would train another network
            raise RunError(
                f"the processes do not find the same checkpoint in {self.run.directory}: all machines must see "
                "the same folder there"
            )
        if checkpoint is None:
            return False
        self.run.forget_after(checkpoint.step)
        before = checkpoint.facts.get("made_from", {})
        changed = [name for name, value in self.made_from.items() if before.get(name, value) != value]
        if changed:
            raise RunError(
                f"{self.run.directory} was begun with something else ({', '.join(changed)} changed since): "
                "bring that back to resume it, or choose another --output"
            )
        load_state(self.parts, checkpoint.tensors)
        self.step, self.facts = checkpoint.step, checkpoint.facts
        return True

    def __enter__(self) -> Loop:
        config, main = self.config, self.run.main
        if config.tracker != "none":
            self.accelerator.init_trackers("logs", {k: str(v) for k, v in asdict(config).items()})
        images = config.steps * config.batch_size
        with ExitStack() as stack:
            self.stop = stack.enter_context(StopSignal())
            done = self.step * config.batch_size
            bar = tqdm(total=images, initial=done, unit="image", mininterval=1.0, disable=not main)
            self.bar = stack.enter_context(bar)
            stack.enter_context(self.run.listing_bad_images())
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self.stack.__exit__(*error)
        self.run.release()
        if error[0] is None:
            if self.stopping and self.step < self.config.steps:
                received = self.stop.received or "a signal"
                self.accelerator.print(f"stopped by {received} after step {self.step}: run it again to go on")
            if self.run.seen_bad_images:
                file = self.run.directory / "bad_images.csv"
                self.accelerator.print(f"{len(self.run.seen_bad_images)} bad images: see {file}")
            self.accelerator.end_training()

    def steps(self, batches_from: Callable[[int], Iterator[Batch]]) -> Iterator[tuple[int, Iterator[Batch]]]:
        """Each step to do, and the micro-batches from it on; `finish` must be called before the next one."""
        batches: Iterator[Batch] | None = None
        while self.step < self.config.steps and not self.stopping:
            self.began = time.perf_counter()
            batches = batches or batches_from(self.step)
            step = self.step
            yield step, batches
            if self.step != step + 1:  # back at a checkpoint
                batches = None

    def learning_rate(self, peak: float) -> float:
        """At the present step."""
        return learning_rate_at(self.step, peak, steps=self.config.steps, warmup_steps=self.config.warmup_steps)

    def finish(self, *, healthy: bool, waited: float, bad_images: Mapping[str, str]) -> None:
        """Counts the step, or goes back to the last checkpoint when too many in a row were not healthy."""
        self.stopping = any_process(self.stop.received is not None, self.accelerator)
        self.facts["seconds"] += time.perf_counter() - self.began
        self.facts["skipped_steps"] += not healthy
        self.step += 1
        self.waited += waited
        self.bad_images |= bad_images
        self.bar.update(self.config.batch_size)
        self.unhealthy_in_a_row = 0 if healthy else self.unhealthy_in_a_row + 1
        if self.unhealthy_in_a_row == UNHEALTHY_LIMIT:
            self.go_back()
            self.logging = self.drawing = self.saving = False
            return
        end = self.step == self.config.steps
        last = self.stopping or end
        due = self.step % self.config.checkpoint_every == 0
        self.saving = last or (due and healthy)  # what is to be gone back to must be sound
        self.logging = last or self.step % self.config.log_every == 0
        self.drawing = end or self.step in FIRST_GRIDS or self.step % self.config.sample_every == 0
        if self.saving or self.logging:
            for met in gather_object([self.bad_images]):
                self.run.add_bad_images(met)
            self.bad_images = {}

    def go_back(self) -> None:
        why = f"a loss or gradient was not finite in {UNHEALTHY_LIMIT} steps in a row, up to step {self.step}"
        skipped = self.facts["skipped_steps"]
        if self.gone_back or not self.resume():
            when = "once more" if self.gone_back else "before the first checkpoint"
            raise RunError(f"{why}, {when}: lower --learning-rate, or look at the data")
        self.facts = self.facts | {"skipped_steps": skipped}
        self.accelerator.print(f"{why}: back to the checkpoint of step {self.step}")
        self.waited, self.unhealthy_in_a_row, self.gone_back = 0.0, 0, True
        self.logged_at = (self.step, self.facts["seconds"])
        self.bar.update(self.step * self.config.batch_size - self.bar.n)

    def log_step(self, metrics: Mapping[str, float]) -> None:
        """A step's metrics with the speed since the last line and the facts, for the run and the trackers."""
        steps, seconds = self.step - self.logged_at[0], self.facts["seconds"] - self.logged_at[1]
        speed = {
            "images_per_second": steps * self.config.batch_size / seconds,
            "waiting_for_data": self.waited / seconds,
            "bad_images": len(self.run.seen_bad_images),
        }
        self.log({**metrics, **speed, **{k: self.facts[k] for k in ("seconds", "skipped_steps")}})
        self.waited, self.logged_at = 0.0, (self.step, self.facts["seconds"])

    def log(self, metrics: Mapping[str, float]) -> None:
        self.run.log(self.step, metrics)
        self.accelerator.log(dict(metrics), step=self.step)


def any_process(flag: bool, accelerator: Accelerator) -> bool:
    """Whether `flag` is set in any process, known to all."""
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), "sum"))
