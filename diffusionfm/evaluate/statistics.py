"""Intervals and distances: what stands beside every figure of the scorecard."""

from __future__ import annotations

import math

import numpy as np

Z95 = 1.959964


def wilson(right: int, of: int) -> tuple[float, float]:
    """The 95 % interval of a share, Wilson's: honest near 0 and 1 and for few samples; (0, 1) for none."""
    if of == 0:
        return 0.0, 1.0
    share, z2 = right / of, Z95**2
    middle = (share + z2 / (2 * of)) / (1 + z2 / of)
    half = Z95 / (1 + z2 / of) * math.sqrt(share * (1 - share) / of + z2 / (4 * of * of))
    return max(0.0, middle - half), min(1.0, middle + half)


def share_of(right: int, of: int) -> dict[str, float | int]:
    """A share with its interval: {"share", "low", "high", "right", "of"}."""
    low, high = wilson(right, of)
    return {
        "share": right / of if of else 0.0,
        "low": round(low, 4),
        "high": round(high, 4),
        "right": right,
        "of": of,
    }


def mean_of(values: np.ndarray) -> dict[str, float | int]:
    """A mean with its 95 % interval by the normal law: {"mean", "low", "high", "of"}."""
    values = np.asarray(values, np.float64)
    half = Z95 * float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    mean = float(values.mean())
    return {"mean": mean, "low": mean - half, "high": mean + half, "of": len(values)}


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Fréchet distance of the Gaussians fitted to two sets of features, (n, d) and (m, d) (arXiv:1706.08500)."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    x, y = root(a), root(b)
    spread = np.square(x).sum() + np.square(y).sum() - 2 * np.linalg.norm(x @ y.T, "nuc")
    return float(np.square(a.mean(0) - b.mean(0)).sum() + spread)


def root(features: np.ndarray) -> np.ndarray:
    """r of features (n, d), with r.T @ r their covariance and no more rows than the smaller of n and d."""
    return np.asarray(np.linalg.qr(features - features.mean(0), mode="r")) / math.sqrt(len(features) - 1)
