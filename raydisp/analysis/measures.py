"""The numbers of a trial as people read them: names, units, and how many decimals are worth printing."""

from __future__ import annotations

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Measure:
    """How a numeric column of `trials` is written for people."""

    label: str
    unit: str
    """Empty where the quantity has none."""
    digits: int
    """Decimals that are worth printing."""

    @property
    def axis(self) -> str:
        """Title of an axis: `validation loss (nats per token)`."""
        return f"{self.label} ({self.unit})" if self.unit else self.label


MEASURES: dict[str, Measure] = {
    "val_loss": Measure("validation loss", "nats per token", 3),
    "val_perplexity": Measure("validation perplexity", "", 1),
    "val_bits_per_byte": Measure("validation loss", "bits per byte", 4),
    "test_loss": Measure("test loss", "nats per token", 4),
    "test_perplexity": Measure("test perplexity", "", 1),
    "train_loss": Measure("training loss", "nats per token", 3),
    "layer_cosine_mean": Measure("mean cosine over the layers", "", 3),
    "spearman": Measure("Spearman rho of cosine against layer", "", 2),
    "kendall": Measure("Kendall tau-b of cosine against layer", "", 2),
    "tokens_per_s": Measure("training speed", "tokens per second", 0),
    "train_s": Measure("training time", "s", 1),
    "peak_memory_bytes": Measure("peak memory", "bytes", 0),
}


def format_value(value: float | int | bool | str | None) -> str:
    """A field's value for people: three significant digits, thousands kept whole; empty for None."""
    if value is None:
        return ""
    if isinstance(value, float):
        # 'g' alone turns 12345.0 into 1.23e+04, which nobody reads gladly.
        return f"{value:.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.3g}"
    return str(value)


def format_measure(metric: str, value: float | None) -> str:
    return "" if value is None or not math.isfinite(value) else f"{value:.{MEASURES[metric].digits}f}"
