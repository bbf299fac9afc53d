"""What Prometheus collects of the service."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from modeling_scaledown import ScaleDownModel

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
SIZES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """Counts of requests and of what they moved."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("scaledown_requests", "Requests answered.", ["route", "status"], registry=self.registry)
        self.seconds = Histogram(
            "scaledown_request_seconds",
            "Time to the end of a reply.",
            ["route"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.batch_size = Histogram(
            "scaledown_batch_size", "Requests of a batch.", buckets=SIZES, registry=self.registry
        )
        self.tokens = Counter(
            "scaledown_tokens", "Tokens read by the generator, and written.", ["direction"], registry=self.registry
        )
        self.queue = Gauge("scaledown_queue", "Requests that wait for a batch.", registry=self.registry)
        self.hit_rate = Gauge(
            "scaledown_compression_cache_hit_rate",
            "Share of the chunks that were compressed before.",
            registry=self.registry,
        )

    def watch(self, model: ScaleDownModel, waiting: Callable[[], float]) -> None:
        """Read the gauges of the queue and of the cache whenever they are collected.

        Args:
            model: The model that is served.
            waiting: A function that returns how many requests wait.
        """
        self.queue.set_function(waiting)
        self.hit_rate.set_function(lambda: 0.0 if model.compression_cache is None else model.compression_cache.hit_rate)
