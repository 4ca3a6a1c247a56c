"""The only place that touches torch hooks.

`recorder` is the life of a step: it decides what belongs to which step. Around it:

- what was asked for: `setting` (choices and header), `schedule` (when what is recorded), `arguments`
  (the mask and the loss in the model's own forward);
- what is heard: `probes` (the hook objects), `attachment` (puts them on and takes them off),
  `optimizers` (what these do to parameters), `scaling` (the factor of a gradient scaler);
- what is kept while a step is under way: `open_step` (its passes), `passes` (a pass and its samples),
  `sampling` (from tensors to samples), `graph` (what the autograd graph shows), `parameters` (their
  norms and gradients), `accumulation` (which backward passes add up);
- what comes of it: `assembly` (from samples to rows), `findings` (what is worth a warning), `storage`
  (memory and file), `faults` (errors of our own), `voice` (what the user is told).
"""
