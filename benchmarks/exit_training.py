"""What training for early exits buys: the same backbone, images, epochs and seeds, with and without it.

    uv run python benchmarks/exit_training.py

ResNet-20 on the 50,000 CIFAR-10 training images (re-encoded as JPEG), K = 10, no labels. Arms:

    simclr          plain SimCLR
    simclr+exits    the contrastive loss at the exits too
    simclr+exits+distilled   then self-distillation onto the final clusters
    simclr+distilled         self-distillation without the loss at the exits
    moco, moco+exits, moco+exits+distilled   likewise
    shared, shared+distilled   a given SimCLR encoder (36 epochs) instead of one trained here

After each, an `ExitClusterer` is fitted to the training images (a fifth held out for temperatures and thresholds), and
on the 10,000 test images measured: accuracy of 200 neighbours, ACC, NMI and ARI of the full encoder, least cost of a
setting on the threshold path at 99, 98 and 95 % agreement, and at an ACC at most one point below the full encoder's.
Costs are multiply-adds relative to the full encoder, exits' own work included. A trained encoder is kept in runs/,
so that a run that was stopped goes on.
"""

import argparse
import json
import time

import numpy as np
import torch
from common import PREPROCESSING, RESULTS, ROOT, SHARED, cifar, clusterer, report, spread
from safetensors.torch import load_file, save_file
from torch import nn

from ssl_exit import ExitClusterer
from ssl_exit.data.images import TensorImages, open_images
from ssl_exit.encoders.build import EncoderSpec
from ssl_exit.encoders.tapped import TappedEncoder
from ssl_exit.exits.thresholds import simulate, trade_off
from ssl_exit.fitting.record import record
from ssl_exit.measure.metrics import against_targets
from ssl_exit.report.tables import text_table
from ssl_exit.training import Optimization, build_training, train
from ssl_exit.training.monitor import knn_accuracy_predictions

HOW = PREPROCESSING["simclr"]
METHODS = {
    "simclr": {"temperature": 0.2, "hidden": 256},
    "moco": {"temperature": 0.1, "hidden": 256},
}
DISTILLED = {"n_clusters": 10}
ASKED = (0.99, 0.98, 0.95)
ARMS = (
    "shared",
    "shared+distilled",
    "simclr",
    "simclr+exits",
    "simclr+exits+distilled",
    "simclr+distilled",
    "moco",
    "moco+exits",
    "moco+exits+distilled",
)


def trained(arm: str, args: argparse.Namespace, seed: int) -> tuple[nn.Module, float]:
    """The encoder of one arm, and seconds of training."""
    *before, last = arm.split("+")
    name = f"{args.encoder}-{arm}-{args.epochs}-{args.distill_epochs}-{seed}"
    folder = ROOT / "runs" / "exit_training" / name
    if arm == "shared":
        return EncoderSpec("resnet20_cifar", str(SHARED / "weights" / "resnet20_cifar10_simclr.safetensors")).build(), 0
    spec = EncoderSpec(args.encoder)
    torch.manual_seed(seed)
    encoder = spec.build()
    file = folder / "encoder.safetensors"
    if file.is_file():
        encoder.load_state_dict(load_file(file))
        return encoder, json.loads((folder / "seconds.json").read_text())
    seconds = 0.0
    if last == "distilled":
        encoder, seconds = trained("+".join(before), args, seed)
    tapped = TappedEncoder.build(encoder, "auto", torch.zeros(1, 3, 32, 32))
    if last == "distilled":
        training = build_training(
            "distill",
            tapped,
            HOW,
            optimization=Optimization("sgd", args.distill_rate, schedule="one_cycle"),
            options=DISTILLED | args.options,
        )
    else:
        options = METHODS[arm.partition("+")[0]] | {"exit_weight": float(last == "exits")}
        how = Optimization("sgd", args.rate, schedule="one_cycle")
        training = build_training(arm.partition("+")[0], tapped, HOW, optimization=how, options=options)
    pixels, targets = cifar("train")
    began = time.perf_counter()
    train(
        training,
        TensorImages(pixels, HOW, targets, pixels=True),
        epochs=args.distill_epochs if last == "distilled" else args.epochs,
        batch_size=256,
        out=folder,
        resume=True,
        compile=True,
        device=args.device,
        seed=seed,
    )
    seconds += time.perf_counter() - began
    save_file({k: v.contiguous() for k, v in encoder.state_dict().items()}, file)
    (folder / "seconds.json").write_text(json.dumps(seconds))
    return encoder, seconds


def measured(encoder: nn.Module, args: argparse.Namespace, seed: int) -> dict:
    """Everything that is printed of one encoder, on the test images."""
    pixels, _ = cifar("train")
    test, targets = cifar("test")
    options = {"epochs": 6} if args.rule == "mlp" else None
    c = clusterer(
        encoder, HOW, rule=args.rule, rule_options=options, batch_size=500, device=args.device, seed=seed
    ).fit(pixels)
    model, images = c.model_, open_images(test, HOW)
    recorded, _ = record(model.cascade, images.batches(np.arange(len(test)), 500))
    cost, agreement = trade_off(model.path, recorded, model.cascade.costs)
    whole = against_targets(recorded.final, targets)
    acc = np.array([against_targets(simulate(recorded, t)[0], targets)["acc"] for t in model.path])
    found = {f"cost at {asked:.0%}": float(np.where(agreement >= asked, cost, np.inf).min()) for asked in ASKED}
    kept = np.where(acc >= whole["acc"] - 0.01, cost, np.inf)
    found |= {"cost at ACC - .01": float(kept.min()), "agreement there": float(agreement[kept.argmin()])}
    found |= {"knn": neighbours(c), **whole, "exits": c.exit_names_}
    found["curve"] = [[float(v) for v in row] for row in zip(cost[::4], agreement[::4], acc[::4], strict=True)]
    return found


def neighbours(c: ExitClusterer) -> float:
    def features(part: str) -> torch.Tensor:
        with torch.inference_mode():
            return torch.cat([c.encoder_(HOW(x)) for x in cifar(part)[0].split(500)])

    c.encoder_.cpu()
    predicted = knn_accuracy_predictions(features("train"), features("test"), cifar("train")[1])
    return float((predicted == cifar("test")[1]).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", default=list(ARMS))
    parser.add_argument("--encoder", default="resnet20_cifar")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--distill-epochs", type=int, default=5)
    parser.add_argument("--rate", type=float, default=0.4)
    parser.add_argument("--distill-rate", type=float, default=0.1)
    parser.add_argument("--options", type=json.loads, default={}, help="of self-distillation, JSON")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rule", default="mlp")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--name", default="exit_training", help="of the results file")
    args = parser.parse_args()
    file = RESULTS / f"{args.name}.json"
    rows: dict[str, list[dict]] = json.loads(file.read_text())["figures"]["rows"] if file.is_file() else {}
    for seed in range(args.seeds):
        for arm in args.arms:
            encoder, seconds = trained(arm, args, seed)
            found = measured(encoder, args, seed) | {"seconds": seconds, "seed": seed, "epochs": args.epochs}
            rows[arm] = [row for row in rows.get(arm, []) if row["seed"] != seed] + [found]
            report(args.name, {"settings": {k: v for k, v in vars(args).items() if k != "arms"}, "rows": rows})
    keys = ("knn", "acc", "nmi", "ari", *(f"cost at {a:.0%}" for a in ASKED), "cost at ACC - .01")
    table = [(arm, *(f"{spread([r[k] for r in each])['median']:.3f}" for k in keys)) for arm, each in rows.items()]
    print(text_table(("arm", *keys), table))


if __name__ == "__main__":
    main()
