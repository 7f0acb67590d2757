"""The command `sds-agent`: one module a command.

A command's module offers `add_arguments(parser)` and `run(arguments)`, which returns the exit code. All of them are
imported for every call, so they import the rest of the package inside functions.
"""
