"""Stage 2: LiDB numbers of many identities, trained side by side into a bank."""
