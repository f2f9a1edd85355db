"""LiDB: one person as `r * (a + d)` numbers a site over frozen orthonormal bases (paper, section 4.1).

`basis` makes the frozen bases, `weights` turns numbers into LoRA factors, `file` is one person on disk,
`bank` many people.
"""
