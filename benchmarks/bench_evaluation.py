"""How long does an evaluation take? Features per second, the Fréchet distance, precision and recall.

    python -m benchmarks.bench_evaluation --out benchmarks/results
    python -m benchmarks.bench_evaluation --samples 5000 --reference 1000 --sizes 32 --images 16 --repeats 3 --scipy

Random features and random Inception weights: speed does not depend on the values. 2048 dimensions, float64.
"""

import argparse

import numpy as np
import torch

from benchmarks.common import RESULTS, Rows, measure, seconds
from uvit_fast.evaluation.features import InceptionFeatures
from uvit_fast.evaluation.inception import Inception
from uvit_fast.evaluation.metrics import RunningStatistics, frechet_distance, precision_recall
from uvit_fast.runtime.errors import in_one_line

DIM = 2048


def features(rows: Rows, device: torch.device, sizes: list[int], batch: int, repeats: int) -> None:
    """Measure images per second from uint8 on the device to pool3 and spatial features, resizing included."""
    extractor = InceptionFeatures(Inception().eval().requires_grad_(False), "0" * 16, device)
    for size in sizes:
        images = torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8, device=device)
        times = measure(lambda images=images: extractor(images), repeats=repeats, warmup=1)
        speed = [batch / t * 1e3 for t in times]
        rows.add(f"features:{size}px", "ours", speed, metric="speed", unit="images/s", dtype="fp32", batch=batch)


def distances(rows: Rows, device: torch.device, samples: int, reference: int, repeats: int, scipy_too: bool) -> None:
    """Time the statistics of N features, their distance, precision and recall of N samples and M references."""
    generator = torch.Generator().manual_seed(0)
    fake = torch.randn(samples, DIM, generator=generator).to(device)
    real = torch.randn(reference, DIM, generator=generator).mul_(1.1).to(device)

    def accumulate(x: torch.Tensor):
        running = RunningStatistics(DIM, device)
        for part in x.split(50):
            running.update(part)
        mu, sigma = running.statistics()
        mu.sum().item()
        return running.statistics()

    def add(case: str, provider: str, times: list[float]) -> None:
        rows.add(case, provider, times, metric="time", unit="s", dtype="fp64", batch=samples)

    add(f"statistics:{samples}x{DIM}", "ours", seconds(lambda: accumulate(fake), repeats))
    a, b = accumulate(fake), accumulate(real)
    add(f"frechet:{DIM}", "ours", seconds(lambda: frechet_distance(a, b), repeats))
    if scipy_too:
        import scipy.linalg

        product = (a.sigma @ b.sigma).cpu().numpy()
        add(f"frechet:{DIM}", "scipy-sqrtm", seconds(lambda: np.trace(scipy.linalg.sqrtm(product).real), 1))
    add(
        f"precision-recall:{reference}x{samples}",
        "ours",
        seconds(lambda: precision_recall(fake, real), min(repeats, 3)),
    )


@in_one_line()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--reference", type=int, default=10_000)
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 256], help="sides of the images, in pixels")
    parser.add_argument("--images", type=int, default=256, help="images per batch of Inception")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--scipy", action="store_true", help="also scipy's general matrix square root, on the CPU")
    parser.add_argument("--out", default=RESULTS)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = Rows("evaluation", args.out)
    if device.type == "cuda":
        rows.ceilings()
    features(rows, device, args.sizes, args.images, args.repeats)
    distances(rows, device, args.samples, args.reference, args.repeats, args.scipy)
    print(f"wrote {rows.write()}")


if __name__ == "__main__":
    main()
