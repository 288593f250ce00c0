"""ssl-exit federated demo: ten clients with handwritten digits, beside one fit of all images and fits of each alone."""

from pathlib import Path
from typing import Any

SHARES = (0.25, 0.6)  # of the images: public ones, to train the encoder, and those of the clients; the rest is tested
EPS = 0.1  # a client's hundred images certify no less


def federated_demo(
    out: str | None = None, clients: int = 10, alpha: float = 0.3, seed: int = 0, epochs: int = 40
) -> None:
    """Fit a model over ten simulated clients with handwritten digits, in this process.

    Needs no network and no GPU, and takes about a minute.

    Args:
        out: folder to write report.json and federated.png into.
        clients: how many.
        alpha: of the Dirichlet split; 0.1 makes clients very unlike each other, 100 alike.
        seed: of the split, the training and the clustering.
        epochs: passes over the public images in training.
    """
    run_federated_demo(Path(out) if out else None, clients, alpha, seed, epochs)


def run_federated_demo(
    out: Path | None, clients: int, alpha: float, seed: int, epochs: int, progress: bool = True
) -> dict[str, Any]:
    """Train an encoder on public images, fit over clients, of all their images, and of each alone; print and return a
    report.

    Args:
        out: a folder for report.json and federated.png; None writes nothing.
        clients: how many.
        alpha: of the Dirichlet split.
        seed: of the split, the training and the clustering.
        epochs: of SimCLR training.
        progress: show progress bars on a terminal.
    """
    import time
    import warnings

    import numpy as np

    from ssl_exit import Runtime
    from ssl_exit.cli.common import write_json
    from ssl_exit.cli.demo import train_encoder
    from ssl_exit.clusterer import ExitClusterer
    from ssl_exit.federated import Client, Federation, dirichlet_split, fit_federated, local_clients
    from ssl_exit.files import atomic_file
    from ssl_exit.report.plots import plot_federated
    from ssl_exit.training.loader import digits_images

    start = time.perf_counter()
    digits = digits_images()
    images, targets = digits.images, digits.targets
    assert targets is not None
    order = np.random.default_rng(seed).permutation(len(images))
    public, private, test = np.split(order, np.cumsum([round(share * len(images)) for share in SHARES]))
    parts = [private[own] for own in dirichlet_split(targets[private], clients, alpha, seed)]
    composition = np.stack([np.bincount(targets[part], minlength=10) for part in parts])
    print(f"{len(public)} public digits to train the encoder, {len(private)} of {clients} clients, {len(test)} to test")
    encoder = train_encoder(images[public], seed, epochs, progress)

    def clusterer() -> ExitClusterer:
        return ExitClusterer(encoder, 10, max_disagreement=EPS, random_state=seed, runtime=Runtime(progress=False))

    def judged(c: ExitClusterer) -> dict[str, float]:
        e = c.evaluate(images[test], targets[test])
        return {"agreement": e.agreement, "cost_macs": e.cost_macs, "acc": e.metrics["acc"]}

    federated = clusterer()
    here = {i: Client(clusterer(), images[part]) for i, part in enumerate(parts)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that some clients alone certify nothing is what the table says
        report = fit_federated(federated, local_clients(here), Federation())
        alone = [judged(clusterer().fit(images[part])) for part in parts if len(part) >= 40]
        pooled = clusterer().fit(images[private])
        result: dict[str, Any] = {
            "federated": judged(federated),
            "pooled": judged(pooled),
            "local": {name: float(np.mean([one[name] for one in alone])) for name in alone[0]} if alone else {},
        }
    print(f"\n{'':<12}{'agreement':>10}{'cost':>8}{'ACC':>8}")
    for name, row in result.items():
        if row:
            print(f"{name:<12}{row['agreement']:>10.3f}{row['cost_macs']:>8.3f}{row['acc']:>8.3f}")
    print(f"\nfederated: {federated.certificate_}")
    if worst := report.worst:
        print(f"worst client: {worst.disagreements:.0f} of its {worst.n} images disagree (at most {worst.bound:.1%})")
    print(f"{report.bytes_up / clients:,.0f} bytes up and {report.bytes_down / clients:,.0f} down a client")
    result |= {
        "bytes_up": report.bytes_up, "bytes_down": report.bytes_down, "seconds": time.perf_counter() - start,
        "seed": seed, "alpha": alpha, "locals_fitted": len(alone), "certificate": federated.certificate_.to_dict(),
        "clients": report.to_dict()["clients"], "questions": report.questions,
    }  # fmt: skip
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "report.json", result)
        with atomic_file(out / "federated.png") as draft:
            plot_federated(draft, composition, {name: result[name] for name in ("pooled", "federated", "local")})
        print(f"\nwritten to {out}: report.json, federated.png")
    return result
