"""The commands by their names. A new one is a new line here and a module of its own."""

import argparse
from collections.abc import Mapping
from importlib import import_module
from typing import NamedTuple, Protocol, cast

DONE = (
    "0 done; 2 a wrong call, or something that the command needs cannot be used: nothing is made; 1 any other failure"
)
"""The exit codes of a command that makes something, and has none of its own."""


class Module(Protocol):
    """What a command's module offers. It may also offer `EXIT_CODES`, which says what each code means, in place of
    `DONE`.
    """

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the command's arguments."""
        ...

    def run(self, arguments: argparse.Namespace) -> int:
        """Run the command; returns the exit code. `arguments.name` is the command's full name. Raises SdsAgentError."""
        ...


class Command(NamedTuple):
    """A command: what it does, and its module in this package."""

    about: str
    module: str

    def load(self) -> tuple[Module, str]:
        """Import the module; returns it and what its exit codes mean."""
        module = import_module(f"sds_agent.cli.{self.module}")
        return cast("Module", module), getattr(module, "EXIT_CODES", DONE)


class Group(NamedTuple):
    """Commands that share the first words of their names. `default` is the one that is meant where none is named."""

    about: str
    commands: "Mapping[str, Command | Group]"
    default: str | None = None


COMMANDS: Mapping[str, Command | Group] = {
    "run": Command("serve secrets until SIGTERM or SIGINT; SIGHUP reloads the file", "run"),
    "check": Command("check a configuration and explain what it does", "check"),
    "ready": Command("ask a running agent whether every workload has its certificate", "ready"),
    "status": Command("show what a running agent serves to whom, and what is wrong", "status"),
    "secret": Command("show the secrets that the agent serves, or that an Envoy has loaded", "secret"),
    "explain": Command("say why a name is or is not served to an Envoy", "explain"),
    "doctor": Command("examine the agent, this machine, the CAs and Envoys, each with the way out", "doctor"),
    "envoy-config": Command("print the Envoy configuration for a workload", "envoy_config"),
    "issue": Command("obtain one certificate, write it to files and end", "issue"),
    "install": Group(
        "make the agent a service of this machine",
        {"systemd": Command("print or write its units for systemd", "install_systemd")},
    ),
    "ca": Group(
        "make, check and serve a certificate hierarchy",
        {
            "root": Command("make an offline root", "ca_root"),
            "intermediate": Command("make an intermediate below a root, ready to be plugged in", "ca_intermediate"),
            "check": Command(
                "say whether a directory can be plugged in, or a CA's configuration served, and what is wrong",
                "ca_check",
            ),
            "bundle": Command("print the roots of a CA, and never its key", "ca_bundle"),
            "serve": Command(
                "sign for others, in Istio's certificate protocol, until SIGTERM, SIGINT or SIGHUP", "ca_serve"
            ),
            "token": Group(
                "make, list and withdraw join tokens, for machines that have no other proof of who they are",
                {
                    "make": Command("make a join token; the word make may be left out", "ca_token"),
                    "list": Command("list the join tokens: for whom, until when, and whether used", "ca_token_list"),
                    "withdraw": Command("take back every join token for an identity", "ca_token_withdraw"),
                },
                default="make",
            ),
            "schema": Command("print the JSON Schema of the CA server's configuration file", "schema"),
        },
    ),
    "schema": Command("print the configuration file's JSON Schema", "schema"),
    "completion": Command("print the script by which bash, zsh or fish completes the commands", "completion"),
    "version": Command("print the versions of the program and of the libraries that it stands on", "version"),
    "help": Command("explain the program, or a command", "help"),
}
