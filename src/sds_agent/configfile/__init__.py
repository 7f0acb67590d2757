"""How a strict configuration file, and the environment over it, become typed settings, with every problem at once.

A YAML file becomes a `Document`, plain data that knows the line of each key (source, document); variables override
single keys (environment); and the document is read (reading) through what settings classes declare (declarations,
types), from which the JSON Schema is made too (schema). A settings class is a frozen msgspec struct. A problem is an
`errors.Problem`.
Nothing here knows a key of ours: the agent's are in `config`, the CA server's in `ca.settings`, and those of a CA that
the agent asks in that CA's own package below `authority`.
"""
