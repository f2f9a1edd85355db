"""The command line: the only place that reads argv, prints, and puts the stages together."""
