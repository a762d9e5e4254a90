"""Puts numbers, times, models and jobs into words; pure."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from catalog.hub.download.speed import STALLED_S
from core.units import format_bytes

_MINUTE_S = 60
_HOUR_S = 3600
_LOADED = {"resident": "loaded", "available": "ready"}
_CANNOT_RUN = {"unavailable": "cannot run", "missing": "missing"}
_VERDICTS = {"too_big": "too big"}
ENDED = frozenset({"done", "failed", "cancelled"})


def size(count: int | None) -> str:
    """Return bytes in words, empty if they are unknown."""
    return format_bytes(count) if count else ""


def count(number: int | None) -> str:
    """Return a large number such as 7.2B, empty for none."""
    if not number:
        return ""
    for limit, unit in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= limit:
            return f"{number / limit:.1f}".removesuffix(".0") + unit
    return str(number)


def duration(seconds: float) -> str:
    """Return a time such as 40 s, 3 min 5 s or 2 h 10 min."""
    whole = round(seconds)
    if whole < _MINUTE_S:
        return f"{whole} s"
    if whole < _HOUR_S:
        return f"{whole // _MINUTE_S} min {whole % _MINUTE_S} s"
    return f"{whole // _HOUR_S} h {whole % _HOUR_S // _MINUTE_S} min"


def moment(at: float) -> str:
    """Return a local date and time."""
    return datetime.fromtimestamp(at).strftime("%Y-%m-%d %H:%M")


def day(text: str | None) -> str:
    """Return the day of a time of the API, empty for none."""
    return (text or "")[:10]


def model_state(model: Mapping[str, Any]) -> str:
    """Return whether a model can be used, with the reason if it cannot."""
    state, reason = str(model["state"]), str(model.get("reason") or "")
    word = _LOADED.get(state) or _CANNOT_RUN.get(state) or state
    return f"{word}: {reason}" if reason and state not in _LOADED else word


def fit(found: Mapping[str, Any]) -> str:
    """Return a fit's verdict with the bytes that are needed, if they are known."""
    verdict = str(found["verdict"])
    word = _VERDICTS.get(verdict, verdict)
    needed = size(found.get("total_bytes"))
    return f"{word} ({needed})" if needed else word


def quality(conversion: Mapping[str, Any] | None) -> str:
    """Return how a converted model differs from its source; empty for other models."""
    found = (conversion or {}).get("quality")
    if not found:
        return ""
    parts = []
    if found["same_top_share"] is not None:
        parts.append(f"{found['same_top_share']:.1%} the same likeliest token")
    if found["kl_mean"] is not None:
        parts.append(f"KL divergence {found['kl_mean']:.3g} nats")
    if found["perplexity_source"] is not None and found["perplexity_result"] is not None:
        change = f"{found['perplexity_source']:.4g} to {found['perplexity_result']:.4g}"
        parts.append(f"perplexity from {change}")
    if found["cosine_mean"] is not None:
        parts.append(f"cosine similarity {found['cosine_mean']:.4f}")
    if found["reason"]:
        parts.append(f"not measured: {found['reason']}" if not parts else found["reason"])
    return ", ".join(parts)


def share(job: Mapping[str, Any]) -> float:
    """Return how much of a job is done, from 0 to 1."""
    total = job["total_bytes"]
    return min(job["done_bytes"] / total, 1.0) if total else 0.0


def amount(job: Mapping[str, Any]) -> str:
    """Return what has arrived of a job, such as 40.1 MiB of 93.8 MiB."""
    total = size(job["total_bytes"])
    return f"{format_bytes(job['done_bytes'])} of {total}" if total else ""


def pace(job: Mapping[str, Any]) -> str:
    """Return what a job is doing at the moment: its speed, or why it does not get on."""
    state, reason = job["state"], job["reason"]
    if state != "running":
        when = f", again at {moment(job['retry_at'])}" if job.get("retry_at") else ""
        return f"{state}: {reason}{when}" if reason else f"{state}{when}"
    if job["stalled_s"] >= STALLED_S:
        text = f"stalled for {duration(job['stalled_s'])}"
        return f"{text}: {reason}" if reason else text
    if job["total_bytes"] and job["done_bytes"] >= job["total_bytes"]:
        return reason or "checking"
    parts = [f"{format_bytes(int(job['bytes_per_s']))}/s"] if job["bytes_per_s"] else []
    if job["remaining_s"] is not None:
        parts.append(f"{duration(job['remaining_s'])} left")
    return ", ".join([*parts, reason] if reason else parts) or "running"


def job_state(job: Mapping[str, Any]) -> str:
    """Return a job's state with its share and pace, in one line."""
    if job["state"] == "done":
        return "done"
    percent = f"{share(job):.0%}, " if job["total_bytes"] and job["state"] not in ENDED else ""
    return percent + pace(job)
