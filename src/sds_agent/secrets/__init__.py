"""What is served: immutable secrets, and the store that holds the newest of each and wakes who asked for it."""
