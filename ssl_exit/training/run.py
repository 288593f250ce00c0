"""Running a training: devices, precision, checkpoints, resuming, logs, and what goes wrong."""

import errno
import io
import json
import logging
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint, TQDMProgressBar
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger
from pytorch_lightning.plugins.io import TorchCheckpointIO
from torch import Tensor

from ssl_exit.data.images import ImageData
from ssl_exit.data.reading import first_images
from ssl_exit.encoders.compiling import compiled
from ssl_exit.encoders.inference import usable_device
from ssl_exit.errors import InputError
from ssl_exit.files import atomic_file
from ssl_exit.settings import TrainingRun
from ssl_exit.training.loader import EpochLoader
from ssl_exit.training.module import ExitTraining, Training
from ssl_exit.training.monitor import NeighbourMonitor

CHECKPOINTS, LOGS = "checkpoints", "logs"
KEPT = 2  # checkpoints
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CHECKED = 20  # steps between looks at the loss: each look waits for the device


def train(
    module: Training,
    data: ImageData,
    *,
    positions: np.ndarray | None = None,
    out: Path | None = None,
    resume: bool = False,
    settings: dict[str, Any] | None = None,
    progress: bool = True,
    **options: Any,
) -> None:
    """Train a network in place; it is left in eval mode, on the CPU.

    After every epoch a checkpoint is written, complete or not at all; the last two are kept. Order, views and dropout
    of an epoch depend on (seed, epoch) alone, so a resumed run continues as the uninterrupted one would have.

    Args:
        module: what is trained, and how.
        data: images, uint8 or float in [0, 1] (see `open_training_images`). Classes, if there are any, serve the
            monitor only.
        positions: of the images to train on, (n,) int; None: all.
        out: folder for checkpoints and logs; None writes nothing.
        resume: continue from the newest checkpoint in `out`.
        settings: saved with each checkpoint and compared when resuming, beside those of `module` and these arguments.
        progress: show a progress bar on a terminal.
        options: fields of `TrainingRun`, such as epochs=60, batch_size=128, precision="32-true", seed=0.

    Raises:
        InputError: settings that cannot be used, fewer images than a batch, a checkpoint that is damaged or of other
            settings, a loss that is not finite, or a full disk.
    """
    how = TrainingRun(**options)
    if resume and out is None:
        raise InputError("resume needs a folder with checkpoints: set out")
    kind = _checked_devices(how)
    newest = newest_checkpoint(out, resume) if out else None
    source = module.open(data, how.num_workers, how.devices)
    every = np.arange(len(source)) if positions is None else positions
    order = np.random.default_rng(how.seed).permutation(every)
    held = order[: round(how.monitor_share * len(order)) if source.targets is not None else 0]
    positions = np.sort(order[len(held) :])
    if len(positions) < how.batch_size:
        raise InputError(
            f"{len(positions)} images do not fill one batch of {how.batch_size}; lower batch_size or use more images"
        )
    module.check(first_images(source, positions, how.batch_size).images)
    compared = {name: getattr(how, name) for name in ("seed", "batch_size", "epochs", "monitor_share")}
    settings = (settings or {}) | compared | {"images": len(every)} | _settings_of(module)
    if newest is not None:
        check_settings(newest, settings)
    first = 0 if newest is None else epoch_of(newest) + 1
    guard = _Guard(settings, how.seed, out)
    callbacks: list[pl.Callback] = [guard]
    if len(held):
        callbacks.append(NeighbourMonitor(source, positions, held, how.monitor_every))
    if progress and sys.stdout.isatty():
        callbacks.append(TQDMProgressBar(refresh_rate=10))
    if out:
        callbacks.append(_checkpoints(out))
    with _quiet(), seeded(how.seed, kind):
        trainer = pl.Trainer(
            accelerator="gpu" if kind == "cuda" else "cpu",
            devices=how.devices,
            strategy="ddp" if how.devices > 1 else "auto",
            precision=best_precision(kind) if how.precision == "auto" else how.precision,  # type: ignore[arg-type]
            max_epochs=how.epochs,
            logger=_logger(how.logger, out, first),
            callbacks=callbacks,
            plugins=[_AtomicCheckpoints()],
            log_every_n_steps=10,
            enable_progress_bar=progress and sys.stdout.isatty(),
            enable_model_summary=False,
            enable_checkpointing=out is not None,
            use_distributed_sampler=False,
            default_root_dir=out,
        )
        rank, world_size = trainer.global_rank, trainer.world_size
        loader = EpochLoader(source, positions, how.batch_size, how.seed, rank, world_size, pin_memory=kind == "cuda")
        guard.loader = loader
        module.to(memory_format=torch.channels_last)
        module.train()  # Lightning leaves modes as they are
        module.attach(source, positions, how.seed)
        with _stopping(trainer, module, out):
            programs = compiled(module.stepped, torch.device(kind)) if how.compile else nullcontext()
            with programs:
                trainer.fit(module, loader, ckpt_path=newest, weights_only=True)


