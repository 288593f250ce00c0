"""What server and clients build alike from the same parameters: stages, exits, and a cascade out of arrays."""

import copy
import json
from dataclasses import replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ssl_exit.cascade.cascade import Cascade
from ssl_exit.clusterer import ExitClusterer
from ssl_exit.clusterer.checks import built
from ssl_exit.encoders.tapped import TappedEncoder
from ssl_exit.errors import InputError
from ssl_exit.exits.final import Final, FinalClasses, FinalClusters
from ssl_exit.exits.registry import build_rules, rule_classes
from ssl_exit.exits.rules import RULES, ExitRule
from ssl_exit.federated.questions import Arrays
from ssl_exit.fitting.cut import Cutter, check_patience, headed_encoder
from ssl_exit.fitting.fit_shard import hashes_in_common


class Shared:
    """The parameters of a fit, and the encoder cut for images of a shape.

    Args:
        c: the clusterer to fit; left unchanged.

    Raises:
        InputError: parameters that a federated fit does without.
    """

    def __init__(self, c: ExitClusterer) -> None:
        self.settings, self.preprocessing = c.settings(), c.preprocessing
        _check(self.settings.rule.name, {
            "a front": self.settings.front.kind != "none",
            "n_clusters='auto'": self.settings.n_clusters == "auto",
            "mirror": self.settings.rule.mirror,
            "exits=[]": not len(self.settings.exits.points),
            "thresholds='cbt'": self.settings.calibration.thresholds == "cbt",
            f"guarantee={self.settings.calibration.guarantee!r}": self.settings.calibration.guarantee != "overall",
        })  # fmt: skip
        network, self.spec = built(c.encoder)
        self.encoder = copy.deepcopy(network).cpu().eval()
        about = hashes_in_common(self.encoder, self.settings, self.preprocessing, ())
        self.about = np.frombuffer(json.dumps(about, sort_keys=True).encode(), dtype=np.uint8)

    def differs_from(self, about: np.ndarray) -> list[str]:
        """Names of what another side has otherwise."""
        try:
            own, other = (json.loads(bytes(one)) for one in (self.about, about))
        except ValueError as error:
            raise InputError(f"the hashes of a fit are not readable: {error}") from error
        return sorted(name for name in {*own, *other} if own.get(name) != other.get(name))

    def cut_for(self, example: Tensor) -> None:
        """Cut the encoder for images like these, (N, C, H, W)."""
        encoder, settings = self.encoder, self.settings
        if settings.clusters.head is not None:
            encoder, settings = headed_encoder(encoder, example, settings)
        self.encoder, self.settings = encoder, settings
        self.cut, exits = Cutter(encoder, example, settings), settings.exits
        self.tapped = self.cut(exits.points, exits.descriptor, exits.accumulate)
        check_patience(settings, len(self.tapped.seen))

    @cached_property
    def dims(self) -> list[int]:
        """Entries of the descriptors that statistics are about: one number where they accumulate, else one an exit."""
        return [self.tapped.dim] if self.tapped.accumulate else list(self.tapped.seen)

    @property
    def needs_scatter(self) -> bool:
        return any(rule.needs_scatter for rule in self.rules(self.tapped))

    def rules(self, tapped: TappedEncoder) -> list[ExitRule]:
        """Unfitted."""
        return build_rules(self.settings.rule.name, tapped.seen, self.settings.k, self.settings.rule.options)

    def at(self, kept: list[int]) -> TappedEncoder:
        """The encoder with some of its exits alone."""
        return self.tapped if len(kept) == len(self.tapped.seen) else self.cut.only(self.tapped, kept)

    def final(self, told: Arrays) -> Final:
        """The label function that the server tells."""
        if "centroids" not in told:
            return FinalClasses(self.settings.k)
        k, features = told["centroids"].shape
        if (k, features) != (self.settings.k, self.tapped.output.dim):
            raise InputError(f"expected {self.settings.k} centroids of {self.tapped.output.dim} features")
        return FinalClusters(torch.from_numpy(told["centroids"].copy()), self.settings.clusters.spherical)

    def told(self, cascade: Cascade, kept: list[int]) -> Arrays:
        """A cascade with some of the exits, as arrays."""
        tensors = {name: tensor.cpu().numpy() for name, tensor in cascade.tensors().items() if name != "thresholds"}
        centroids = {"centroids": tensors.pop("final.centroids")} if "final.centroids" in tensors else {}
        return tensors | centroids | {"kept": np.array(kept, dtype=np.int64)}

    def cascade(self, told: Arrays) -> Cascade:
        """The cascade of such arrays.

        Raises:
            InputError: they are none for this encoder.
        """
        kept, n = told["kept"].tolist(), len(self.tapped.seen)
        if not kept or sorted(set(kept)) != kept or not 0 <= kept[0] <= kept[-1] < n:
            raise InputError(f"exits must be some of 0 to {n - 1}, rising; got {kept}")
        tapped = self.at(kept)
        rules = self.rules(tapped)
        try:
            for i, rule in enumerate(rules):
                own = {
                    name.partition(f"rules.{i}.")[2]: v for name, v in told.items() if name.startswith(f"rules.{i}.")
                }
                rule.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in own.items()})
        except RuntimeError as error:
            raise InputError(f"rules do not fit the exits of this encoder: {error}") from error
        return Cascade.closed(tapped, rules, self.final(told), self.cut.across)


def with_temperatures(cascade: Cascade, temperatures: list[float]) -> Cascade:
    """A copy whose rules have these temperatures."""
    rules = copy.deepcopy(cascade.rules)
    for rule, temperature in zip(rules, temperatures, strict=True):
        rule.temperature.fill_(temperature)
    return replace(cascade, rules=rules)


def _check(rule: str, without: dict[str, bool]) -> None:
    if asked := [name for name, is_set in without.items() if is_set]:
        raise InputError(f"a federated fit does without {asked[0]}")
    if len(rule_classes(rule)) > 1 or rule_classes(rule)[0].sample_images:
        able = sorted(name for name, one in RULES.items() if not one.sample_images)
        raise InputError(f"a federated fit takes rules that learn from sums alone, {able}; got {rule!r}")
