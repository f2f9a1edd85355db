"""The command line: the only part that reads argv, prints, and combines the stages."""
