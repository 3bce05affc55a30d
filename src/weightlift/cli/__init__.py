"""The command line: one file per sub-command, each with ``SUMMARY``, ``configure`` and ``run``."""
