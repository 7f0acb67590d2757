"""The agent's log for a spectator: which of its events are shown, and in what words."""

import json
from collections.abc import Callable, Mapping

Event = Mapping[str, object]

ENVOYS = {"envoy-a": "Envoy A", "envoy-b": "Envoy B"}


def parsed(line: str) -> Event:
    """An event of the agent's log; one without a name if the line is something else (a warning, say)."""
    try:
        event = json.loads(line)
    except ValueError:
        return {}
    return event if isinstance(event, dict) else {}


def alarming(event: Event) -> bool:
    """Whether the agent logged it as a warning or worse."""
    return event.get("level") in {"warning", "error", "critical"}


def sentence(event: Event) -> str | None:
    """The event in a spectator's words; None for one that is not shown."""
    name = str(event.get("event"))
    words = _WORDS.get(name, _in_full if alarming(event) else None)
    return words(event) if words else None


def _issued(event: Event) -> str:
    serial = str(event.get("serial"))[:8]
    return f"{event.get('event')} certificate {serial} for {event.get('workload')}, in {event.get('took_ms')} ms"


def _in_full(event: Event) -> str:
    fields = [f"{key}={value}" for key, value in event.items() if key not in {"time", "level", "event"}]
    return " ".join([str(event.get("event")), *fields])


_WORDS: dict[str, Callable[[Event], str]] = {
    "ready": lambda _: "ready",
    "issued": _issued,
    "renewed": _issued,
    "subscribed": lambda event: f"{_envoy(event)} asks for {_names(event)}",
    "sent": lambda event: f"sent {_names(event)} to {_envoy(event)}",
    "acked": lambda event: f"{_envoy(event)} took {_names(event)} after {event.get('after_ms')} ms",
}


def _names(event: Event) -> str:
    names = event.get("names")
    return ", ".join(map(str, names)) if isinstance(names, list) else str(names)


def _envoy(event: Event) -> str:
    node = str(event.get("node"))
    return ENVOYS.get(node, node)
