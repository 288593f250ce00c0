"""Compare exit rules on your own images: what each costs at a wanted agreement.

    uv run python examples/09_compare_rules.py

The encoder here is untrained and the images are scikit-learn's digits, so that the example runs anywhere in a few
seconds; put yours in their place. Every rule sees the same images, the same exits and the same final clusters.
"""

import warnings

import torch
from sklearn.datasets import load_digits

from ssl_exit import Calibration, ExitClusterer, Exits, Rule, Runtime
from ssl_exit.encoders.small import digits_encoder

images = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 16
fit, test = images[:1300], images[1300:]
torch.manual_seed(0)
encoder = digits_encoder()

warnings.filterwarnings("ignore", message="no image exits early")
print(f"{'rule':<12}  cost at 98 %, 95 %, 90 % agreement on {len(test)} unseen images")
points = ["block2", "block5"]
for name, options in [
    ("centroid", {}),
    ("e2cm", {"exits": Exits(points, "average", accumulate=False), "calibration": Calibration(thresholds="exit")}),
    ("prototypes", {}),
    ("sdn", {}),
    ("mlp", {"rule": Rule("mlp", {"hidden": 64, "epochs": 5})}),
]:
    settings = {"rule": name, "exits": points, "max_disagreement": 0.05, "runtime": Runtime(progress=False)}
    c = ExitClusterer(encoder, **settings | options).fit(fit)
    cost, agreement = c.trade_off(test)
    print(f"{name:<12}  " + "  ".join(f"{cost[agreement >= asked].min():.3f}" for asked in (0.98, 0.95, 0.9)))
