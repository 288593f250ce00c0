"""Does early exit save the time that its stages promise? The engine beside the full encoder and what else users run.

    uv run --group bench python benchmarks/speed.py

Per encoder and precision, in one run and in turns: the encoder as its author wrote it, compiled by torch.compile, and
in ONNX Runtime (each with the assignment of its features by FAISS; for bfloat16 under torch.autocast); the whole
encoder in the engine; early exit; and early exit with thresholds at which nothing leaves. Four exits stand at about
equal distances in measured time. Their thresholds are set so that 40, 25, 20 and 20 % of those that reach an exit
leave, on other images: that says nothing of agreement, for the question is the engine's speed. Encoders but ResNet-20
have random weights; images are CIFAR-10's, enlarged where needed.

    predicted    speed-up by the measured time of every segment, its exit included, in turns with the full encoder, and
                 by the shares that reach it
    realised     seconds of the full encoder in the engine / seconds of early exit
    overhead     the exits' own work / the full encoder's time
    idle         seconds of early exit where nothing leaves / seconds of the full encoder in the engine

All are medians over the repeats; latencies are those of `predict` and `predict_full` for one image. Rows of encoders
that are not asked for stay in the results as they are.
"""

import argparse
import copy
import io
import json
import time
from collections.abc import Callable
from dataclasses import replace

import faiss
import numpy as np
import torch
import torch.nn.functional as F
from common import PREPROCESSING, RESULTS, cifar, clusterer, encoder, machine, report, spread
from torch import Tensor, nn

from ssl_exit import EncoderSpec, ExitClusterer
from ssl_exit.cascade.cascade import Cascade
from ssl_exit.cascade.memory import kept_memory
from ssl_exit.cascade.plan import Plan
from ssl_exit.cascade.run import run as engine_run
from ssl_exit.cascade.times import now
from ssl_exit.data.images import open_images
from ssl_exit.encoders.compiling import call_compiled, compile_for_inference
from ssl_exit.fitting.record import record
from ssl_exit.measure.seconds import segment_seconds
from ssl_exit.report.tables import text_table

Way = Callable[[Tensor], np.ndarray]  # images to labels
LEAVING = (0.4, 0.25, 0.2, 0.2)
CALLS = 5  # for every single image
ENCODERS = {  # pixels a side, images a batch, images in all, single images timed
    "resnet20_cifar": (32, 256, 8192, 300),
    "resnet18_cifar": (32, 128, 1024, 200),
    "mobilenet_v3_large": (224, 32, 1024, 200),
    "timm:vit_small_patch16_224": (224, 16, 96, 40),
}
GPU = {"resnet50": (224, 128, 8192, 300), "timm:vit_base_patch16_224": (224, 128, 8192, 300)}


def images_of(size: int, n: int, seed: int) -> Tensor:
    """(n, 3, size, size) float32: test images of CIFAR-10."""
    pixels, _ = cifar("test")
    chosen = np.random.default_rng(seed).permutation(len(pixels))[:n]
    images = PREPROCESSING["simclr"](pixels[chosen])
    return images if size == 32 else F.interpolate(images, size=size, mode="bilinear")


