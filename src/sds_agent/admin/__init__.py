"""What can be seen of a running agent: the status model, and its views over HTTP."""
