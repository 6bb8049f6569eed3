"""Figures as people read them, the same on the terminal and in the report. Unknown stays visible."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

UNKNOWN = "–"
Values = Mapping[str, Any]


def size(size_bytes: float | None) -> str:
    """Decimal units, three digits: ``1.08 MB``."""
    if size_bytes is None:
        return UNKNOWN
    value, unit = float(size_bytes), "B"
    for larger in ("kB", "MB", "GB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} B" if unit == "B" else f"{digits(value)} {unit}"


def digits(value: float) -> str:
    """Three significant digits without an exponent."""
    for least, places in ((99.95, 0), (9.995, 1), (0.9995, 2), (0.09995, 3)):
        if abs(value) >= least:
            return f"{value:.{places}f}"
    return f"{value:.4f}" if abs(value) >= 0.001 else f"{value:.2g}"


def ms(value: float | None) -> str:
    return UNKNOWN if value is None else f"{digits(value)} ms"


def latency(latency_ms: Values) -> str:
    """``0.41 ms [0.45]``: the median and the 90 % quantile."""
    p90 = latency_ms.get("p90")
    return ms(latency_ms["p50"]) + (f" [{digits(p90)}]" if p90 is not None else "")


def ratio(value: Values | None) -> str:
    """``0.61 [0.60, 0.62]``; below 1 is faster."""
    return UNKNOWN if value is None else f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


def verdict(value: Values | None) -> str:
    return UNKNOWN if value is None else str(value["verdict"])


def energy(value: Values) -> str:
    """Joules with their tag, or the reason why there are none."""
    if value["kind"] == "unavailable" or value["joules"] is None:
        return f"unavailable: {value.get('reason') or 'no reason given'}"
    interval = "" if value.get("low") is None else f" [{digits(value['low'])}, {digits(value['high'])}]"
    source = ", ".join(str(value[key]) for key in ("meter", "scope") if value.get(key))
    return f"{digits(value['joules'])} J{interval} {value['kind']}" + (f" ({source})" if source else "")


def scaled(fraction: float, unit: str) -> float:
    """A metric's value in its unit: fractions become per cent."""
    return 100 * fraction if unit == "%" else fraction


def in_unit(value: float, unit: str) -> str:
    number = scaled(value, unit)
    return f"{_decimals(number)} {unit}".strip()


def _decimals(number: float) -> str:
    """Two decimals, more digits for what is small: errors such as 0.00123."""
    return f"{number:.2f}" if abs(number) >= 0.1 or number == 0 else f"{number:.3g}"


def score(value: Values | None) -> str:
    """``91.40 % [89.50, 93.00] top1``."""
    if value is None:
        return "not run: no evaluation data"
    unit = value.get("unit") or ""
    low, high = (_decimals(scaled(value[key], unit)) for key in ("low", "high"))
    return f"{in_unit(value['this'], unit)} [{low}, {high}]"


def score_change(value: Values | None) -> str:
    """Difference to the original, signed; in points for per cent."""
    if value is None or value.get("original") is None:
        return UNKNOWN
    unit = value.get("unit") or ""
    change = scaled(value["this"], unit) - scaled(value["original"], unit)
    return f"{change:+.2f} {'points' if unit == '%' else unit}".strip()


def parity(value: Values) -> str:
    """The worst relative difference from the simulation, or why it was not checked."""
    if value["status"] != "checked":
        return str(value["status"])
    tied = value.get("tied") or ()
    ties = f"; {len(tied)} more chose otherwise in a tie" if tied else ""
    return (f"{value['max_rel']:.1e}" if value.get("max_rel") is not None else "checked") + ties


def decibel(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.0f} dB"


def tenths(value: float | None) -> str:
    """Decibels where tenths of them tell things apart."""
    return UNKNOWN if value is None else f"{value:.1f} dB"


def percent(fraction: float | None) -> str:
    return UNKNOWN if fraction is None else f"{100 * fraction:.4g} %"


def seconds(value: float) -> str:
    return f"{value:.1f} s" if value < 60 else f"{int(value // 60)} min {int(value % 60)} s"


def preprocessing(how: Values) -> str:
    """``(raw / 255 − [0.5]) / [0.5]``, only the steps there are."""
    text = "raw" if how["scale"] == 1 else f"raw / {how['scale']:g}"
    if how["mean"]:
        text = f"({text} − [{', '.join(f'{value:g}' for value in how['mean'])}])"
    if how["std"]:
        text = f"{text} / [{', '.join(f'{value:g}' for value in how['std'])}]"
    return text


def shape(tensor: Values) -> str:
    """``input: float32 batch × 3 × 32 × 32 (NCHW)``."""
    sizes = " × ".join(str(size_) for size_ in tensor["shape"])
    layout = f" ({tensor['layout']})" if tensor.get("layout") else ""
    return f"{tensor['name']}: {tensor['dtype']} {sizes}{layout}"


def options(values: Values) -> str:
    """``bits = 8, leave = ["head"]``."""
    return ", ".join(f"{key} = {value}" for key, value in values.items() if value not in (None, "", (), [], {}))
