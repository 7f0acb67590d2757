"""The agent's own configuration: its keys, what is filled in where they are left out, and what does not go together.

`loading.load` makes settings from one YAML file, or without one from Istio's variables or the defaults, and from the
environment's overrides; `schema` writes the JSON Schema for editors. How a file is read is in `configfile`.
"""
