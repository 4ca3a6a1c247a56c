"""Pictures and tables of a Record. No torch; matplotlib, seaborn and rich are loaded at first use.

- `gradscope.show.plots` (also `gradscope.plot`): functions ``(data, *, ax=None) -> Axes``.
- `gradscope.show.terminal`: a table per layer.
"""
