"""The command line: ssl-exit demo | train | fit | predict | evaluate | list-exits, each with --help and --config."""

import json
import sys
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from safetensors.torch import save_file

from ssl_exit.clusterer import ExitClusterer
from ssl_exit.data.images import FolderImages
from ssl_exit.data.pixels import digits_pixels
from ssl_exit.data.preprocessing import METADATA, Preprocessing
from ssl_exit.encoders import graph
from ssl_exit.encoders.build import EncoderSpec
from ssl_exit.encoders.tapped import TappedEncoder
from ssl_exit.errors import InputError
from ssl_exit.fingerprint import fingerprint
from ssl_exit.labels import LabelsFile
from ssl_exit.report.tables import exit_points_table, exit_table, explanation_table, summary, text_table
from ssl_exit.saving import load
from ssl_exit.storage import check_file, check_model_folder, whole_file

NOT_COMPARED = ("out", "resume", "device", "devices", "num_workers", "logger", "precision", "compile", "monitor_every")
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def demo(out: str | None = None, seed: int = 0, epochs: int = 60) -> None:
    """Train an encoder on handwritten digits without labels and cluster unseen ones with early exits.

    Needs no network and no GPU; takes about half a minute.

    Args:
        out: folder to write the model, labels.csv, report.json and exits.png into.
        seed: of the split, the training and the clustering.
        epochs: passes over the images in training.
    """
    from ssl_exit.demo import run_demo

    run_demo(Path(out) if out else None, seed, epochs)


def train(
    encoder: str,
    data: str,
    out: str,
    method: str = "simclr",
    options: dict[str, Any] | None = None,
    weights: str | None = None,
    views: str = "auto",
    exits: str | list[str] = "auto",
    descriptor: str = "auto",
    epochs: int = 200,
    batch_size: int = 128,
    optimizer: str = "sgd",
    learning_rate: float = 0.06,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    schedule: str = "cosine",
    size: int = 32,
    crop: float = 1.0,
    mean: list[float] = IMAGENET_MEAN,
    std: list[float] = IMAGENET_STD,
    monitor_share: float = 0.05,
    monitor_every: int = 5,
    precision: str = "auto",
    compile: bool = False,
    device: str = "auto",
    devices: int = 1,
    num_workers: int = 0,
    logger: str = "csv",
    seed: int = 0,
    resume: bool = False,
) -> None:
    """Train an encoder on a folder of images without labels, with its exits in mind; write out/encoder.safetensors.

    Args:
        encoder: a torchvision architecture, timm:NAME, resnet18_cifar, resnet20_cifar, ..., or module:function.
        data: folder of images, searched recursively; or digits, scikit-learn's.
        out: folder for the encoder, checkpoints and logs.
        method: simclr, moco, or distill (self-distillation: exits learn the final clusters).
        options: of the method, such as --options.temperature 0.2 or --options.exit_weight 1 (see docs/training.md).
        weights: weights file to start from.
        views: simclr, moco, light (crops, flips, brightness), drawing, or auto: what suits the method.
        exits: "auto", or names of exit points; what the losses at the exits look at.
        descriptor: auto, average, pyramid or tokens.
        epochs: passes over the images.
        batch_size: images a step, of all devices together.
        optimizer: sgd or adamw.
        learning_rate: its peak, for this batch size.
        momentum: of sgd.
        weight_decay: on all parameters.
        schedule: cosine, or one_cycle.
        size: height and width in pixels of what the encoder sees.
        crop: share of the shorter side kept when images are decoded.
        mean: per channel, of pixels in [0, 1]; one entry for grey images.
        std: per channel, of pixels in [0, 1].
        monitor_share: of the images, kept out of training for a nearest-neighbour monitor; where there is one
            sub-folder a class.
        monitor_every: epochs between two looks.
        precision: auto (bfloat16 where hardware has it), 32-true, bf16-mixed, 16-mixed.
        compile: torch.compile the encoder: half a minute at the start, then faster steps.
        device: auto, cpu or cuda.
        devices: how many of them.
        num_workers: processes that decode images.
        logger: csv, tensorboard or none.
        seed: of everything random.
        resume: go on from the newest checkpoint in out.
    """
    settings = {k: v for k, v in locals().items() if k not in NOT_COMPARED}
    from ssl_exit.training.methods import build_training
    from ssl_exit.training.module import Optimization
    from ssl_exit.training.run import seeded
    from ssl_exit.training.run import train as run_training

    preprocessing = Preprocessing(size, tuple(mean), tuple(std), crop)
    spec = EncoderSpec(encoder, weights)
    file = Path(out) / "encoder.safetensors"
    check_file(file)
    with seeded(seed):
        module = spec.build()
        tapped = TappedEncoder.build(module, exits, torch.zeros(1, len(mean), size, size), descriptor=descriptor)
        training = build_training(
            method,
            tapped,
            preprocessing,
            views=views,
            optimization=Optimization(optimizer, learning_rate, momentum, weight_decay, schedule),
            options=options,
        )
    run_training(
        training,
        digits_pixels() if data == "digits" else data,
        epochs=epochs,
        batch_size=batch_size,
        out=Path(out),
        resume=resume,
        settings=settings,
        monitor_share=monitor_share,
        monitor_every=monitor_every,
        precision=precision,
        compile=compile,
        device=device,
        devices=devices,
        num_workers=num_workers,
        logger=logger,
        seed=seed,
    )
    if not training.trainer.is_global_zero:
        return
    with whole_file(file) as draft:
        state = {k: v.contiguous().clone() for k, v in module.state_dict().items()}
        save_file(state, draft, {METADATA: json.dumps(preprocessing.to_dict())})
    print(f"{epochs} epochs; encoder written to {file}")


