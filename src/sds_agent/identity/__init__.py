"""Who: SPIFFE IDs and the workloads that carry them."""
