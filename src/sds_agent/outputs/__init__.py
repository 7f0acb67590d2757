"""Secrets as files, for programs that do not speak SDS: every renewal one set, in a directory of the operator's."""
