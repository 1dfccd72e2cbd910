"""What Prometheus may read: requests and their time, pictures, network calls, the queue, the process."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from diffusionfm.serve.models import Models

SECONDS = (0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120, 300)


class Metrics:
    """The figures of one server, in a registry of its own."""

    def __init__(self, models: Models):
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "diffusionfm_requests", "HTTP requests answered", ["endpoint", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "diffusionfm_generation_seconds",
            "From a request for pictures to its answer",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.registry.register(EngineFigures(models))
        ProcessCollector(registry=self.registry)

    def text(self) -> bytes:
        """All figures in Prometheus' text format."""
        return generate_latest(self.registry)


class EngineFigures(Collector):
    """The engines' own counts, all together, read when they are asked for."""

    def __init__(self, models: Models):
        self.models = models

    def collect(self) -> Iterator[Metric]:
        counts = self.models.counts
        pictures = CounterMetricFamily("diffusionfm_pictures", "Pictures by how they ended", labels=["end"])
        for end, count in (
            ("drawn", counts.pictures),
            ("failed", counts.failed),
            ("cancelled", counts.cancelled),
        ):
            pictures.add_metric([end], count)
        yield pictures
        yield CounterMetricFamily("diffusionfm_network_calls", "Calls of the denoiser", counts.calls)
        yield CounterMetricFamily(
            "diffusionfm_picture_steps",
            "Steps of pictures; over calls: pictures a call",
            counts.steps,
        )
        yield GaugeMetricFamily(
            "diffusionfm_waiting_pictures",
            "Pictures not finished, those being drawn among them",
            self.models.waiting,
        )
