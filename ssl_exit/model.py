"""The fitted model: a value that is fitted, calibrated, saved, loaded, copied and sent to other processes."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ssl_exit import __version__
from ssl_exit.cascade.cascade import Cascade
from ssl_exit.cascade.plan import Plan
from ssl_exit.cascade.result import ExitResult
from ssl_exit.cascade.run import run
from ssl_exit.cascade.times import StageTimes, stage_times
from ssl_exit.data.hashes import module_hash, settings_hash, tensors_hash, watched_hash
from ssl_exit.data.images import Batch
from ssl_exit.data.preprocessing import AnyPreprocessing, Transform, saved_preprocessing
from ssl_exit.encoders.build import EncoderSpec
from ssl_exit.encoders.front import FrontDescriptor, FrontNetwork
from ssl_exit.encoders.head import head_of
from ssl_exit.encoders.inference import usable_device
from ssl_exit.encoders.tapped import TappedEncoder
from ssl_exit.errors import InputError, shown
from ssl_exit.exits.across import AcrossExits
from ssl_exit.exits.certificate import Certificate
from ssl_exit.exits.final import Final, FinalClasses, FinalClusters
from ssl_exit.exits.front import FrontRule
from ssl_exit.exits.registry import build_rules
from ssl_exit.exits.rules import RULES, ExitRule
from ssl_exit.provenance import ClusterCount, ExitChoice, Provenance, Teaching
from ssl_exit.settings import Settings
from ssl_exit.settings.groups import from_json


@dataclass(frozen=True, eq=False)
class Model:
    """What fitting returns, `ssl_exit.storage` writes and reads, and `ExitClusterer` holds as `model_`.

    It survives copy.deepcopy, pickle, cloudpickle and joblib with identical answers, also in another process.

    Attributes:
        encoder: the encoder, in float32 on the CPU; a copy rewritten for speed is what runs.
        spec: its architecture, if an `EncoderSpec` built it.
        cascade: stages, exits and thresholds.
        settings: parameters it was fitted with.
        preprocessing: of images, or None where they are taken as they are.
        image_shape: (C, H, W).
        certificate: as issued; `check` says whether it still holds.
        path: threshold settings that calibration considered, (S, E, K), surest first.
        path_disagreement: share of the certifying images each of them gives another label, (S,).
        provenance: what it was fitted to.
        cut_hash: of the encoder and the fronts when the cascade was cut (see `hash_of_cut`).
        fronts: networks before the encoder, in float32 on the CPU.
    """

    encoder: nn.Module
    spec: EncoderSpec | None
    cascade: Cascade
    settings: Settings
    preprocessing: AnyPreprocessing | None
    image_shape: tuple[int, ...]
    certificate: Certificate
    path: np.ndarray
    path_disagreement: np.ndarray
    provenance: Provenance
    cut_hash: str
    fronts: tuple[FrontDescriptor, ...] = ()

    @cached_property
    def plan(self) -> Plan:
        """What early exit runs."""
        return Plan(self.cascade, compile=self.settings.runtime.compile)

    @cached_property
    def full_plan(self) -> Plan:
        """What the full encoder runs."""
        return Plan.of_full_encoder(self.cascade, compile=self.settings.runtime.compile)

    def run(
        self, batches: Iterable[Batch], n: int, batch_size: int | None = None, audit: np.ndarray | None = None
    ) -> ExitResult:
        """Cluster n images, positions from 0, with early exits (see `ssl_exit.cascade.run.run`)."""
        return run(self.plan, batches, n, batch_size or self.settings.batch_size, audit)

    def run_full(self, batches: Iterable[Batch], n: int, batch_size: int | None = None) -> ExitResult:
        """The same without early exits."""
        return run(self.full_plan, batches, n, batch_size or self.settings.batch_size)

    def hashes(self, *, watch: bool = False) -> dict[str, str]:
        """SHA-256 of what a certificate is about, by name: encoder, preprocessing, exits; and the library's version.

        Args:
            watch: hash weights again only where a cheap look says that they changed (see `watched_hash`).
        """
        weights = (watched_hash if watch else module_hash)(self.encoder)
        options, head = self.spec and not self.spec.imported and self.spec.options, head_of(self.encoder)
        beside = [*([options] if options else []), *([head.identity] if head else [])]
        return {
            "encoder": settings_hash([weights, *beside]) if beside else weights,
            "preprocessing": settings_hash(self.preprocessing.to_dict() if self.preprocessing else None),
            "exits": settings_hash(
                [
                    self.cascade.settings,
                    tensors_hash(self.cascade.tensors()),
                    [type(rule).__name__ for rule in self.cascade.rules],
                    self.settings.rule.options,
                    list(self.image_shape),
                    [(module_hash(front), front.config) for front in self.fronts],
                ]
            ),
            "version": __version__,
        }

    def check(self, *, watch: bool = False) -> Certificate:
        """The certificate, void if weights, preprocessing, rules, clusters or thresholds are not those it is about."""
        return self.certificate.checked(self.hashes(watch=watch))

    def recut(self) -> "Model":
        """The same exits and rules over the encoder as it is now; thresholds let nothing exit."""
        old, exits = self.cascade.tapped, self.cascade
        kinds = [descriptor.kind for descriptor in old.descriptors]
        names, macs = exits.exit_names[:-1], old.staged.macs
        tapped = _cut(self.encoder, self.fronts, self.settings, self.image_shape, names, kinds, old.accumulate, macs)
        closed = Cascade.closed(tapped.to(old.device), exits.rules, exits.final, exits.across)
        return replace(
            self, cascade=replace(closed, times=exits.times), cut_hash=hash_of_cut(self.encoder, self.fronts)
        )

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """All but the encoder: what JSON can hold, and tensors by name; `from_state` is the inverse."""
        cascade, used, spec = self.cascade, self.provenance, self.spec
        tensors = cascade.tensors() | {
            "path": torch.from_numpy(self.path),
            "path_disagreement": torch.from_numpy(self.path_disagreement),
            "fit_images": torch.from_numpy(used.images.view(np.int64)),
        }
        for i, front in enumerate(self.fronts):
            tensors |= {f"fronts.{i}.{k}": v for k, v in front.network.state_dict().items()}
        if cascade.times is not None:
            tensors |= {f"times.{k}": torch.from_numpy(v.copy()) for k, v in vars(cascade.times).items()}
        about = {
            "encoder": {
                "spec": spec and {"name": spec.name, "options": spec.options},
                "class": type(self.encoder).__name__,
                "head": head_of(self.encoder) is not None,
                "hash": self.cut_hash,
            },
            "settings": self.settings.to_dict(),
            "preprocessing": self.preprocessing.to_dict() if self.preprocessing else None,
            "image": list(self.image_shape),
            "device": cascade.device.type,
            "exits": cascade.exit_names[:-1],
            "descriptors": [descriptor.kind for descriptor in cascade.tapped.descriptors],
            "accumulate": cascade.tapped.accumulate,
            "macs": cascade.tapped.staged.macs,
            "fronts": [front.config for front in self.fronts],
            "teaching": [asdict(one) for one in used.teaching],
            "counts": [asdict(one) for one in used.counts],
            "inertia": None if np.isnan(used.inertia) else used.inertia,
            "certificate": self.certificate.to_dict(),
            "choices": [asdict(choice) for choice in used.choices],
            "skipped": {str(k): v for k, v in used.skipped.items()},
            "n_fit": used.n_fit,
            "n_sample": used.n_sample,
        }
        return about, tensors

    @classmethod
    def from_state(
        cls,
        encoder: nn.Module,
        about: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        settings: Settings | None = None,
        front: nn.Module | None = None,
        transform: Transform | None = None,
    ) -> "Model":
        """A model from its encoder and what `state` returned.

        Args:
            encoder: with its weights; in float32 on the CPU.
            about, tensors: from `state`.
            settings: other ones than those in `about`; those that the cascade was made from must be the same.
            front: a module of the architecture of the user's own front, if the model has one.
            transform: the preprocessing, if it is the user's own.

        Raises:
            InputError: a front or a transform of the user's own is missing or does not fit.
        """
        settings = settings or Settings.from_dict(about["settings"])
        image, exits, spec = tuple(about["image"]), settings.exits, about["encoder"]["spec"]
        _check_shapes(tensors, len(about["exits"]), settings)
        fronts = tuple(
            _front(config, _under(tensors, f"fronts.{i}."), front) for i, config in enumerate(about["fronts"])
        )
        kinds, macs = about["descriptors"], about["macs"]
        tapped = _cut(encoder, fronts, settings, image, about["exits"], kinds, about["accumulate"], macs)
        own = [FrontRule(dim, settings.k) for dim in tapped.seen[: len(fronts)]]
        rules = [
            *own,
            *build_rules(settings.rule.name, tapped.seen[len(own) :], settings.k, settings.rule.options),
        ]
        for i, rule in enumerate(rules):
            rule.load_state_dict(_under(tensors, f"rules.{i}."))
        final: Final = FinalClasses(settings.k)
        if not settings.clusters.supervised:
            centroids = tensors["final.centroids"].clone()
            if centroids.shape[1] != tapped.output.dim:
                raise ValueError(f"centroids of {centroids.shape[1]} features, of which there are {tapped.output.dim}")
            final = FinalClusters(centroids, settings.clusters.spherical)
        device = usable_device(settings.device)
        cascade = Cascade.closed(tapped.to(device), rules, final, AcrossExits(exits.patience, exits.ensemble))
        cascade = cascade.at(tensors["thresholds"].numpy())
        times = StageTimes(**{k: v.numpy() for k, v in _under(tensors, "times.").items()})
        if times.stages.shape[1] != len(tapped.staged.stages):
            raise ValueError(f"times of {times.stages.shape[1]} stages, of which there are {len(tapped.staged.stages)}")
        if about["device"] != device.type:  # what was measured there says nothing of here
            example = torch.randn(min(settings.batch_size, 16), *image, generator=torch.Generator())
            times = stage_times(cascade.tapped, cascade.rules, cascade.final, example)
        used = Provenance(
            tensors["fit_images"].numpy().view(np.uint64),
            {int(position): reason for position, reason in about["skipped"].items()},
            about["n_fit"],
            about["n_sample"],
            tuple(from_json(ExitChoice, choice) for choice in about["choices"]),
            tuple(from_json(Teaching, one) for one in about["teaching"]),
            tuple(from_json(ClusterCount, one) for one in about["counts"]),
            float("nan") if about["inertia"] is None else float(about["inertia"]),
        )
        return cls(
            encoder=encoder,
            spec=spec and EncoderSpec(**spec),
            cascade=replace(cascade, times=times),
            settings=settings,
            preprocessing=saved_preprocessing(about["preprocessing"], transform),
            image_shape=image,
            certificate=from_json(Certificate, about["certificate"]),
            path=tensors["path"].numpy(),
            path_disagreement=tensors["path_disagreement"].numpy(),
            provenance=used,
            cut_hash=about["encoder"]["hash"],
            fronts=fronts,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled without stages and programs, which are made again, and with the classes of its rules."""
        classes = {type(part) for rule in self.cascade.rules for part in rule.modules() if isinstance(part, ExitRule)}
        own = next((f.network for f in self.fronts if f.config["network"] is None), None)
        transform = self.preprocessing if isinstance(self.preprocessing, Transform) else None
        return _unpickled, (tuple(classes), self.encoder, own, transform, *self.state())


