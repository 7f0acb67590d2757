"""Envoy configuration for a workload: chosen, built with Envoy's own published types, and written with comments."""
