"""The agent while it runs: its parts, made from a configuration, and how they become what another one says."""
