"""Which encoders are cut into stages, and where? One of every family of torchvision, timm and transformers.

    OMP_NUM_THREADS=1 uv run python benchmarks/zoo.py                  # all, about 20 minutes on one core
    OMP_NUM_THREADS=1 uv run python benchmarks/zoo.py timm:levit_128s  # some, examined before or not

Of every module of torchvision.models and timm.models the architecture with the fewest parameters, with random weights,
to which noise is added so that layers which start at zero take part; and the vision models of transformers in tiny
configurations. Images are noise, of the smallest size that the architecture takes. Each runs in a forked process and
has ten minutes. Printed are the exit points, how many of them lie between 1 and 95 % of the cost, how many "auto"
chooses, and the cost of the first and the last below 1; the largest difference between all stages one after another and
the encoder itself; how far the features of an image alone are from those in a batch, relative to their norm, in the
encoder and in the stages; and how far those of the copy for inference are. What is done stands in data/zoo.jsonl;
started again, the script does what is missing.
"""

import argparse
import json
import multiprocessing
import sysconfig
import time
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from multiprocessing.connection import Connection

import timm
import torch
from common import ROOT, report
from torch import Tensor, nn
from torchvision import models

from ssl_exit import list_exits
from ssl_exit.encoders.architectures import library_of
from ssl_exit.encoders.graph import as_module
from ssl_exit.encoders.opaque import features_of
from ssl_exit.encoders.stages import split
from ssl_exit.encoders.tapped import TappedEncoder
from ssl_exit.errors import InputError
from ssl_exit.report.tables import text_table

LOG, CHOSEN = ROOT / "data" / "zoo.jsonl", ROOT / "data" / "zoo-families.json"
SECONDS = 600
BATCH = 3
SIZES = (32, 64, 96, 128, 160, 192, 224, 240, 256, 384)
NOISE = 0.02
VIT = {"hidden_size": 32, "num_hidden_layers": 8, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 32}
VIT |= {"patch_size": 8}
DINOV2 = {key: value for key, value in VIT.items() if key != "intermediate_size"}
MAPS = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
TRANSFORMERS = {
    "Dinov2Model": DINOV2,
    "Dinov2WithRegistersModel": DINOV2 | {"num_register_tokens": 2},
    "DINOv3ViTModel": VIT | {"num_register_tokens": 2},
    "ViTModel": VIT,
    "CLIPVisionModel": VIT,
    "SiglipVisionModel": VIT,
    "ResNetModel": MAPS | {"embedding_size": 8, "layer_type": "basic"},
    "ConvNextModel": MAPS,
    "ConvNextV2Model": MAPS,
}


def families() -> dict[str, str]:
    """An encoder of every family, by the family's name: "timm.levit" -> "timm:levit_128s"."""
    if CHOSEN.is_file():
        return json.loads(CHOSEN.read_text())
    members: dict[str, list[str]] = {}
    for name in models.list_models(models):
        family = models.get_model_builder(name).__module__.rpartition(".")[2]
        members.setdefault(f"torchvision.{family}", []).append(name)
    for family in timm.list_modules():
        names = [f"timm:{name}" for name in timm.list_models(module=family) if not name.startswith("test_")]
        members[f"timm.{family}"] = names
    chosen = {family: min(names, key=n_parameters) for family, names in members.items()}
    chosen |= {f"transformers.{name}": f"transformers:{name}" for name in TRANSFORMERS}
    CHOSEN.parent.mkdir(exist_ok=True)
    CHOSEN.write_text(json.dumps(chosen, indent=1))
    return chosen


def n_parameters(name: str) -> int:
    if not name.startswith("timm:"):
        return models.get_model_weights(name)["DEFAULT"].meta["num_params"]
    with torch.device("meta"):
        return sum(p.numel() for p in network(name, {}).parameters())


def network(name: str, options: dict) -> nn.Module:
    return library_of(name).build(name, options, download=False).module.eval()


def networks(name: str) -> Iterator[tuple[nn.Module, int]]:
    """Networks, and the sizes of images to try with them."""
    library, _, kind = name.rpartition(":")
    if library == "transformers":
        yield network(name, TRANSFORMERS[kind]), VIT["image_size"]
        return
    plain = network(name, {})
    for size in SIZES:
        try:
            yield network(name, {"img_size" if library else "image_size": size}), size
        except InputError:  # it takes no such option, or not this size
            yield plain, size


def smallest(name: str) -> tuple[nn.Module, Tensor]:
    """A network and images of the smallest size that it takes."""
    for model, size in networks(name):
        images = torch.randn(BATCH, 3, size, size)
        try:
            with torch.no_grad():
                features_of(model(images), images)
        except Exception as error:  # whatever its code raises
            reason = f"{type(error).__name__}: {error}"
        else:
            return model, images
    raise SystemExit(f"{name} takes images of no size; the last said {reason}")


