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
from torch.utils.data import DataLoader

from ssl_exit.data.pixels import EpochOrder, Pixels, PixelsInMemory, PixelsOnDisk, open_pixels
from ssl_exit.encoders.compiling import compiled
from ssl_exit.errors import InputError
from ssl_exit.memory import kept_memory
from ssl_exit.parameters import usable_device
from ssl_exit.storage import whole_file
from ssl_exit.training.module import ExitTraining
from ssl_exit.training.monitor import NeighbourMonitor

DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("auto", "32-true", "bf16-mixed", "16-mixed")
LOGGERS = ("csv", "tensorboard", "none")
CHECKPOINTS, LOGS = "checkpoints", "logs"
KEPT = 2  # checkpoints
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CHECKED = 20  # steps between looks at the loss: each look waits for the device


def train(
    module: ExitTraining,
    data: Pixels | Tensor | str | Path,
    *,
    epochs: int,
    batch_size: int = 128,
    out: Path | None = None,
    resume: bool = False,
    settings: dict[str, Any] | None = None,
    monitor_share: float = 0.0,
    monitor_every: int = 5,
    precision: str = "auto",
    compile: bool = False,
    device: str = "auto",
    devices: int = 1,
    num_workers: int = 0,
    logger: str = "csv",
    seed: int = 0,
    progress: bool = True,
) -> None:
    """Train an encoder in place; it is left in eval mode, on the CPU.

    After every epoch a checkpoint is written, whole or not at all; the last two are kept. Order, views and dropout of
    an epoch depend on (seed, epoch) alone, so a resumed run goes on as the uninterrupted one would have.

    Args:
        module: what is trained, and how.
        data: a folder of images, a tensor of them, (N, C, H, W), uint8 or float in [0, 1], or `Pixels`. Classes, if
            there are any, serve the monitor only.
        epochs: passes over the images.
        batch_size: images a step, of all devices together.
        out: folder for checkpoints and logs; None writes nothing.
        resume: go on from the newest checkpoint in `out`.
        settings: saved with each checkpoint and compared when resuming, beside those of `module` and these arguments.
        monitor_share: of the images, kept out of training to see how well nearest neighbours classify them; used if
            the images have classes.
        monitor_every: epochs between two looks.
        precision: "32-true", "bf16-mixed", "16-mixed", or "auto": bfloat16 where hardware has it.
        compile: let torch.compile write programs for the encoder: half a minute at the start, then faster steps, most
            of all with losses at exits. Without a C++ compiler training goes on as it is, with a warning.
        device: "auto", "cpu" or "cuda".
        devices: how many; with more than one, DistributedDataParallel, negatives gathered from all.
        num_workers: processes that decode images, where these are not in memory.
        logger: "csv", "tensorboard" or "none".
        seed: of everything random.
        progress: show a progress bar on a terminal.

    Raises:
        InputError: settings that cannot be used, fewer images than a batch, a checkpoint that is damaged or of other
            settings, a loss that is not finite, or a full disk.
    """
    if min(epochs, monitor_every) < 1 or not 0 <= monitor_share < 1:
        raise InputError(
            "training needs epochs and monitor_every >= 1 and monitor_share in [0, 1); got "
            f"{epochs}, {monitor_every} and {monitor_share}"
        )
    if logger not in LOGGERS or precision not in PRECISIONS:
        raise InputError(
            f"logger must be one of {LOGGERS} and precision one of {PRECISIONS}; got {logger!r} and {precision!r}"
        )
    if resume and out is None:
        raise InputError("resume needs a folder with checkpoints: give out")
    kind = _checked_devices(device, devices, batch_size)
    newest = newest_checkpoint(out, resume) if out else None
    pixels = data if isinstance(data, Pixels) else open_pixels(data, module.preprocessing, num_workers, devices)
    order = np.random.default_rng(seed).permutation(len(pixels))
    held = order[: round(monitor_share * len(order)) if pixels.targets is not None else 0]
    positions = np.sort(order[len(held) :])
    if isinstance(pixels, PixelsOnDisk):
        pixels.stand_ins = positions
    if len(positions) < batch_size:
        raise InputError(
            f"{len(positions)} images do not fill one batch of {batch_size}; lower batch_size or give more images"
        )
    settings = (settings or {}) | {"seed": seed, "batch_size": batch_size, "epochs": epochs, "images": len(pixels)}
    settings |= {"monitor_share": monitor_share} | _settings_of(module)
    channels = pixels[positions[:1]][1].shape[1]
    if channels != len(module.preprocessing.mean):
        raise InputError(
            f"the images have {channels} channels and mean and std {len(module.preprocessing.mean)}: give one entry a "
            "channel"
        )
    progress = progress and sys.stdout.isatty()
    if newest is not None:
        check_settings(newest, settings)
    begun = 0 if newest is None else epoch_of(newest) + 1
    callbacks: list[pl.Callback] = [_Guard(settings, seed, out)]
    if len(held):
        callbacks.append(NeighbourMonitor(pixels, positions, held, monitor_every))
    if progress:
        callbacks.append(TQDMProgressBar(refresh_rate=10))
    if out:
        callbacks.append(_checkpoints(out))
    with _quiet(), seeded(seed, kind):
        trainer = pl.Trainer(
            accelerator="gpu" if kind == "cuda" else "cpu",
            devices=devices,
            strategy="ddp" if devices > 1 else "auto",
            precision=best_precision(kind) if precision == "auto" else precision,  # type: ignore[arg-type]
            max_epochs=epochs,
            logger=_logger(logger, out, begun),
            callbacks=callbacks,
            plugins=[_WholeFiles()],
            log_every_n_steps=10,
            enable_progress_bar=progress,
            enable_model_summary=False,
            enable_checkpointing=out is not None,
            use_distributed_sampler=False,
            default_root_dir=out,
        )
        sampler = EpochOrder(positions, batch_size, seed, trainer.global_rank, trainer.world_size)
        sampler.set_epoch(begun)  # Lightning says so too late for workers that fetch ahead
        workers = 0 if isinstance(pixels, PixelsInMemory) else num_workers
        loader = DataLoader(
            pixels,
            batch_size=None,
            sampler=sampler,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=kind == "cuda",
            generator=torch.Generator(),  # it would draw from the global one, sooner or later in an epoch
        )
        module.to(memory_format=torch.channels_last)
        module.train()  # Lightning leaves modes as they are
        module.attach(pixels, positions, seed)
        before = signal.getsignal(signal.SIGINT)
        programs = compiled(module.stepped, torch.device(kind)) if compile else nullcontext()
        try:
            with programs, kept_memory() if kind == "cpu" else nullcontext():
                trainer.fit(module, loader, ckpt_path=newest, weights_only=True)
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


