"""Many machines: the same units of work, handed out to actors, on storage that all of them reach."""