@contextmanager
def _stopping(trainer: pl.Trainer, module: Training, out: Path | None) -> Iterator[None]:
    """A full disk is an InputError, an interrupt a KeyboardInterrupt; the module ends on the CPU in eval mode."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise InputError(
            f"training stopped at step {trainer.global_step}: {str(out)!r} cannot be written ({error.strerror}); "
            "free some space and resume from the last checkpoint"
        ) from error
    except SystemExit as stop:  # Lightning's answer to an interrupt
        raise KeyboardInterrupt from stop
    finally:
        module.to("cpu", memory_format=torch.contiguous_format)
        module.eval()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before)


def _checked_devices(how: TrainingRun) -> str:
    """ "cpu" or "cuda", after a check of how many there are and whether they share a batch evenly."""
    if how.batch_size % how.devices or how.batch_size < 2 * how.devices:
        raise InputError(
            f"batch_size must be a multiple of devices, at least two each; got {how.batch_size}, {how.devices}"
        )
    kind = usable_device(how.device).type
    if kind == "cuda" and how.devices > torch.cuda.device_count():
        raise InputError(f"devices is {how.devices}; there are {torch.cuda.device_count()}")
    return kind


def _checkpoints(out: Path) -> ModelCheckpoint:
    """Writes one after every epoch."""
    return ModelCheckpoint(
        out / CHECKPOINTS,
        "epoch-{epoch:04d}",
        monitor="epoch",
        mode="max",
        save_top_k=-1,  # `_Guard` removes old ones: what a killed run had kept, Lightning forgets
        auto_insert_metric_name=False,
        save_on_train_epoch_end=True,
    )


def _settings_of(module: Training) -> dict[str, Any]:
    """How a module trains: its class, options and the like, as JSON has them; views only where it can."""
    settings: dict[str, Any] = {
        "module": type(module).__name__,
        "module options": module.options,
        "module optimization": asdict(module.optimization),
    }
    if isinstance(module, ExitTraining):
        settings["module preprocessing"] = module.preprocessing.to_dict()
    with suppress(TypeError, AttributeError):
        settings["module views"] = _as_json(asdict(module.views))  # type: ignore[call-overload]
    return _as_json(settings)


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value, default=lambda number: number.item()))  # numpy's


def newest_checkpoint(out: Path, resume: bool) -> Path | None:
    """The newest checkpoint in a folder, or None where training begins.

    Raises:
        InputError: there are checkpoints and `resume` is not asked for.
    """
    checkpoints = checkpoints_in(out)
    if checkpoints and not resume:
        raise InputError(f"{str(out)!r} holds a training already; resume it, or choose a new folder")
    return checkpoints[-1] if checkpoints else None


def saved_settings(out: Path) -> dict[str, Any]:
    """Settings in the newest checkpoint of a training; empty where there is none that can be read."""
    with suppress(Exception):  # `check_settings` says what is wrong with it
        return dict(torch.load(checkpoints_in(out)[-1], map_location="cpu", weights_only=True)["ssl_exit"])
    return {}


def check_settings(newest: Path, settings: dict[str, Any]) -> None:
    """Refuse a checkpoint that training cannot go on from.

    Raises:
        InputError: it is damaged, or was written with other settings.
    """
    try:
        saved = torch.load(newest, map_location="cpu", weights_only=True)["ssl_exit"]
    except Exception as error:  # whatever a damaged file leads torch to
        others = [path for path in checkpoints_in(newest.parent.parent) if path != newest]
        older = f", to resume from {others[-1].name}" if others else ", to start again"
        raise InputError(
            f"checkpoint {str(newest)!r} cannot be read ({str(error).splitlines()[0]}); delete it{older}"
        ) from error
    differ = [f"{k}: {saved.get(k)!r} then, {v!r} now" for k, v in settings.items() if saved.get(k) != v]
    if differ:
        raise InputError(f"checkpoint {str(newest)!r} was written with other settings: {'; '.join(differ)}")


def checkpoints_in(out: Path) -> list[Path]:
    """Checkpoints of a training, oldest first."""
    return sorted((out / CHECKPOINTS).glob("epoch-*.ckpt"))


def epoch_of(checkpoint: Path) -> int:
    """The epoch after which a checkpoint was written, from 0."""
    return int(checkpoint.stem.partition("-")[2])


def best_precision(kind: str) -> str:
    """bfloat16 autocast where the hardware multiplies it natively, else float32."""
    if kind == "cuda":
        return "bf16-mixed" if torch.cuda.get_device_capability()[0] >= 8 else "32-true"
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return "bf16-mixed" if "amx_bf16" in flags or "avx512_bf16" in flags else "32-true"


class _Guard(pl.Callback):
    """Seeds every epoch, stops at a loss that is not finite, saves settings with checkpoints and removes old ones."""

    def __init__(self, settings: dict[str, Any], seed: int, out: Path | None) -> None:
        self.settings, self.seed, self.out = settings, seed, out
        self.losses: list[Tensor] = []
        self.loader: EpochLoader | None = None

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self.loader is not None:
            self.loader.epoch = trainer.current_epoch
        state = np.random.SeedSequence((self.seed, trainer.current_epoch, trainer.global_rank)).generate_state(1)
        torch.manual_seed(int(state[0]))
        self._remove_old(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(outputs["loss"].detach())
        if len(self.losses) == CHECKED:
            self._check(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._check(trainer)  # before a checkpoint is written: callbacks that write them come last
        for logger in trainer.loggers:
            logger.save()

    def on_fit_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._remove_old(trainer)

    def on_save_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["ssl_exit"] = self.settings

    def _remove_old(self, trainer: pl.Trainer) -> None:
        if self.out and trainer.is_global_zero:
            drafts = (self.out / CHECKPOINTS).glob(".epoch-*")  # of a run that was killed
            for old in [*checkpoints_in(self.out)[:-KEPT], *drafts]:
                old.unlink()

    def _check(self, trainer: pl.Trainer) -> None:
        losses, self.losses = self.losses, []
        finite = torch.stack(losses).isfinite().tolist() if losses else []
        if not trainer.strategy.reduce_boolean_decision(all(finite)):  # all processes stop, or none
            if all(finite):
                raise InputError("the loss of another process is not finite")
            step = trainer.global_step - len(finite) + finite.index(False)
            last = trainer.checkpoint_callback
            path = getattr(last, "best_model_path", "") or "none yet"
            raise InputError(
                f"the loss became {losses[finite.index(False)].item()} at step {step}; last good checkpoint: {path}. "
                "Lower learning_rate, or train with precision 32-true"
            )


class _AtomicCheckpoints(TorchCheckpointIO):
    """Checkpoints that appear complete or not at all, on any file system."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        content = io.BytesIO()  # torch's own writer turns a full disk into an error without its number
        torch.save(checkpoint, content)
        with atomic_file(Path(path)) as draft:
            draft.write_bytes(content.getbuffer())


def _logger(kind: str, out: Path | None, first: int) -> Logger | bool:
    if out is None or kind == "none":
        return False
    if kind == "tensorboard":
        if not (find_spec("tensorboard") or find_spec("tensorboardX")):
            raise InputError("logger 'tensorboard' needs tensorboard: pip install tensorboard; or use logger 'csv'")
        return TensorBoardLogger(out, LOGS, version="")
    return CSVLogger(out, LOGS, version=f"from-epoch-{first:04d}")  # it deletes what a version wrote before


@contextmanager
def seeded(seed: int, kind: str = "cpu") -> Iterator[None]:
    """Draw from a seed within this context; the global generators are restored afterwards."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if kind == "cuda" else []):
        torch.manual_seed(seed)
        yield


class _quiet(warnings.catch_warnings):
    """Without Lightning's notices on hardware, loaders and loggers, none of which a user here can act on."""

    def __enter__(self) -> None:
        super().__enter__()
        self.level = logging.getLogger("pytorch_lightning").level
        logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", module="pytorch_lightning")

    def __exit__(self, *error: Any) -> None:
        logging.getLogger("pytorch_lightning").setLevel(self.level)
        super().__exit__(*error)
