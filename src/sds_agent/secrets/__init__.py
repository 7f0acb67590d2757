"""What is served: immutable secrets, and the store that has the newest of each and wakes those who asked for it."""
