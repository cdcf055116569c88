"""The steps of a training run: resumed where it stood, logged, saved, stopped by a signal, led back from NaNs."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, broadcast_object_list, gather_object, parse_flag_from_env
from tqdm import tqdm

from ldm_vae.data.loader import MicroBatches, load_batches
from ldm_vae.errors import ConfigError, RunError
from ldm_vae.files import digest_of_json
from ldm_vae.progress import progress
from ldm_vae.runs.config import RunConfig, saved_config
from ldm_vae.runs.processes import StopSignal, any_process
from ldm_vae.runs.run import Run
from ldm_vae.runs.state import Part, load_state
from ldm_vae.runs.step import learning_rate_at

FREE_ON_RESUME = (
    *("gradient_accumulation_steps", "num_workers", "cache_gib", "gradient_checkpointing", "compile"),
    *("log_every", "sample_every", "checkpoint_every", "tracker", "output", "extend", "like"),
)
"""Fields that a resumed run may change: no result depends on them beyond rounding."""

FAST_BF16 = {"avx512_bf16", "amx_bf16"}
"""Instructions with which a CPU multiplies in bf16; without them it is slower than float32."""
FIRST_GRIDS = (10, 100)
UNHEALTHY_LIMIT = 3
TrainerConfig = TypeVar("TrainerConfig", bound=RunConfig)


def start(config: TrainerConfig) -> tuple[TrainerConfig, Accelerator]:
    """The configuration, its precision decided and its flags checked, and the accelerator that computes in it.

    `auto` takes the precision of the run that is resumed, or else what suits the main process's device.

    Raises:
        ConfigError: flags that cannot work, or a kind of launch that is not supported.
    """
    if config.mixed_precision == "auto":
        device = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU")).device  # as Accelerator chooses it
        saved = saved_config(config.output) or {}
        precision = saved.get("mixed_precision") or fast_precision(device)
        config = replace(config, mixed_precision=broadcast_object_list([precision])[0])
    accelerator = Accelerator(
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        mixed_precision=config.mixed_precision,
        log_with=None if config.tracker == "none" else config.tracker,
        project_dir=config.output,
    )
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ConfigError("FSDP 1 cannot be used: launch with configs/fsdp_unet.yaml, which is FSDP 2")
    config.check(accelerator.num_processes)
    accelerator.print(f"mixed precision: {config.mixed_precision}")
    return config, accelerator


def fast_precision(device: torch.device) -> Literal["no", "bf16"]:
    """bf16 where the device computes it fast, otherwise float32 ("no")."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    return "bf16" if device.type == "xpu" or (device.type == "cpu" and FAST_BF16 & cpu_flags()) else "no"


