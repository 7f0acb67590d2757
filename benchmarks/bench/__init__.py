"""What the benchmarks share: the values that they find, the programs that they start, and the clients of those."""
