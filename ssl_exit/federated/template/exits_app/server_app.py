"""The server: asks, adds up, and saves the model."""

import json
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from ssl_exit.federated import Federation, fit_federated
from ssl_exit.federated.flower import flower_clients

from .task import clusterer

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    config: Any = context.run_config
    c = clusterer(config)
    how = Federation(rounds=config["rounds"], thresholds=config["thresholds"], guarantee=config["guarantee"],
                     trim=config["trim"])  # fmt: skip
    report = fit_federated(c, flower_clients(grid, config["clients"], config["timeout"]), how)
    out = Path.home() / str(config["out"])  # an absolute path stays as it is
    c.save(out)
    (out.parent / f"{out.name}-report.json").write_text(json.dumps(report.to_dict(), indent=1))
    print(f"{c.certificate_}\n{report.bytes_up:,} bytes up, {report.bytes_down:,} down; model written to {out}")