def fit(
    encoder: str,
    data: str,
    out: str,
    weights: str | None = None,
    n_clusters: int = 10,
    exits: str | list[str] = "auto",
    rule: str = "centroid",
    rule_options: dict[str, Any] | None = None,
    thresholds: str = "search",
    cost: str = "macs",
    precision: str = "float32",
    compile: bool = False,
    patience: int = 1,
    ensemble: bool = False,
    mirror: bool = False,
    max_disagreement: float = 0.02,
    confidence: float = 0.95,
    guarantee: str = "overall",
    audit: float = 0.0,
    size: int | None = None,
    crop: float | None = None,
    mean: list[float] | None = None,
    std: list[float] | None = None,
    descriptor: str = "auto",
    accumulate: bool = True,
    normalize: bool = False,
    spherical: bool = True,
    holdout: float = 0.2,
    batch_size: int = 256,
    num_workers: int = 0,
    device: str = "auto",
    seed: int = 0,
) -> None:
    """Fit clusters, exits and thresholds to a folder of unlabelled images, and save the model.

    Args:
        encoder: a torchvision architecture, timm:NAME, resnet20_cifar, resnet56_cifar, or
            module:function (found in the current folder or on the Python path).
        data: folder of images, searched recursively; no labels are used.
        out: folder for the model.
        weights: weights file (.safetensors, .pt, .pth, .ckpt), or DEFAULT to download.
        n_clusters: number of clusters.
        exits: "auto", or names of exit points (see list-exits).
        rule: centroid, mahalanobis, kmeans, prototypes, euclidean, e2cm, e2cm_released, sdn, branchynet, eenet, mlp,
            or two joined as centroid+sdn.
        rule_options: of the rule, such as --rule-options.hidden 64.
        thresholds: search (for every exit and cluster), exit (one for every exit) or cbt (one for every cluster).
        cost: what thresholds and exits save: macs, or time as measured here.
        precision: of the encoder and all its answers: float32 or bfloat16.
        compile: run full batches through torch.compile.
        patience: leave only where so many consecutive exits agree; 1 = off.
        ensemble: answer with the geometric mean of all exits so far.
        mirror: fit rules on mirrored images too; a second pass.
        max_disagreement: share of images whose label may differ from the whole encoder's.
        confidence: with which that must hold.
        guarantee: overall; cluster, for the images of every final cluster; exit, for those that leave at every exit
            with every label; or expectation (see docs/certificates.md).
        audit: share of the images that leave early which predict takes to the end too, to see whether the certificate
            still holds; 0: none.
        size: height and width in pixels of what the encoder sees; like crop, mean and std, if it is not given that of
            the training where the weights say so (those that `train` wrote, and DEFAULT), else 224 (1, ImageNet's).
        crop: share of the shorter side kept by the centre crop.
        mean: per channel, of pixels in [0, 1]; one entry for grey images.
        std: per channel, of pixels in [0, 1].
        descriptor: auto, average, pyramid, tokens or flatten.
        accumulate: let an exit see the descriptors of earlier exits too.
        normalize: divide descriptors by their L2 norm.
        spherical: compare final features by direction.
        holdout: share of the images kept for thresholds and certificate.
        batch_size: images a stage runs on at a time.
        num_workers: processes that decode images.
        device: auto, cpu, cuda, cuda:1, ...
        seed: of the hold-out split, the order of images and k-means.
    """
    spec = EncoderSpec(encoder, weights)
    imported = ":" in encoder and not encoder.startswith("timm:")
    if weights is None and not imported:
        raise InputError(f"encoder {encoder!r} needs --weights: a weights file, or DEFAULT to download")
    check_model_folder(Path(out))  # before hours of work, not after
    c = ExitClusterer(
        spec,
        n_clusters=n_clusters,
        exits=exits,
        rule=rule,
        rule_options=rule_options,
        thresholds=thresholds,
        cost=cost,
        precision=precision,
        compile=compile,
        patience=patience,
        ensemble=ensemble,
        mirror=mirror,
        max_disagreement=max_disagreement,
        confidence=confidence,
        guarantee=guarantee,
        audit=audit,
        batch_size=batch_size,
        device=device,
        random_state=seed,
        descriptor=descriptor,
        accumulate=accumulate,
        normalize=normalize,
        spherical=spherical,
        preprocessing=_preprocessing(spec, {"size": size, "mean": mean, "std": std, "crop": crop}),
        holdout=holdout,
        num_workers=num_workers,
    )
    images = FolderImages(Path(data), c.preprocessing)
    c.fit(images)
    c.save(out)
    _list_skipped(c.skipped_, images.paths)
    times = c.times_
    seconds = (times.stage_seconds.cumsum() + times.exit_seconds.cumsum()) / times.stage_seconds.sum()
    rows = [
        (name, f"{macs:.3f}", f"{time:.3f}")
        for name, macs, time in zip(c.exit_names_, c.cascade_.costs, seconds, strict=True)
    ]
    print(text_table(("exit", "cost, multiply-adds", "cost, measured time"), rows))
    for choice in c.exit_choices_:
        print(choice)
    tapped = c.cascade_.tapped
    kinds = ", ".join(sorted({descriptor.kind for descriptor in tapped.descriptors}))
    print(f"descriptors: {kinds}; an exit sees {'those before it too' if tapped.accumulate else 'its own alone'}")
    certificate = c.certificate_
    print(
        f"{c.n_clusters} clusters of {'directions of ' * c.spherical}final features; k-means saw {c.n_sample_} of "
        f"{c.n_fit_} images\ncertificate: {certificate}\nheld-out images cost {certificate.cost:.3f} of the whole "
        f"encoder; {certificate.cost_without:.3f} without the margin for chance\nmodel written to {out}"
    )


