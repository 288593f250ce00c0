"""Evaluations as plain text."""

from collections.abc import Sequence

from ssl_exit.encoders.graph import ExitPoint
from ssl_exit.exits.certificate import Certificate
from ssl_exit.measure.evaluation import Evaluation
from ssl_exit.measure.explanation import Explanation
from ssl_exit.model import Model


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns wide enough for their entries; the first left-aligned, the others right-aligned."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in [head, ["-" * w for w in widths], *rows]
    ]
    return "\n".join(line.rstrip() for line in lines)


def exit_table(evaluation: Evaluation) -> str:
    """One row an exit: name, cost so far, share of images leaving there, agreement among them."""
    rows = [
        (row.name, f"{row.cost:.3f}", f"{row.share:.1%}", "-" if row.share == 0 else f"{row.agreement:.1%}")
        for row in evaluation.exits
    ]
    return text_table(("exit", "cost so far", "share leaving", "agreement"), rows)


def summary(evaluation: Evaluation) -> str:
    """Agreement, cost and, where ground truth was given, metrics of early exit and of the full encoder."""
    lines = [
        f"images                    {evaluation.n}"
        + (f" ({evaluation.result.n_skipped} could not be used)" if evaluation.result.skipped else ""),
        f"agreement                 {evaluation.agreement:.4f}  (labels equal to the full encoder's)",
        f"cost, multiply-adds       {evaluation.cost_macs:.3f}   (full encoder = 1, exits' own included)",
        f"cost, measured time       {evaluation.cost_time:.3f}   ({evaluation.images_per_second:,.0f} images/s; full "
        f"encoder {evaluation.images_per_second_full:,.0f}; by its parts' times {evaluation.cost_time_predicted:.3f})",
    ]
    for key in ("acc", "nmi", "ari"):
        if key in evaluation.metrics:
            early, full = evaluation.metrics[key], evaluation.metrics[f"{key}_full"]
            lines.append(f"{key.upper()}, early / full        {early:.4f} / {full:.4f}")
    if evaluation.agreement_float32 < 1:
        lines.append(
            f"full encoder, float32    {evaluation.agreement_float32:.4f} of its labels are the same in float32"
        )
    lines.append(evaluation.verdict)
    if evaluation.teaching_seconds:
        lines.append(break_even(evaluation.teaching_seconds, evaluation.break_even))
    return "\n".join(lines)


def break_even(seconds: float, images: float) -> str:
    """After how many clustered images teaching has paid for itself."""
    if images == float("inf"):
        return f"teaching the front took {seconds:,.0f} s and saves no time here"
    return f"teaching the front took {seconds:,.0f} s; it has paid for itself after {images:,.0f} clustered images"


def evaluation_report(evaluation: Evaluation, certificate: Certificate) -> str:
    """Exits, agreement, cost and certificate."""
    return f"{exit_table(evaluation)}\n\n{summary(evaluation)}\ncertificate               {certificate}"


def fit_summary(model: Model) -> str:
    """Costs of every exit, which exits were kept, descriptors, clusters and certificate of a model."""
    cascade, times, certificate = model.cascade, model.cascade.times, model.certificate
    assert times is not None
    seconds = (times.stage_seconds.cumsum() + times.exit_seconds.cumsum()) / times.stage_seconds.sum()
    costs = zip(cascade.exit_names, cascade.costs, seconds, strict=True)
    rows = [(name, f"{macs:.3f}", f"{time:.3f}") for name, macs, time in costs]
    kinds = ", ".join(sorted({descriptor.kind for descriptor in cascade.tapped.descriptors}))
    seen = "those before it too" if cascade.tapped.accumulate else "its own alone"
    used, directions = model.provenance, "directions of " * model.settings.clusters.spherical
    taught = [f"{name}: {one}" for name, one in zip(cascade.exit_names, used.teaching, strict=False)]
    if used.teaching and certificate.settings:
        spent, fronts = sum(one.seconds for one in used.teaching), len(used.teaching)
        saved = certificate.early * times.stage_seconds.sum() - times.exit_seconds[:fronts].sum()  # exits behind: less
        taught.append(break_even(spent, spent / saved if saved > 0 else float("inf")))
    tried = [(str(c.n_clusters), f"{c.silhouette:.3f}", f"{c.stability:.3f}", f"{c.merit:.3f}") for c in used.counts]
    return "\n".join(
        [
            *([text_table(("n_clusters", "silhouette", "stability", "product"), tried), ""] if tried else []),
            text_table(("exit", "cost, multiply-adds", "cost, measured time"), rows),
            *map(str, used.choices),
            *taught,
            f"descriptors: {kinds}; an exit sees {seen}",
            f"{model.settings.n_clusters} clusters of {directions}final features; k-means saw {used.n_sample} of "
            f"{used.n_fit} images",
            f"certificate: {certificate}",
            f"held-out images cost {certificate.cost:.3f} of the full encoder; {certificate.cost_without:.3f} without "
            "the margin for chance",
        ]
    )


def exit_points_table(points: Sequence[ExitPoint]) -> str:
    """One row a legal exit point."""
    return text_table(
        ("exit point", "shape", "cost"), [(p.name, "x".join(map(str, p.shape)), f"{p.cost:.3f}") for p in points]
    )


def explanation_table(explanation: Explanation) -> str:
    """One row an exit: who comes and leaves, a histogram of scores from 0 to 1, thresholds, and who would leave."""
    lower = list(explanation.released)
    head = ("exit", "reached", "left", "scores 0 to 1", "threshold", "surest 1% agree", *(f"at {a:.0%}" for a in lower))
    rows = [
        (
            row.name,
            str(row.reached),
            str(row.left),
            _bars(row.histogram),
            " ".join("never" if t is None else f"{t:.3f}" for t in dict.fromkeys(row.threshold)),
            f"{row.surest:.1%}",
            *(str(row.released[a]) for a in lower),
        )
        for row in explanation.exits
    ]
    lines = [text_table(head, rows), "", f"{explanation.leaving:.1%} of {explanation.n} images exit early."]
    if explanation.reason:
        lines.append(explanation.reason)
    lines += [f"At {a:.0%} agreement {share:.1%} would." for a, share in explanation.released.items()]
    return "\n".join(lines)


def _bars(histogram: Sequence[int]) -> str:
    """Counts as bars of eight heights; an empty bin is a space, one image is seen."""
    most = max(histogram, default=0)
    return "".join(
        " " if count == 0 else "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"[(8 * count - 1) // most]
        for count in histogram
    )