def fitted(name: str, net: nn.Module, images: Tensor, batch: int, precision: str, args: argparse.Namespace):
    """A clusterer with four exits at which given shares leave."""
    settings = {"batch_size": batch, "precision": precision, "device": args.device}
    settings |= {"max_disagreement": 0.5, "confidence": 0.5}
    every = clusterer(net, **settings, holdout=0).fit(images)
    seconds = np.cumsum(every.times_.stage_seconds)
    seconds /= seconds[-1]
    chosen = sorted({int(np.abs(seconds[:-1] - at).argmin()) for at in (0.2, 0.4, 0.6, 0.8)})
    c = clusterer(net, exits=[every.exit_names_[i] for i in chosen], compile=args.compile, **settings)
    c.fit(images[len(images) // 2 :])
    others = images[: len(images) // 2]
    recorded, _ = record(c.model_.cascade, open_images(others).batches(np.arange(len(others)), batch))
    thresholds, here = c.model_.cascade.thresholds.copy(), np.ones(len(others), dtype=bool)
    for e, share in enumerate(LEAVING[: len(chosen)]):
        threshold = float(np.quantile(recorded.scores[here, e], 1 - share))
        thresholds[e] = threshold
        here &= recorded.scores[:, e] < threshold
    c.model_ = replace(c.model_, cascade=c.model_.cascade.at(thresholds))
    return c


def others(
    net: nn.Module, c: ExitClusterer, batch: Tensor, precision: str
) -> dict[str, Callable[[Tensor], np.ndarray]]:
    """What a user would run instead."""
    device = c.model_.cascade.device
    index = faiss.IndexFlatL2(c.cluster_centers_.shape[1])
    index.add(c.cluster_centers_)
    own = copy.deepcopy(net).to(device).eval()
    mode = "reduce-overhead" if device.type == "cuda" else None  # CUDA graphs, as the engine has them

    def labels(features: Tensor) -> np.ndarray:
        return index.search(F.normalize(features.float(), dim=1).cpu().numpy(), 1)[1][:, 0]

    def by(module: nn.Module) -> Way:
        @torch.inference_mode()
        def run(images: Tensor) -> np.ndarray:
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
                features = module(images.to(device))
            return labels(features)

        return run

    found = {"eager + FAISS": by(own), "torch.compile + FAISS": by(torch.compile(own, dynamic=False, mode=mode))}
    if precision == "float32" and device.type == "cpu":
        import onnxruntime

        file = io.BytesIO()
        torch.onnx.export(copy.deepcopy(net).eval(), (batch,), file, dynamo=False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
        (given,) = session.get_inputs()
        found["ONNX Runtime + FAISS"] = lambda x: labels(
            torch.from_numpy(session.run(None, {given.name: x.numpy()})[0])
        )
    return found


class OwnWork(nn.Module):
    """What one exit does: its descriptor, the matrix product of its rule, label and score."""

    def __init__(self, cascade: Cascade, exit_: int) -> None:
        super().__init__()
        self.descriptor, self.rule = cascade.tapped.descriptors[exit_], cascade.rules[exit_]
        self.accumulate = cascade.tapped.accumulate

    def forward(self, x: Tensor, described: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        own = self.descriptor(x)
        described = torch.cat([described, own], dim=1) if self.accumulate else own
        return described, *self.rule(described)


@torch.inference_mode()
def exits_seconds(plan: Plan, work: list[OwnWork], images: Tensor, repeats: int = 5) -> np.ndarray:
    """Seconds of every exit's own work on a full batch, just behind its stage, (E,): medians."""
    device, cascade = images.device, plan.cascade
    taken = np.zeros((repeats + 1, len(work)))
    for r in range(repeats + 1):
        x, described = cascade.tapped.enter(images), torch.empty(len(images), 0, device=device)
        for i, one in enumerate(work):
            x = cascade.tapped.staged.stages[i](x)
            start = now(device)
            described = (call_compiled(one, x, described) if plan.compiled else one(x, described))[0]
            taken[r, i] = now(device) - start
            if plan.compiled:  # CUDA graphs write their next results over these
                described = described.clone()
                torch.compiler.cudagraph_mark_step_begin()
    return np.median(taken[1:], axis=0)


def measured(name: str, precision: str, args: argparse.Namespace) -> dict:
    size, batch, n, singles = (GPU | ENCODERS)[name]
    n, singles = max(2 * batch, n // args.fewer // batch * batch), max(10, singles // args.fewer)
    torch.manual_seed(0)
    net = (encoder("simclr") if name == "resnet20_cifar" else EncoderSpec(name)).build().eval()
    c = fitted(name, net, images_of(size, max(8 * batch, 256), 1), batch, precision, args)
    images = images_of(size, n, 0)
    batches = list(open_images(images).batches(np.arange(n), batch))
    device = c.model_.cascade.device
    model, cascade = c.model_, c.model_.cascade
    never = Plan(cascade.at(np.full_like(cascade.thresholds, np.inf)), compile=args.compile)
    ways: dict[str, Callable[[], object]] = {
        "early exit": lambda: model.run(batches, n, batch),
        "full encoder": lambda: model.run_full(batches, n, batch),
        "nothing leaves": lambda: engine_run(never, batches, n, batch),
    }
    for way, run in others(net, c, images[:batch], precision).items():
        ways[way] = lambda run=run: [run(b.images) for b in batches]
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    rows: dict[str, list[float]] = {key: [] for key in ("predicted", "realised", "overhead", "idle")}
    work = [OwnWork(cascade, i) for i in range(len(cascade.rules))]
    for one in work if args.compile else []:
        compile_for_inference(one, device)
    result = model.run(batches, n, batch)
    stops = len(cascade.rules) + 1
    reached = np.array([(result.exits >= e).mean() for e in range(stops)])
    order = np.random.default_rng(0)
    for repeat in range(args.repeats + 1):
        found = {}
        for way in order.permutation(list(ways)):
            start = now(device)
            ways[way]()
            found[way] = now(device) - start
        segments, whole = segment_seconds(model.plan, model.full_plan, batches[0].images.to(device), batch, 3)
        own = exits_seconds(model.plan, work, batches[0].images.to(device))
        if repeat == 0:
            continue
        for way, taken in found.items():
            seconds[way].append(taken)
        rows["predicted"].append(whole / float(segments @ reached))
        rows["realised"].append(found["full encoder"] / found["early exit"])
        rows["overhead"].append(float(own @ reached[:-1]) / whole)
        rows["idle"].append(found["nothing leaves"] / found["full encoder"])
    one = latencies(c, images[:singles], result.exits[:singles])
    figures = {
        "machine": machine(),
        "settings": {key: getattr(args, key) for key in ("repeats", "fewer", "compile", "device")},
        "encoder": name,
        "precision": precision,
        "exits": c.exit_names_,
        "left": np.bincount(result.exits, minlength=stops).tolist(),
        "batch": batch,
        "n": n,
        "images per second": {way: spread([n / s for s in taken]) for way, taken in seconds.items()},
        "cost, multiply-adds": float(result.cost.mean()),
        **{key: spread(values) for key, values in rows.items()},
        "realised / predicted": float(np.median(rows["realised"]) / np.median(rows["predicted"])),
        "single": one,
    }
    if precision != "float32":
        figures["labels as in float32"] = c.evaluate(images).agreement_float32
    return figures


def latencies(c: ExitClusterer, images: Tensor, exits: np.ndarray) -> dict:
    """Seconds a call for one image, in turns; `realised` by the median call of every image."""
    ways = {"early exit": c.predict, "full encoder": c.predict_full}
    taken = {way: np.zeros((len(images), CALLS)) for way in ways}
    predicted = []
    for i in range(-1, len(images)):  # the first warms up
        for call in range(CALLS):
            for way in list(ways)[:: 1 if call % 2 else -1]:
                start = time.perf_counter()
                ways[way](images[max(i, 0)][None])
                taken[way][i, call] = time.perf_counter() - start
        if i >= 0 and i % 5 == 0:
            image = images[i : i + 1].to(c.model_.cascade.device)
            segments, whole = segment_seconds(c.model_.plan, c.model_.full_plan, image, c.batch_size, 15)
            reached = [(exits >= segment.stages.start).mean() for segment in c.model_.plan.segments]
            predicted.append(whole / float(segments @ reached))
    each = {way: np.median(seconds, axis=1).mean() for way, seconds in taken.items()}
    realised = each["full encoder"] / each["early exit"]
    found = {
        way: {"p50 ms": 1e3 * float(np.quantile(s, 0.5)), "p99 ms": 1e3 * float(np.quantile(s, 0.99)), "n": s.size}
        for way, s in taken.items()
    }
    ratio = float(realised / np.median(predicted))
    return found | {"predicted": spread(predicted), "realised": float(realised), "realised / predicted": ratio}


def draw(rows: list[dict], name: str) -> None:
    """Where the time of early exit goes, the full encoder's being 1: stages, exits, all else."""
    from matplotlib import pyplot as plt

    early = np.array([1 / row["realised"]["median"] for row in rows])
    promised = np.array([1 / row["predicted"]["median"] for row in rows])
    exits = np.array([row["overhead"]["median"] for row in rows])
    parts = {"stages": promised - exits, "exits' own work": exits, "queues and all else": early - promised}
    figure, axes = plt.subplots(figsize=(8, 0.45 * len(rows) + 1.2), layout="constrained")
    left = np.zeros(len(rows))
    for (part, width), colour in zip(parts.items(), ("#4878a8", "#e0a030", "#a04848"), strict=True):
        width = np.maximum(width, 0)  # what else there is can be less than the noise
        axes.barh([f"{row['encoder'].removeprefix('timm:')}, {row['precision']}" for row in rows], width, left=left,
                  label=part, color=colour)  # fmt: skip
        left += width
    axes.axvline(1, color="black", linewidth=1)
    axes.set(xlabel="seconds / the full encoder's in the engine", xlim=(0, 1.05))
    axes.invert_yaxis()
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False)
    figure.savefig(RESULTS / f"{name}.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoders", nargs="+", default=list(GPU if torch.cuda.is_available() else ENCODERS))
    parser.add_argument("--precisions", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--fewer", type=int, default=1, help="divides the number of images")
    parser.add_argument("--compile", action="store_true", help="early exit through torch.compile too")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--name", default="speed_cuda" if torch.cuda.is_available() else "speed", help="of the results")
    args = parser.parse_args()
    file = RESULTS / f"{args.name}.json"
    found = json.loads(file.read_text())["figures"]["rows"] if file.is_file() else []
    for name in args.encoders:
        for precision in args.precisions:
            with kept_memory():  # as the commands of ssl-exit run
                figures = measured(name, precision, args)
            found = [row for row in found if (row["encoder"], row["precision"]) != (name, precision)] + [figures]
            print(f"\n{name}, {precision}: left {figures['left']} of {figures['n']}; images a second, and labels by")
            print("  " + ", ".join(f"{way} {s['median']:,.0f}" for way, s in figures["images per second"].items()))
            report(args.name, {"rows": found})
    keys = ("cost, multiply-adds", "predicted", "realised", "realised / predicted", "overhead", "idle")
    head = ("encoder", *keys, "1 image: predicted", "realised", "p50 ms", "p99 ms", "whole p50", "p99")
    table = []
    for row in found:
        values = [row[key]["median"] if isinstance(row[key], dict) else row[key] for key in keys]
        one = row["single"]
        early, whole = (one[way] for way in ("early exit", "full encoder"))
        values += [one["predicted"]["median"], one["realised"]]
        values += [early["p50 ms"], early["p99 ms"], whole["p50 ms"], whole["p99 ms"]]
        table.append((f"{row['encoder']} {row['precision']}", *(f"{value:.3f}" for value in values)))
    print("\n" + text_table(head, table))
    draw(found, args.name)


if __name__ == "__main__":
    main()