def predict(
    model: str,
    data: str,
    out: str = "labels.csv",
    audit: float | None = None,
    compile: bool | None = None,
    num_workers: int = 0,
    device: str = "auto",
) -> None:
    """Cluster a folder of images with early exits.

    Rows are written as they come; after an interrupt or a kill the same command goes on where it stopped.

    Args:
        model: folder that fit wrote.
        data: folder of images, searched recursively.
        out: CSV file: path, label, exit, score; label -1 for an image that cannot be used.
        audit: share of the images that leave early which go on to the end too; that of fit if not given.
        compile: run full batches through torch.compile; as in fit if not given.
        num_workers: processes that decode images.
        device: auto, cpu, cuda, cuda:1, ...
    """
    c = load(model, device=device, audit=audit, compile=compile)
    c.num_workers = num_workers
    images = FolderImages(Path(data), c.preprocessing)
    about = asdict(fingerprint(c.encoder_, c.cascade_, c.preprocessing))
    key = json.dumps([about, str(Path(data).resolve())])
    skipped: dict[int, str] = {}
    cost, clustered = 0.0, 0
    with LabelsFile(Path(out), images.paths, c.exit_names_, key) as labels:
        before = labels.begun
        if before:
            print(f"going on behind {before} rows of a run that was stopped", file=sys.stderr)
        for result in c.stream(images, labels.begun):
            skipped |= {labels.begun + position: reason for position, reason in result.skipped.items()}
            good = result.labels >= 0
            cost, clustered = cost + result.cost[good].sum(), clustered + int(good.sum())
            labels.add(result)
    _list_skipped(skipped, images.paths)
    mean = f" at mean cost {cost / clustered:.3f} of the whole encoder's multiply-adds" if clustered else ""
    behind = f" (behind the {before} rows of a run that was stopped)" if before else ""
    print(f"{clustered} images clustered{mean}, {len(skipped)} skipped{behind}; written to {out}")
    if c.audit_ is not None:
        print(f"audit: {c.audit_}")