def far(features: Tensor, expected: Tensor) -> float:
    """The largest relative difference of an image's features."""
    return float(((features - expected).norm(dim=1) / expected.norm(dim=1)).max())


@torch.no_grad()
def examine(name: str) -> dict:
    """What is printed of one architecture."""
    torch.manual_seed(0)
    model, images = smallest(name)
    for parameter in model.parameters():
        parameter += NOISE * torch.randn_like(parameter)
    model.train().eval()  # clears what some compute once from their parameters
    start = time.perf_counter()
    facts = {"size": images.shape[-1], "parameters": sum(p.numel() for p in model.parameters())}

    def features(encoder: nn.Module, of: Tensor) -> Tensor:
        return features_of(encoder(of.clone()), of).flatten(1)

    whole, singles = features(model, images), images.split(1)
    facts |= {"alone": far(torch.cat([features(model, one) for one in singles]), whole)}
    facts |= {"between images": far(whole.roll(1, 0), whole)}
    try:
        points = list_exits(model, images)
        costs = [point.cost for point in points if point.cost < 1]
        staged = split(model, [point.name for point in points], images).eval()
        facts |= {"exits": len(points), "first": min(costs, default=None), "last": max(costs, default=None)}
        facts |= {"usable": sum(0.01 <= cost <= 0.95 for cost in costs)}
        facts |= {"difference": float((features(staged, images) - whole).abs().max())}
        facts |= {"alone in stages": far(torch.cat([features(staged, one) for one in singles]), whole)}
        facts |= {"changed": far(features(as_module(model), images), whole)}
        tapped = TappedEncoder.build(model, "auto", images).eval()
        facts |= {"auto": len(tapped.descriptors)}
        fast = tapped.for_inference("float32", images.shape[1:])
        facts |= {"rewritten": fast.channels_last}
        facts |= {"fast": far(fast.final_features(fast.enter(images)), tapped.final_features(images.clone()))}
    except InputError as error:
        facts |= {"error": str(error).replace(sysconfig.get_path("purelib") + "/", "")}
    return facts | {"seconds": round(time.perf_counter() - start, 1)}


def _send(name: str, to: Connection) -> None:
    warnings.simplefilter("ignore")
    try:
        to.send(examine(name))
    except BaseException as error:  # what should have been an InputError
        to.send({"failure": f"{type(error).__name__}: {error}"})


def examined(name: str) -> dict:
    """`examine` in a process of its own."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_send, args=(name, theirs))
    process.start()
    theirs.close()
    try:
        facts = ours.recv() if ours.poll(SECONDS) else {"failure": f"no end after {SECONDS} s"}
    except EOFError:
        facts = {"failure": "the process died"}
    process.kill()
    process.join()
    return facts


def row(family: str, facts: dict) -> tuple[str, ...]:
    def shown(key: str, form: str) -> str:
        return "-" if facts.get(key) is None else format(facts[key], form)

    forms = {"size": "d", "exits": "d", "usable": "d", "auto": "d", "first": ".3f", "last": ".3f", "difference": ".1g"}
    forms |= {"alone": ".1g", "alone in stages": ".1g", "fast": ".1g", "seconds": ".1f"}
    why = facts.get("failure") or facts.get("error") or ""
    return family, facts["name"], *(shown(key, form) for key, form in forms.items()), why.partition("\n")[0][:150]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="encoders, such as timm:levit_128s; all if none is named")
    args = parser.parse_args()
    torch.set_num_threads(1)  # and processes can be forked
    chosen = families()
    lines = LOG.read_text().splitlines() if LOG.is_file() else []
    known = {facts["name"]: facts for facts in map(json.loads, lines)}
    for name in args.names or [name for name in chosen.values() if name not in known]:
        known[name] = {"name": name} | examined(name)
        with LOG.open("a") as log:
            log.write(json.dumps(known[name]) + "\n")
        print(*row("", known[name]), sep="  ", flush=True)
    figures = {family: known[name] for family, name in chosen.items() if name in known}
    header = ("family", "name", "size", "exits", "usable", "auto", "first", "last", "difference", "alone")
    header += ("alone, stages", "fast", "s", "why not")
    print("\n" + text_table(header, [row(*item) for item in figures.items()]))
    if len(figures) == len(chosen):
        versions = {name: version(name) for name in ("timm", "transformers")}
        report("zoo", {"versions": versions, "encoders": figures})


if __name__ == "__main__":
    main()
