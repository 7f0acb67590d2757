"""The kind `spiffe`: certificates and keys from another SPIFFE Workload API, such as that of SPIRE's agent."""
