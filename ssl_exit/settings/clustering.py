"""Parameters of `ExitClusterer`."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from ssl_exit.errors import InputError, shown
from ssl_exit.settings.groups import PYTHON, Group, option

Guarantee = Literal["overall", "cluster", "exit", "expectation"]


@dataclass(frozen=True)
class Exits(Group):
    """Where images may leave, and what an exit sees.

    Attributes:
        points: names of exit points ("layer2" means its last node), or "auto": of at most eight, spread evenly over
            the cost, those that pay for themselves on held-out images. Where fit() holds nothing out, calibrate()
            closes the others. All stay with patience or ensembling, where exits depend on each other.
        descriptor: auto, average, pyramid, tokens or flatten: how the tensor at an exit point becomes a vector.
        accumulate: let an exit see the descriptors of earlier exits too.
        normalize: divide descriptors by their L2 norm.
        patience: leave only where so many consecutive exits agree; 1 turns it off.
        ensemble: answer with the geometric mean of the probabilities of all exits so far.
    """

    points: str | list[str] | tuple[str, ...] = option("auto", flag="exits")
    descriptor: Literal["auto", "average", "pyramid", "tokens", "flatten"] = "auto"
    accumulate: bool = True
    normalize: bool = False
    patience: int = option(1, "[1, 1000]")
    ensemble: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.points, str) and self.points != "auto":
            raise InputError(f'exits must be "auto" or a list of names of exit points; got {self.points!r}')


@dataclass(frozen=True)
class Rule(Group):
    """How an exit decides (docs/rules.md).

    Attributes:
        name: centroid, mahalanobis, kmeans, prototypes, euclidean, e2cm, e2cm_released, sdn, branchynet, eenet, mlp, or
            two joined as centroid+sdn.
        options: keyword arguments of the rule, such as {"hidden": 64}.
        mirror: fit rules on left-right mirrored images too; takes a second pass.
    """

    name: str = option("centroid", flag="rule")
    options: dict[str, Any] | None = option(None, flag="rule_options")
    mirror: bool = False


@dataclass(frozen=True)
class Front(Group):
    """A small network before the encoder, taught the final clusters in fit() (docs/front.md).

    Attributes:
        kind: none; auto: sized to the encoder by `macs` and `time`; or module: `network`.
        macs: share of the encoder's multiply-adds that the front may take; several make as many fronts in a row.
        time: share of the encoder's measured time that all fronts together may take.
        width: channels of the first convolution, instead of the most that `macs` and `time` allow; others follow.
        depth: residual blocks at every resolution.
        side: pixels a side that the front sees at most; larger images are averaged down by a whole factor.
        epochs: passes over the images, at most.
        seconds: of teaching, at most, for all fronts together.
        patience: epochs without a growing saving on validation images, after which teaching ends; 0 never stops early.
        sharpness: power of the soft assignments that are taught.
        mirror: teach mirrored images too; turn it off where left and right matter, as in writing.
        match: teach what the encoder answers to the very view that the front sees, three in ten with a part of another
            image; every epoch takes a pass of the encoder more.
        learning_rate: its peak, for batches of 256 images.
        devices: processes that teach together, on a GPU each where there are any (DistributedDataParallel).
        folder: for checkpoints; a fit that was interrupted goes on from the last one.
        network: a torch.nn.Module of your own, images to features, (N, D); it is copied, never changed.
    """

    kind: Literal["none", "auto", "module"] = option("none", flag="front")
    macs: float | list[float] | tuple[float, ...] = option(0.08, "(0, 1)", flag="front_macs")
    time: float = option(0.1, "(0, 1)", flag="front_time")
    width: int | None = option(None, "[1, inf)", flag="front_width")
    depth: int = option(1, "[1, inf)", flag="front_depth")
    side: int = option(64, "[4, inf)", flag="front_side")
    epochs: int = option(40, "[1, inf)", flag="front_epochs")
    seconds: float | None = option(None, "(0, inf)", flag="front_seconds")
    patience: int = option(8, "[0, inf)", flag="front_patience")
    sharpness: float = option(8.0, "(0, inf)", flag="front_sharpness")
    mirror: bool = option(True, flag="front_mirror")
    match: bool = option(False, flag="front_match")
    learning_rate: float = option(0.4, "(0, inf)", flag="front_learning_rate")
    devices: int = option(1, "[1, inf)", flag="front_devices")
    folder: str | None = option(None, flag="front_folder")
    network: Any = option(None, flag=PYTHON)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.shares or not all(0 < share < 1 for share in self.shares):
            raise InputError(f"macs (--front_macs) must be shares in (0, 1); got {shown(self.macs)}")
        if self.network is not None and self.kind != "module":
            raise InputError(f'a network of your own needs front="module"; got {self.kind!r}')

    @classmethod
    def of(cls, value: Any) -> "Front":
        """As for every group; None means none, and a module `Front("module", network=module)`."""
        if isinstance(value, (cls, str)):
            return super().of(value)
        return cls() if value is None else cls("module", network=value)

    @property
    def shares(self) -> list[float]:
        """Of the encoder's multiply-adds, one a front."""
        several = self.macs if isinstance(self.macs, (list, tuple)) else [self.macs]
        return [float(share) for share in several]


