"""Write docs/parameters.md from ssl_exit/settings.py: uv run python docs/make_parameters.py"""

import re
from pathlib import Path

from ssl_exit.settings import GROUPS, Optimization, Settings, TrainingRun, options_of

HEAD = """# Parameters

Made from `ssl_exit/settings.py` by `docs/make_parameters.py`. In Python a group is a parameter of `ExitClusterer`, such
as `runtime=Runtime(precision="bfloat16")`; its first field may stand for it (`rule="mlp"`), and scikit-learn reaches a
field as `runtime__precision`. On the command line and in configuration files every field has the name in the first
column.
"""


def table(cls: type, own: bool = False) -> str:
    """One row a parameter; with `own` those that belong to no group."""
    rows = ["| option | in Python | type | default | meaning |", "| --- | --- | --- | --- | --- |"]
    for o in options_of(cls):
        if own and o.group:
            continue
        kind = re.sub(r"<class '(\w+)'>", r"\1", str(o.type)).replace("typing.", "").replace("|", "\\|")
        kind += f" in {o.within}" if o.within else ""
        rows.append(f"| `{o.flag}` | `{o.name}` | {kind} | `{o.default!r}` | {o.help} |")
    return "\n".join(rows)


def page() -> str:
    """The text of docs/parameters.md."""
    parts = [HEAD, f"## ExitClusterer\n\n{table(Settings, own=True)}\n"]
    for name, group in GROUPS.items():
        parts.append(f"## {group.__name__}: `{name}=`\n\n{group.__doc__.partition(chr(10))[0]}\n\n{table(group)}\n")
    for group in (Optimization, TrainingRun):
        parts.append(f"## {group.__name__}, in training\n\n{group.__doc__.partition(chr(10))[0]}\n\n{table(group)}\n")
    return "\n".join(parts)


if __name__ == "__main__":
    (Path(__file__).parent / "parameters.md").write_text(page())
