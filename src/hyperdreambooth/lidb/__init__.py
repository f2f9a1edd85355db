"""LiDB: one person as `r * (a + d)` numbers a site over frozen orthonormal bases (paper, section 4.1)."""
