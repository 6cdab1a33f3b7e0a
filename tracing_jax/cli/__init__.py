"""The command line: logging, user errors, and the verbs."""
