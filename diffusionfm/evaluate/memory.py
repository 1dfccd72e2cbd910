"""The nearest training picture, from an index that keeps a few bytes of each (product quantisation).

A vector is cut into parts and each part is stored as the number of the nearest of 256 centres (Jégou et al. 2011,
doi:10.1109/TPAMI.2010.57). Distances are from the exact query to the quantised picture. Axes: n queries, m training
pictures, s parts, w width of a part.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

CENTRES = 256


@dataclass
class Index:
    """codes (m, s) uint8; centres (s, 256, w)."""

    codes: np.ndarray
    centres: np.ndarray

    def nearest(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Distance (n,) to the nearest training picture, and its number (n,), of queries (n, s * w)."""
        parts, _, width = self.centres.shape
        centres = self.centres.astype(np.float32)
        columns = np.ascontiguousarray(self.codes.T)
        distances, numbers = np.empty(len(queries)), np.empty(len(queries), np.int64)
        for n, query in enumerate(queries.reshape(len(queries), parts, 1, width)):
            table = np.square(centres - query).sum(-1)
            total = table[0][columns[0]]
            for part in range(1, parts):
                total += table[part][columns[part]]
            numbers[n] = total.argmin()
            distances[n] = np.sqrt(total[numbers[n]])
        return distances, numbers


def build_index(vectors: np.ndarray, parts: int, seed: int = 0) -> Index:
    """Quantise training vectors (m, d), d a multiple of `parts`."""
    from sklearn.cluster import MiniBatchKMeans

    codes, centres = [], []
    for part in np.split(vectors, parts, axis=1):
        count = min(CENTRES, len(part))
        means = MiniBatchKMeans(count, random_state=seed, batch_size=4096, n_init=1, max_iter=30).fit(part)
        centres.append(np.pad(means.cluster_centers_, ((0, CENTRES - count), (0, 0)), constant_values=1e3))
        codes.append(means.predict(part).astype(np.uint8))
    return Index(np.stack(codes, 1), np.stack(centres).astype(np.float16))


def unlike_each_other(vectors: np.ndarray, least: float) -> np.ndarray:
    """Whether each of the vectors (n, d) keeps `least` distance from all others, (n,) bool."""
    square = np.square(vectors).sum(1)
    away = square[:, None] + square - 2 * vectors @ vectors.T
    np.fill_diagonal(away, np.inf)
    return away.min(1) >= least**2
