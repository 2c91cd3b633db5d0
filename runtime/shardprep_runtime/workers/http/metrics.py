"""Tell Prometheus what a front end does, and how its workers are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol, get_args

from ..policy import EventKind

if TYPE_CHECKING:
    from ..pipeline import Pipeline

LATENCIES: Final = (.001, .002, .005, .01, .02, .05, .1, .2, .5, 1, 2, 5, 10, 20, 60)  # fmt: skip
"""Seconds at which the histograms have their bounds."""


class Load(Protocol):
    """What a front end has to do."""

    is_draining: bool
    """Whether it takes nothing new."""

    @property
    def waiting(self) -> int:
        """Sequences whose turn has not come."""
        ...

    @property
    def running(self) -> int:
        """Sequences in flight."""
        ...


class Metrics:
    """What Prometheus is told; in a registry of its own, so that several may be in one process."""

    def __init__(self, pipeline: Pipeline, load: Load) -> None:
        from prometheus_client import CollectorRegistry, Counter, Histogram

        self.registry = CollectorRegistry()
        self._pipeline, self._load = pipeline, load

        def counter(name: str, text: str, labels: Sequence[str] = ()) -> Any:
            return Counter(f"shardprep_{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str) -> Any:
            return Histogram(f"shardprep_{name}", text, buckets=LATENCIES, registry=self.registry)

        self.requests = counter("requests", "Requests answered.", ("path", "status"))
        self.cut = counter("streams_cut", "Streams that ended with an error.")
        self.gone = counter("clients_gone", "Requests whose client went away before the answer began.")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts.")
        self.tokens = counter("generated_tokens", "Tokens generated.")
        self.first_token = histogram("time_to_first_token_seconds", "From the request to its first token.")
        self.time_per_token = histogram("time_per_token_seconds", "Between two tokens of a sequence.")
        self.registry.register(self)

    def collect(self) -> Iterable[Any]:
        """What the pipeline says of itself, when somebody asks."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        pipeline, load = self._pipeline, self._load
        for name, text, value in (
            ("sequences_in_flight", "Sequences that are being generated.", load.running),
            ("sequences_waiting", "Sequences whose turn has not come.", load.waiting),
            ("draining", "1 while nothing new is taken.", int(load.is_draining)),
            (
                "fallback",
                "1 while this process computes because workers are lost.",
                int(pipeline.is_fallback),
            ),
        ):
            yield GaugeMetricFamily(f"shardprep_{name}", text, value=value)
        workers = GaugeMetricFamily(
            "shardprep_workers", "Workers that can be asked, by stage.", labels=("stage",)
        )
        held = [each.pp_rank for each in pipeline.workers()]
        for stage in range(pipeline.pipeline_parallel_size):
            workers.add_metric((str(stage),), held.count(stage))
        workers.add_metric(("spare",), held.count(None))
        yield workers
        counters = pipeline.counters
        events = CounterMetricFamily(
            "shardprep_events", "What happened to workers: lost, promoted, replaced, ...", labels=("kind",)
        )
        for kind in get_args(EventKind):
            events.add_metric((kind,), counters.get(kind, 0))
        yield events
        for name, text in (
            ("steps", "Passes through all stages."),
            ("positions", "Positions that they computed; those computed again count again."),
            ("probes", "Forwards that only proved that a stage serves."),
            ("cache_losses", "Sequences whose caches a worker had lost."),
        ):
            yield CounterMetricFamily(f"shardprep_{name}", text, value=counters.get(name, 0))
