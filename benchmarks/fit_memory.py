"""Peak memory of fit at 10,000 and at 50,000 images.

    uv run python benchmarks/fit_memory.py

CIFAR-10 JPEG files, decoded as they are needed; frozen SimCLR ResNet-20, K = 10. Each size runs three times in
a process of its own; what is printed is the peak resident memory of that process.
"""

import resource
import subprocess
import sys
import warnings

from common import PREPROCESSING, cifar_folder, clusterer, encoder, report, spread

SIZES = (10_000, 50_000)
REPEATS = 3


def peak_megabytes(n: int) -> float:
    """Fit n images in this process; its peak resident memory."""
    import numpy as np
    from torch.utils.data import Subset

    from ssl_exit.data.image_files import FolderImages

    warnings.simplefilter("ignore")
    folder = FolderImages(cifar_folder() / "train", PREPROCESSING["simclr"])
    chosen = np.random.default_rng(0).permutation(len(folder))[:n].tolist()
    clusterer(encoder("simclr")).fit(Subset(folder, chosen))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    figures = {}
    for n in SIZES:
        runs = [subprocess.run([sys.executable, __file__, str(n)], capture_output=True, text=True, check=True)
                for _ in range(REPEATS)]  # fmt: skip
        figures[n] = spread([float(run.stdout) for run in runs])
        print(f"{n:6d} images: peak {figures[n]['median']:.0f} MB "
              f"({figures[n]['least']:.0f}-{figures[n]['most']:.0f}, {REPEATS} runs)")  # fmt: skip
    print(f"difference of medians: {figures[SIZES[1]]['median'] - figures[SIZES[0]]['median']:.0f} MB")
    report("fit_memory", figures)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(peak_megabytes(int(sys.argv[1])))
    else:
        main()