def hash_of_cut(encoder: nn.Module, fronts: Sequence[FrontDescriptor]) -> str:
    """SHA-256 of all weights that a cascade is cut from."""
    return settings_hash([module_hash(module) for module in (encoder, *fronts)])


def _unpickled(
    classes: tuple[type[ExitRule], ...],
    encoder: nn.Module,
    front: nn.Module | None,
    transform: Transform | None,
    about: Any,
    tensors: Any,
) -> Model:
    RULES.update({rule.name: rule for rule in classes if "name" in vars(rule)})
    return Model.from_state(encoder, about, tensors, front=front, transform=transform)


def _cut(
    encoder: nn.Module,
    fronts: Sequence[FrontDescriptor],
    settings: Settings,
    image: tuple[int, ...],
    exits: Sequence[str],
    kinds: Sequence[str],
    accumulate: bool,
    macs: Sequence[int],
) -> TappedEncoder:
    tapped = TappedEncoder.build(
        encoder,
        exits[len(fronts) :],
        torch.zeros(1, *image),
        descriptor=kinds[len(fronts) :],
        accumulate=accumulate,
        normalize=settings.exits.normalize,
        fronts=fronts,
    )
    if len(macs) != len(tapped.staged.stages) or not all(isinstance(m, int) and 0 <= m < 2**62 for m in macs):
        raise ValueError(f"multiply-adds {shown(macs)} of {len(tapped.staged.stages)} stages")
    tapped.staged.macs = list(macs)  # where they cannot be counted they stand for measured time
    return tapped.for_inference(settings.runtime.precision, image)


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}


