"""The only place that touches torch hooks.

`probes` are the hook objects, `recorder` is the life of a step, `assembly` turns a step's samples
into rows, `graph` reads the autograd graph, `parameters` reads parameters and their gradients,
`schedule` says when what is recorded, `scaling` sees the factor of a gradient scaler.
"""
