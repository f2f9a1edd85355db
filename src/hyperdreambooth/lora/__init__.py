"""Low-rank adapters as the diffusion world knows them: worn, re-ranked, read and written."""
