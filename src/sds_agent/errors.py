"""The root of every exception that this package raises on purpose, and the two kinds a command ends with.

Every message is a sentence for the person who can act: what is wrong, where, and how to mend it. No message ever holds
key material, a token or a password.
"""


class SdsAgentError(Exception):
    """Root of the package's exceptions. A command that ends with one prints it and exits with `exit_code`."""

    exit_code = 1


class ConfigurationError(SdsAgentError):
    """The operator's configuration, or a file that it names, cannot be used; the command exits with 2."""

    exit_code = 2
