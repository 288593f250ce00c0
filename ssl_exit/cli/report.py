"""ssl-exit report"""

from pathlib import Path


def report(
    model: str,
    data: str,
    out: str = "report.html",
    num_workers: int = 0,
    max_pixels: int | None = None,
    trust: str | None = None,
    device: str = "auto",
) -> None:
    """Write a page to look at: what is certified, cost and agreement, galleries of the clusters, time.

    Args:
        model: folder that fit wrote.
        data: folder of images that fit did not see; with one sub-folder a class, clusters are compared with classes.
        out: HTML file, with everything in it.
        num_workers: processes that decode images.
        max_pixels: of one image file, larger ones are skipped; as in fit if not set.
        trust: the module:function of a model whose encoder was built by code of yours (on the Python path): it is
            imported and called.
        device: auto, cpu, cuda, cuda:1, ...
    """
    from ssl_exit.cli.common import list_skipped
    from ssl_exit.clusterer import load
    from ssl_exit.data.images import open_files
    from ssl_exit.files import check_file
    from ssl_exit.report.page import write_report

    check_file(Path(out))
    c = load(model, device=device, trust=trust)
    c.set_params(runtime__num_workers=num_workers)
    images = open_files(Path(data), c.preprocessing, max_pixels or c.runtime.max_pixels, c.runtime.image_key)
    evaluation = c.evaluate(images, images.targets)
    list_skipped(evaluation.result.skipped, images.paths)
    write_report(Path(out), c.model_, images, evaluation)
    print(f"{evaluation.n} images; written to {out}")
