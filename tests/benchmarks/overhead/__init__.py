"""What it costs to watch a model: gradscope, its peers, and the least that is possible.

    python tests/benchmarks/overhead [--quick] [--out FILE]

`workloads` are trained, watched by gradscope or by one of the `peers`. Each measurement is a `worker`
process of its own in which watched and unwatched models take `turns`, while a `meter` counts and times
the watcher's hooks. `memory` has the peak and the limit; `plan` says what is measured, `table` and
`report` write it down.
"""
