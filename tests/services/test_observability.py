"""docs/observability: the rules work, and whatever they, the dashboard and the page name is really measured."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from fakes.hierarchy import NOW, make_ca
from fakes.observed import Seen
from fakes.scraped import promtool

from sds_agent.admin.agent_families import families
from sds_agent.admin.exposition import process_families
from sds_agent.admin.families import Family, HistogramFamily
from sds_agent.ca import families as ca_families
from sds_agent.ca.counts import CaCounts
from sds_agent.ca.status import AuditStatus, CaStatus, certificates, counted
from sds_agent.signing.signer import Signer
from sds_agent.signing.signing_set import SigningSet

FOLDER = Path(__file__).parents[2] / "docs" / "observability"
PAGE = (FOLDER / "README.md").read_text()
DASHBOARD: dict[str, Any] = json.loads((FOLDER / "grafana-dashboard.json").read_text())
RULES: dict[str, Any] = yaml.safe_load((FOLDER / "alerts.yaml").read_text())
ALERTS = [rule for group in RULES["groups"] for rule in group["rules"]]
METRIC = re.compile(r"\b(?:sds_agent|process)_[a-z_]+\b")
VARIABLES = {"$__rate_interval": "5m", "$job": "j", "$instance": "i", "$ca": "c"}


def ca_status() -> CaStatus:
    root = make_ca("root")
    signing = SigningSet(Signer(root.certificate, root.key), (), (root.certificate,))  # type: ignore[arg-type] # an EC key
    return CaStatus(
        at=NOW,
        version="0.1",
        pid=1,
        started_at=NOW,
        uptime_seconds=0,
        trust_domain="demo.example",
        address="127.0.0.1:1",
        ready=True,
        lacks=(),
        signing=certificates(signing),
        audit=AuditStatus(),
        connections=0,
        in_work=0,
        counts=counted(CaCounts()),
    )


def measured() -> dict[str, Family]:
    found = (*families(Seen().moment), *ca_families.families(ca_status(), CaCounts(), {}), *process_families())
    return {each.name: each for each in found}


def series_names() -> set[str]:
    """The names that a query may have: a histogram has three."""
    return {
        f"{name}{suffix}"
        for name, family in measured().items()
        for suffix in (("_bucket", "_sum", "_count") if isinstance(family, HistogramFamily) else ("",))
    }


def expressions() -> Iterator[str]:
    """Every expression of the dashboard, with values in place of its variables."""
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", ()):
            text = target["expr"]
            for name, value in VARIABLES.items():
                text = text.replace(name, value)
            yield text


def test_promtool_takes_the_rules_and_each_fires_when_it_should_and_no_sooner() -> None:
    assert "SUCCESS" in promtool("check", "rules", str(FOLDER / "alerts.yaml"))
    assert "SUCCESS" in promtool("test", "rules", str(FOLDER / "alerts.test.yaml"))


def test_each_rule_is_tested_and_says_what_to_do() -> None:
    tests = (FOLDER / "alerts.test.yaml").read_text()
    for rule in ALERTS:
        assert rule["alert"] in tests
        assert rule["labels"]["severity"] in {"critical", "warning"}
        assert {"summary", "description"} <= rule["annotations"].keys()


def test_every_metric_of_a_rule_is_measured() -> None:
    assert {name for rule in ALERTS for name in METRIC.findall(rule["expr"])} <= series_names()


def test_every_query_of_the_dashboard_parses_and_its_metrics_are_measured(tmp_path: Path) -> None:
    found = list(expressions())
    assert {name for each in found for name in METRIC.findall(each)} <= series_names()
    rules = [{"record": f"panel:{number}", "expr": each} for number, each in enumerate(found)]
    file = tmp_path / "rules.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    assert "SUCCESS" in promtool("check", "rules", str(file))
    for variable in DASHBOARD["templating"]["list"]:
        assert set(METRIC.findall(str(variable["query"]))) <= series_names()


def test_the_dashboard_asks_the_source_that_its_reader_chooses() -> None:
    panels = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
    assert {panel["datasource"]["uid"] for panel in panels} == {"${datasource}"}
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    assert "datasource" in {variable["name"] for variable in DASHBOARD["templating"]["list"]}


def test_the_page_lists_exactly_the_metrics_that_there_are_with_their_labels() -> None:
    listed = {
        name: tuple(re.findall(r"`(\w+)`", labels))
        for name, labels in re.findall(r"^\| `(\w+)` \| ([^|]*) \|", PAGE, re.MULTILINE)
        if METRIC.fullmatch(name)
    }
    assert listed == {name: family.labels for name, family in measured().items()}


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: str(rule["alert"]))
def test_the_page_names_the_alert(rule: dict[str, Any]) -> None:
    assert f"`{rule['alert']}`" in PAGE
