"""ssl-exit evaluate"""

from pathlib import Path


def evaluate(
    model: str,
    data: str,
    out: str | None = None,
    explain: bool = False,
    num_workers: int = 0,
    max_pixels: int | None = None,
    trust: str | None = None,
    device: str = "auto",
) -> None:
    """Compare early exit with the full encoder on a folder of images.

    With one sub-folder a class, ACC, NMI and ARI are reported too.

    Args:
        model: folder that fit wrote.
        data: folder of images that fit did not see.
        out: JSON file for the report.
        explain: also show, per exit, scores, thresholds and what less agreement would release.
        num_workers: processes that decode images.
        max_pixels: of one image file, larger ones are skipped; as in fit if not set.
        trust: the module:function of a model whose encoder was built by code of yours (on the Python path): it is
            imported and called.
        device: auto, cpu, cuda, cuda:1, ...
    """
    from ssl_exit.cli.common import list_skipped, write_json
    from ssl_exit.clusterer import load
    from ssl_exit.data.images import open_files
    from ssl_exit.files import check_file
    from ssl_exit.report.tables import evaluation_report, explanation_table

    if out:
        check_file(Path(out))
    c = load(model, device=device, trust=trust)
    c.set_params(runtime__num_workers=num_workers)
    images = open_files(Path(data), c.preprocessing, max_pixels or c.runtime.max_pixels, c.runtime.image_key)
    evaluation = c.evaluate(images, images.targets)
    list_skipped(evaluation.result.skipped, images.paths)
    print(evaluation_report(evaluation, c.certificate_))
    report = evaluation.to_dict() | {"certificate": c.certificate_.to_dict()}
    if explain:
        explanation = c.explain(images)
        report["explanation"] = explanation.to_dict()
        print(f"\n{explanation_table(explanation)}")
    if out:
        write_json(Path(out), report)
