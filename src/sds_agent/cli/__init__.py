"""The command `sds-agent`: one module a command, which is imported once that command is called (`commands`)."""
