"""docs/ca-server.md says of each event in the CA server's log what it means."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]
PAGE = (CHECKOUT / "docs" / "ca-server.md").read_text()
PACKAGE = CHECKOUT / "src" / "sds_agent"
PARTS = (*(PACKAGE / "ca").rglob("*.py"), PACKAGE / "signing" / "self_signed.py", PACKAGE / "cli" / "ca_serve.py")


def events() -> Iterator[str]:
    """The names that are written where an event is logged, or `LogOnChange` made."""
    for path in PARTS:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and len(node.args) > 1 and isinstance(node.args[1], ast.Constant):
                called = node.func.attr if isinstance(node.func, ast.Attribute) else ""
                if called in {"event", "LogOnChange"}:
                    yield str(node.args[1].value)


@pytest.mark.parametrize("event", sorted(set(events())))
def test_each_event_of_the_ca_server_is_on_its_page(event: str) -> None:
    """Whoever is woken by a line looks for its name there."""
    assert f"`{event}`" in PAGE