def cpu_flags() -> set[str]:
    """The instruction sets that Linux names; nothing elsewhere."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return {flag for line in lines if line.startswith("flags") for flag in line.partition(":")[2].split()}


class Loop:
    """Where a run stands: the next step, the facts so far, and what is due after each step.

    ```
    with Loop(run, state.parts(), config, accelerator) as loop:
        for step, batches in loop.steps(rows, collate):
            result = train_step(batches, ...)
            loop.finish(healthy=..., waited=..., bad_images=...)
            if loop.logging: ...
    ```

    Args:
        parts: what a checkpoint holds; the newest intact one is loaded into them.
        made_from: facts that must not change between resumptions, such as fingerprints, in JSON's types.

    Raises:
        RunError: no checkpoint is intact, the run was made from other data, or the processes see different
            checkpoints; while stepping: losses stay non-finite.
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
        if run.extended_from is not None:
            accelerator.print(
                f"extended from {run.extended_from} to {config.steps} steps: after step {self.step} the learning rate "
                f"is {self.learning_rate(1.0):.0%} of its peak, on the cosine of {config.steps} steps"
            )
        self.stopping = self.logging = self.drawing = self.saving = False
        self.waited, self.unhealthy_in_a_row, self.rolled_back = 0.0, 0, False
        self.logged_at = (self.step, self.facts["seconds"])
        self.bad_images: dict[str, str] = {}

    def resume(self) -> bool:
        """Loads the newest intact checkpoint into the parts; False when there is none."""
        checkpoint = self.run.load_newest()
        identity = (checkpoint.step, digest_of_json(checkpoint.facts)) if checkpoint else (0, "")
        if len(set(gather_object([identity]))) > 1:  # each would train another network
            raise RunError(
                f"the processes do not find the same checkpoint in {self.run.directory}: all machines must see "
                "the same folder there"
            )
        if checkpoint is None:
            return False
        self.run.forget_after(checkpoint.step)
        saved = checkpoint.facts.get("made_from", {})
        changed = [name for name, value in self.made_from.items() if saved.get(name, value) != value]
        if changed:
            raise RunError(
                f"{self.run.directory} was begun with something else ({', '.join(changed)} changed since): "
                "bring that back to resume it, or choose another --output"
            )
        load_state(self.parts, checkpoint.tensors)
        self.step, self.facts = checkpoint.step, checkpoint.facts
        return True

    def __enter__(self) -> Loop:
        config = self.config
        if config.tracker != "none":
            self.accelerator.init_trackers("logs", {k: str(v) for k, v in asdict(config).items()})
        images, done = config.steps * config.batch_size, self.step * config.batch_size
        with ExitStack() as stack:
            self.stop = stack.enter_context(StopSignal())
            bar: tqdm[Any] = progress(total=images, initial=done, unit="image", show=self.run.main)
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

    def steps(self, rows: Any, collate: Callable[[list[Any]], Any]) -> Iterator[tuple[int, Iterator[Any]]]:
        """Each remaining step with this process's micro-batches from it on; `finish` must be called before the next.

        Args:
            rows, collate: as `data.loader.load_batches` takes them.
        """
        batches: Iterator[Any] | None = None
        while self.step < self.config.steps and not self.stopping:
            self.began = time.perf_counter()
            batches = batches or self.batches(rows, collate)
            step = self.step
            yield step, batches
            if self.step != step + 1:  # rolled back to a checkpoint
                batches = None

    def batches(self, rows: Any, collate: Callable[[list[Any]], Any]) -> Iterator[Any]:
        """The micro-batches of this process from the present step on."""
        order = MicroBatches(
            first_step=self.step,
            last_step=self.config.steps,
            batch_size=self.config.batch_size,
            rank=self.accelerator.process_index,
            num_processes=self.accelerator.num_processes,
            accumulation=self.config.gradient_accumulation_steps,
        )
        num_workers, on_gpu = self.config.loader_processes, self.accelerator.device.type == "cuda"
        return load_batches(rows, order, collate=collate, num_workers=num_workers, pin_memory=on_gpu)

    def learning_rate(self, peak: float) -> float:
        """Of the present step, warm-up and cosine included."""
        return learning_rate_at(self.step, peak, steps=self.config.steps, warmup_steps=self.config.warmup_steps)

    def finish(self, *, healthy: bool, waited: float, bad_images: Mapping[str, str]) -> None:
        """Counts the step, or rolls back to the last checkpoint when too many in a row were not healthy."""
        self.stopping = any_process(self.stop.received is not None, self.accelerator)
        self.facts["seconds"] += time.perf_counter() - self.began
        self.facts["skipped_steps"] += not healthy
        self.step += 1
        self.waited += waited
        self.bad_images |= bad_images
        self.bar.update(self.config.batch_size)
        self.unhealthy_in_a_row = 0 if healthy else self.unhealthy_in_a_row + 1
        if self.unhealthy_in_a_row == UNHEALTHY_LIMIT:
            self.roll_back()
            self.logging = self.drawing = self.saving = False
            return
        end = self.step == self.config.steps
        last = self.stopping or end
        due = self.step % self.config.checkpoint_every == 0
        self.saving = last or (due and healthy)  # what a run rolls back to must be sound
        self.logging = last or self.step % self.config.log_every == 0
        self.drawing = end or self.step in FIRST_GRIDS or self.step % self.config.sample_every == 0
        if self.saving or self.logging:
            for bad_images in gather_object([self.bad_images]):
                self.run.add_bad_images(bad_images)
            self.bad_images = {}

    def roll_back(self) -> None:
        """To the last checkpoint, once. Raises RunError when there is none, or it has happened before."""
        why = f"a loss or gradient was not finite in {UNHEALTHY_LIMIT} steps in a row, up to step {self.step}"
        skipped = self.facts["skipped_steps"]
        if self.rolled_back or not self.resume():
            when = "once more" if self.rolled_back else "before the first checkpoint"
            raise RunError(f"{why}, {when}: lower --learning-rate, or look at the data")
        self.facts = self.facts | {"skipped_steps": skipped}
        self.accelerator.print(f"{why}: back to the checkpoint of step {self.step}")
        self.waited, self.unhealthy_in_a_row, self.rolled_back = 0.0, 0, True
        self.logged_at = (self.step, self.facts["seconds"])
        self.bar.update(self.step * self.config.batch_size - self.bar.n)

    def log_step(self, metrics: Mapping[str, float]) -> None:
        """Logs a step's metrics with the speed since the last line.

        Where standard output is no terminal, this prints a line, too, without the metrics of parts (`NAME/PART`).
        """
        steps, seconds = self.step - self.logged_at[0], self.facts["seconds"] - self.logged_at[1]
        speed = {
            "images_per_second": steps * self.config.batch_size / seconds,
            "waiting_for_data": self.waited / seconds,
            "bad_images": len(self.run.seen_bad_images),
        }
        self.log({**metrics, **speed, "seconds": self.facts["seconds"], "skipped_steps": self.facts["skipped_steps"]})
        self.waited, self.logged_at = 0.0, (self.step, self.facts["seconds"])
        if self.run.main and not sys.stdout.isatty():
            left = tqdm.format_interval((self.config.steps - self.step) * seconds / steps)
            values = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items() if "/" not in name)
            rate = f"{speed['images_per_second']:.4g} images/s"
            print(f"step {self.step}/{self.config.steps}, {rate}, {left} left: {values}", flush=True)

    def log(self, metrics: Mapping[str, float]) -> None:
        self.run.log(self.step, metrics)
        self.accelerator.log(dict(metrics), step=self.step)
