"""The newest numbers of a live run, served for Prometheus to scrape."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from pathlib import Path

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import GaugeMetricFamily

from pmdflow.config.sinks import SinkConfig
from pmdflow.metrics.companion import require_port
from pmdflow.metrics.sinks.definitions import definitions
from pmdflow.metrics.sinks.rows import Row


class PrometheusSink:
    """Serves `pmdflow_` and the key with `_` for what Prometheus does not take, as gauges with the label `run`.

    Example:
        >>> sink = PrometheusSink(Path("runs/quickstart"), SinkConfig(name="prometheus", port=9464))   # doctest: +SKIP
    """

    def __init__(self, run: Path, config: SinkConfig) -> None:
        """Listen.

        Raises:
            LaunchError: the port is taken.
        """
        require_port("metrics.sinks", config.host, config.port, hint="choose another `port`")
        self._name = run.absolute().name
        self._definitions = definitions()
        self._values: dict[str, float] = {}
        self._lock = threading.Lock()
        registry = CollectorRegistry()
        registry.register(self)
        self._server, self._thread = start_http_server(config.port, config.host, registry)

    def send(self, row: Row) -> None:
        """Show a row's numbers from now on."""
        with self._lock:
            self._values |= row.values

    def close(self) -> None:
        """Listen no more."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """What a scrape reads."""
        with self._lock:
            values = dict(self._values)
        for key, value in sorted(values.items()):
            name = "pmdflow_" + re.sub(r"\W", "_", key)
            gauge = GaugeMetricFamily(name, self._definitions.get(key, key), labels=["run"])
            gauge.add_metric([self._name], value)
            yield gauge
