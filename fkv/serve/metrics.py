"""What the server counts, and as Prometheus reads it."""

import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Mapping

_BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)  # seconds
_WINDOW = 10.0  # seconds of which tokens/s are the mean


class Rate:
    """Tokens per second, the mean of the last seconds."""

    def __init__(self):
        self._came: deque[tuple[float, int]] = deque()

    def add(self, count: int) -> None:
        now = time.monotonic()
        self._came.append((now, count))
        while self._came[0][0] < now - _WINDOW:
            self._came.popleft()

    def value(self) -> float:
        since = time.monotonic() - _WINDOW
        return sum(count for at, count in list(self._came) if at >= since) / _WINDOW


class Metrics:
    """Counters by label; kept by one thread, the server's.

    Attributes:
      requests: by path and status.
      prompt_tokens, tokens, evictions, cancelled: by model.
      rates: of generated tokens, by model.
    """

    def __init__(self):
        self.requests: Counter[tuple[str, int]] = Counter()
        self.prompt_tokens: Counter[str] = Counter()
        self.tokens: Counter[str] = Counter()
        self.evictions: Counter[str] = Counter()
        self.cancelled: Counter[str] = Counter()
        self.rates: defaultdict[str, Rate] = defaultdict(Rate)
        self._first: defaultdict[str, Counter] = defaultdict(Counter)
        self._first_sum: Counter[str] = Counter()

    def first_token(self, model: str, seconds: float) -> None:
        """Counts the time from a request to its first token."""
        bound = next((bound for bound in _BOUNDS if seconds <= bound), float("inf"))
        self._first[model][bound] += 1
        self._first_sum[model] += seconds

    def text(self, gauges: Mapping[str, Mapping[str, float]], **counts: float) -> str:
        """In Prometheus' text format.

        Args:
          gauges: of each model: `queue`, `rows_in_use` and `rows`.
          counts: more counters and gauges, without labels.
        """
        lines = []

        def put(name, kind, what, samples: Iterable[tuple[str, float]]):
            lines.append(f"# HELP fkv_{name} {what}")
            lines.append(f"# TYPE fkv_{name} {kind}")
            for labels, value in samples:
                shown = value if isinstance(value, int) else f"{value:.6g}"
                lines.append(f"fkv_{name}{labels} {shown}")

        def of(counter):
            return [(_labels(model=model), counter[model]) for model in gauges]

        for name, what in (
            ("queue", "Answers that wait for a row."),
            ("rows_in_use", "Rows that generate."),
            ("rows", "Rows there are."),
        ):
            put(name, "gauge", what, ((_labels(model=m), g[name]) for m, g in gauges.items()))
        rates = {model: self.rates[model].value() for model in gauges}
        put("tokens_per_second", "gauge", "Generated, over the last 10 s.", of(rates))
        put("prompt_tokens_total", "counter", "Tokens of prompts.", of(self.prompt_tokens))
        put("tokens_total", "counter", "Generated tokens.", of(self.tokens))
        put("evictions_total", "counter", "Evictions of a head, summed over rows.",
            of(self.evictions))  # fmt: skip
        put("cancelled_total", "counter", "Answers cut off by clients or deadlines.",
            of(self.cancelled))  # fmt: skip
        put("requests_total", "counter", "Requests by path and status.", (
            (_labels(path=path, status=str(status)), count)
            for (path, status), count in sorted(self.requests.items())
        ))  # fmt: skip
        for name, value in counts.items():
            kind = "counter" if name.endswith("_total") else "gauge"
            put(name, kind, name.replace("_", " ").capitalize() + ".", [("", value)])
        lines += self._histogram(gauges)
        return "\n".join(lines) + "\n"

    def _histogram(self, models: Iterable[str]) -> list[str]:
        name = "fkv_time_to_first_token_seconds"
        lines = [f"# HELP {name} From a request to its first token.", f"# TYPE {name} histogram"]
        for model in models:
            total = 0
            for bound in (*_BOUNDS, float("inf")):
                total += self._first[model][bound]
                le = "+Inf" if bound == float("inf") else f"{bound:g}"
                lines.append(f"{name}_bucket{_labels(model=model, le=le)} {total}")
            lines.append(f"{name}_sum{_labels(model=model)} {self._first_sum[model]:.6g}")
            lines.append(f"{name}_count{_labels(model=model)} {total}")
        return lines


def _labels(**labels: str) -> str:
    def escaped(value):
        return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")

    return "{" + ",".join(f'{name}="{escaped(value)}"' for name, value in labels.items()) + "}"
