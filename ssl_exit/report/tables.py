"""Evaluations as plain text."""

from collections.abc import Sequence

from ssl_exit.encoders.graph import ExitPoint
from ssl_exit.measure.evaluation import Evaluation


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
    """Agreement, cost and, where ground truth was given, metrics of early exit and of the whole encoder."""
    lines = [
        f"images                    {evaluation.n}"
        + (f" ({len(evaluation.result.skipped)} could not be used)" if evaluation.result.skipped else ""),
        f"agreement                 {evaluation.agreement:.4f}  (labels equal to the whole encoder's)",
        f"cost, multiply-adds       {evaluation.cost_macs:.3f}   (whole encoder = 1, exits' own included)",
        f"cost, measured time       {evaluation.cost_time:.3f}   ({evaluation.images_per_second:,.0f} images/s; whole "
        f"encoder {evaluation.images_per_second_full:,.0f})",
    ]
    for key in ("acc", "nmi", "ari"):
        if key in evaluation.metrics:
            early, full = evaluation.metrics[key], evaluation.metrics[f"{key}_full"]
            lines.append(f"{key.upper()}, early / whole        {early:.4f} / {full:.4f}")
    return "\n".join(lines)


def exit_points_table(points: Sequence[ExitPoint]) -> str:
    """One row a legal exit point."""
    return text_table(
        ("exit point", "shape", "cost"), [(p.name, "x".join(map(str, p.shape)), f"{p.cost:.3f}") for p in points]
    )