def _check_shapes(tensors: Mapping[str, Tensor], n_exits: int, settings: Settings) -> None:
    """Refuse tensors that do not belong together, before any are made that are as large as they say.

    Raises:
        ValueError: a shape or a type is another.
    """
    cells = (n_exits, settings.k)
    n = len(tensors["path"])
    expected = {"thresholds": cells, "path": (n, *cells), "path_disagreement": (n,)}
    types = {"fit_images": torch.int64}
    if not settings.clusters.supervised:
        expected["final.centroids"] = (settings.k, *tensors["final.centroids"].shape[1:2])
        types["final.centroids"] = torch.float32
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensors[name].shape)}, not {shape}")
    for name, dtype in types.items():
        if tensors[name].dtype != dtype:
            raise ValueError(f"{name} is {tensors[name].dtype}, not {dtype}")


def _front(config: Mapping[str, Any], weights: Mapping[str, Tensor], network: nn.Module | None) -> FrontDescriptor:
    """A front with these weights, in eval mode.

    Raises:
        InputError: they are not its own.
    """
    if config["network"] is not None and config["network"] != FrontNetwork.config_of(weights):
        raise InputError(f"the front does not fit this model: its weights are not those of {shown(config['network'])}")
    front = FrontDescriptor.from_config(config, network)
    try:
        front.network.load_state_dict(weights)
    except RuntimeError as error:
        raise InputError(f"the front does not fit this model: {error}") from error
    return front.eval().requires_grad_(False)
