"""How a strict configuration file, and the environment over it, become typed settings, with every problem reported at
once.

A YAML file becomes a `Document`, plain data that knows the line of each key (source, document); variables override
single keys (environment); and the document is read through what the settings classes declare (shapes, scalars).
Nothing here knows a key of ours: the agent's are in `config`, the CA server's in `ca.settings`, and those of a CA that
the agent asks in that CA's own package below `authority`.
"""