def _checked_devices(device: str, devices: int, batch_size: int) -> str:
    """ "cpu" or "cuda", after a check of how many there are and whether they share a batch evenly."""
    if device not in DEVICES:
        raise InputError(f"device must be one of {DEVICES}; choose a GPU by CUDA_VISIBLE_DEVICES; got {device!r}")
    if devices < 1 or batch_size % devices or batch_size < 2 * devices:
        raise InputError(f"batch_size must be a multiple of devices, at least two each; got {batch_size}, {devices}")
    kind = usable_device(device).type
    if kind == "cuda" and devices > torch.cuda.device_count():
        raise InputError(f"devices={devices} were asked for; there are {torch.cuda.device_count()}")
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


def _settings_of(module: ExitTraining) -> dict[str, Any]:
    """How a module trains: its class, options and the like, as JSON has them; views only where it can."""
    found: dict[str, Any] = {
        "module": type(module).__name__,
        "module options": module.options,
        "module optimization": asdict(module.optimization),
        "module preprocessing": module.preprocessing.to_dict(),
    }
    with suppress(TypeError, AttributeError):
        found["module views"] = _as_json(asdict(module.views))  # type: ignore[call-overload]
    return _as_json(found)


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value, default=lambda number: number.item()))  # numpy's


def newest_checkpoint(out: Path, resume: bool) -> Path | None:
    """The newest checkpoint in a folder, or None where training begins.

    Raises:
        InputError: there are checkpoints and `resume` is not asked for.
    """
    found = checkpoints_in(out)
    if found and not resume:
        raise InputError(f"{str(out)!r} holds a training already; resume it, or give a new folder")
    return found[-1] if found else None


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
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return "bf16-mixed" if "amx_bf16" in flags or "avx512_bf16" in flags else "32-true"


class _Guard(pl.Callback):
    """Seeds every epoch, stops at a loss that is not finite, saves settings with checkpoints and removes old ones."""

    def __init__(self, settings: dict[str, Any], seed: int, out: Path | None) -> None:
        self.settings, self.seed, self.out = settings, seed, out
        self.losses: list[Tensor] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
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


class _WholeFiles(TorchCheckpointIO):
    """Checkpoints that appear whole or not at all, on any file system."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        whole = io.BytesIO()  # torch's own writer turns a full disk into an error without its number
        torch.save(checkpoint, whole)
        with whole_file(Path(path)) as draft:
            draft.write_bytes(whole.getbuffer())


def _logger(kind: str, out: Path | None, begun: int) -> Logger | bool:
    if out is None or kind == "none":
        return False
    if kind == "tensorboard":
        if not (find_spec("tensorboard") or find_spec("tensorboardX")):
            raise InputError("logger 'tensorboard' needs tensorboard: pip install tensorboard; or use logger 'csv'")
        return TensorBoardLogger(out, LOGS, version="")
    return CSVLogger(out, LOGS, version=f"from-epoch-{begun:04d}")  # it deletes what a version wrote before


@contextmanager
def seeded(seed: int, kind: str = "cpu") -> Iterator[None]:
    """Draw from a seed for a while; the global generators go on afterwards as if nothing had been."""
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