@dataclass(frozen=True)
class Clusters(Group):
    """What the full encoder answers.

    Attributes:
        spherical: compare final features by direction (cosine) instead of Euclidean distance.
        supervised: the encoder gives one logit a class (n_clusters of them); nothing is clustered, and exits learn the
            classes `y` of fit(), or the encoder's own answers without them.
        centroids: final centroids of your own, (K, F), instead of k-means; n_clusters as an array sets them.
        head: of your own, from final features, (N, F), to logits, (N, K), or labels, (N,) int: a module, a callable or
            a fitted classifier of scikit-learn; n_clusters sets one that gives logits.
    """

    spherical: bool = True
    supervised: bool = False
    centroids: Any = option(None, flag=PYTHON)  # a tuple of tuples; checked where it is made
    head: Any = option(None, flag=PYTHON)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.supervised and (self.centroids is not None or self.head is not None):
            raise InputError("in the supervised mode the encoder's classes are the clusters; no centroids, no head")
        if self.centroids is not None and self.head is not None:
            raise InputError("centroids and a head are two answers; leave one out")
        if self.head is not None and not is_head(self.head):
            raise InputError(f"a head is a module, a callable or a fitted classifier; got {shown(self.head)}")


def is_head(value: Any) -> bool:
    """Whether something may stand on an encoder: it is called, or is a classifier of scikit-learn."""
    return callable(value) or hasattr(value, "predict_proba")


@dataclass(frozen=True)
class Calibration(Group):
    """How thresholds are set, and what is certified of them.

    Attributes:
        guarantee: overall; cluster, for the images of every final cluster; exit, for those that leave at every exit
            with every label; or expectation (docs/certificates.md).
        thresholds: search (one for every exit and cluster, of least cost), exit (one for every exit) or cbt (one for
            every cluster: class based thresholding).
        cost: what thresholds and exits="auto" save: macs (multiply-adds), or time as measured in fit().
        holdout: share of the images that fit() keeps for thresholds and certificate; with 0 nothing exits early until
            calibrate() is called.
        audit: share of the images that leave early which go on to the end all the same, to see whether the certificate
            still holds; 0 turns it off.
        false_alarm: probability of a false alarm of the audit, however long it goes on.
    """

    guarantee: Guarantee = "overall"
    thresholds: Literal["search", "exit", "cbt"] = "search"
    cost: Literal["macs", "time"] = "macs"
    holdout: float = option(0.2, "[0, 1)")
    audit: float = option(0.0, "[0, 1]")
    false_alarm: float = option(0.01, "(0, 1)")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.audit and self.guarantee == "expectation":
            raise InputError(
                'guarantee "expectation" lets a single model disagree more than asked, which no audit can tell from '
                'drift; use guarantee "overall", or audit 0'
            )


@dataclass(frozen=True)
class Runtime(Group):
    """How the cascade is run.

    Attributes:
        precision: of the encoder and all its answers, those of the full encoder too: float32, or bfloat16, which is
            faster where the hardware has it.
        compile: run full batches through torch.compile; falls back with a warning where it does not work.
        num_workers: processes that decode images.
        max_pixels: of one image file; larger ones are skipped. Decoding takes about 7 bytes a pixel.
        image_key: under which datasets of mappings, or Parquet files, have the image; found if not set.
        progress: show progress bars on a terminal.
    """

    precision: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False
    num_workers: int = option(0, "[0, 1024]")
    max_pixels: int = option(89_478_485, "[1, inf)")  # beyond, Pillow warns
    image_key: str | None = None
    progress: bool = True


@dataclass(frozen=True)
class Settings(Group):
    """All parameters of `ExitClusterer` but its encoder and preprocessing.

    Attributes:
        n_clusters: K, the number of final clusters; "auto" chooses it by silhouette x stability.
        exits: names of exit points, "auto", or `Exits`.
        rule: name of an exit rule, or `Rule`.
        max_disagreement: share of images whose label may differ from the full encoder's.
        confidence: with which that must hold; 0.5 asks for no safety margin.
        batch_size: images a stage runs on at a time.
        device: auto (CUDA where there is one), cpu, cuda, cuda:1, ...
        random_state: seed of the hold-out split, of the order of images in fit, of k-means and of teaching.
        front: see `Front`.
        clusters: see `Clusters`.
        calibration: see `Calibration`.
        runtime: see `Runtime`.
    """

    n_clusters: int | Literal["auto"] = option(10, "[1, inf)")
    exits: Exits = Exits()
    rule: Rule = Rule()
    max_disagreement: float = option(0.02, "(0, 1)")
    confidence: float = option(0.95, "(0, 1)")
    batch_size: int = option(256, "[1, 1000000]")
    device: str = "auto"
    random_state: int = option(0, "[0, inf)", flag="seed")
    front: Front = Front()
    clusters: Clusters = Clusters()
    calibration: Calibration = Calibration()
    runtime: Runtime = Runtime()

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> "Settings":
        """What `to_dict` returned.

        Raises:
            InputError: names or values that are not legal.
        """
        try:
            values: dict[str, Any] = {k: GROUPS[k](**v) if k in GROUPS else v for k, v in saved.items()}
            return cls(**values)
        except TypeError as error:
            raise InputError(f"these are no settings of this version: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """Nested dictionaries of plain values, for JSON; without a network, centroids and a head of the user's, which
        are a model's own."""
        front, clusters = replace(self.front, network=None), replace(self.clusters, centroids=None, head=None)
        return asdict(replace(self, front=front, clusters=clusters))

    @property
    def k(self) -> int:
        """n_clusters, once it is a number."""
        assert self.n_clusters != "auto"
        return self.n_clusters

    def parameters(self) -> dict[str, Any]:
        """Parameters of `ExitClusterer` by name, groups as they are."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def nested(self, **changes: Mapping[str, Any]) -> "Settings":
        """With some fields of some groups replaced: `nested(runtime={"compile": True})`."""
        return replace(self, **{name: replace(getattr(self, name), **parts) for name, parts in changes.items()})


GROUPS: dict[str, type[Group]] = {
    "exits": Exits,
    "rule": Rule,
    "front": Front,
    "clusters": Clusters,
    "calibration": Calibration,
    "runtime": Runtime,
}
