"""What a gradient baseline is made of, and when a run departs from it: plain numpy.

`features` reads the tested quantities from a Record, `moderated` is the test on means of two groups,
`decision` screens, confirms and names the block, `tolerance` is the smallest change worth failing for.
"""