def evaluate(
    model: str,
    data: str,
    out: str | None = None,
    explain: bool = False,
    num_workers: int = 0,
    device: str = "auto",
) -> None:
    """Compare early exit with the whole encoder on a folder of images.

    With one sub-folder a class, ACC, NMI and ARI are reported too.

    Args:
        model: folder that fit wrote.
        data: folder of images that fit did not see.
        out: JSON file for the report.
        explain: also show, per exit, scores, thresholds and what less agreement would release.
        num_workers: processes that decode images.
        device: auto, cpu, cuda, cuda:1, ...
    """
    if out:
        check_file(Path(out))
    c = load(model, device=device)
    c.num_workers = num_workers
    images = FolderImages(Path(data), c.preprocessing)
    found = c.evaluate(images, images.targets)
    _list_skipped(found.result.skipped, images.paths)
    print(f"{exit_table(found)}\n\n{summary(found)}\ncertificate               {c.certificate_}")
    report = found.to_dict() | {"certificate": c.certificate_.to_dict()}
    if explain:
        explanation = c.explain(images)
        report["explanation"] = explanation.to_dict()
        print(f"\n{explanation_table(explanation)}")
    if out:
        with whole_file(Path(out)) as draft:
            draft.write_text(json.dumps(report, indent=1) + "\n")


def list_exits(encoder: str, size: int = 224, channels: int = 3) -> None:
    """List the exit points of an encoder: name, shape of the tensor there, cost so far.

    Args:
        encoder: a torchvision architecture, timm:NAME, resnet20_cifar, resnet56_cifar, or module:function.
        size: height and width in pixels of what the encoder sees.
        channels: 3 for RGB, 1 for grey images.
    """
    points = graph.list_exits(EncoderSpec(encoder).build(), torch.zeros(1, channels, size, size))
    print(exit_points_table(points))


def _preprocessing(spec: EncoderSpec, given: dict[str, Any]) -> Preprocessing:
    """What is given, and for the rest what the weights were trained with, or torchvision's usual."""
    trained = spec.preprocessing()
    found = replace(
        trained or Preprocessing(224, tuple(IMAGENET_MEAN), tuple(IMAGENET_STD)),
        **{name: value for name, value in given.items() if value is not None},
    )
    if trained and found != trained:
        warnings.warn(f"the weights were trained with {trained}, and are used with {found}", stacklevel=2)
    return found


def _list_skipped(skipped: dict[int, str], paths: list[str]) -> None:
    for position, reason in sorted(skipped.items()):
        print(f"skipped {paths[position]}: {reason}", file=sys.stderr)


COMMANDS: dict[str, Any] = {
    "demo": demo,
    "train": train,
    "fit": fit,
    "predict": predict,
    "evaluate": evaluate,
    "list-exits": list_exits,
}


def main(args: list[str] | None = None) -> None:
    """Entry point of `ssl-exit`: options may be written --n-clusters or --n_clusters.

    Wrong input ends with one line on stderr and status 2, an interrupt with status 130.
    """
    words = [_underscored(word) for word in (sys.argv[1:] if args is None else args)]
    warnings.formatwarning = lambda message, *_args, **_kwargs: f"ssl-exit: {message}\n"
    sys.path.insert(0, "")  # module:function may lie in the current folder
    about = "Label-free early exit for clustering with self-supervised encoders."
    for notice in (DeprecationWarning, FutureWarning):  # of dependencies; nothing a user here can act on
        warnings.simplefilter("ignore", notice)
    warnings.filterwarnings("ignore", message=".* could not be used")  # commands list them one by one
    try:
        auto_cli(COMMANDS, args=words, as_positional=False, description=about)
    except (InputError, OSError) as error:
        print(f"ssl-exit: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("ssl-exit: interrupted; no output is half-written, and predict and train --resume go on", file=sys.stderr)
        sys.exit(130)


def _underscored(word: str) -> str:
    """--n-clusters=5 -> --n_clusters=5"""
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value if name.startswith("--") else word
