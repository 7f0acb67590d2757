"""`sds-agent explain NAME`: why this name is or is not served to an Envoy, from the configuration to the last ACK."""

import argparse

from sds_agent.admin.reasons import explain
from sds_agent.cli import asking, output
from sds_agent.cli.formats import add_format, coloured, document
from sds_agent.text import visible

EXIT_CODES = (
    "0 nothing keeps the name from being served; 1 something does, which is marked bad, or no agent answers; 2 a wrong "
    "call, or a configuration that cannot be used"
)
_MARKS = {"good": "ok  ", "warning": "note", "bad": "bad "}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The name, and the Envoy."""
    parser.add_argument("name", metavar="NAME", help="a resource name such as default or ROOTCA, or a SPIFFE ID")
    parser.add_argument("--envoy", metavar="NODE_ID", help="the Envoy's node id; without one all that ask for it")
    asking.add_agent(parser)
    add_format(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the findings. Raises NoAdminError and ProblemsError."""
    findings = explain(asking.status(arguments), arguments.name, arguments.envoy)
    if arguments.format != "table":
        output.write(document(findings, arguments.format))
    for each in findings if arguments.format == "table" else ():
        output.write(f"{coloured(_MARKS[each.verdict], each.verdict)}  {visible(each.text)}")
    return 1 if any(each.verdict == "bad" for each in findings) else 0
