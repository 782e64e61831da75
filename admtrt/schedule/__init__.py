"""Sampling schedules: the noise levels that a sample passes, and the coefficients of every evaluation.

Data flows one way: a process (:mod:`.process`, :mod:`.levels`) and a sampler's choices (:mod:`.sampler`) go
to a solver (:mod:`.solvers`, one file per family), whose rows :mod:`.table` lowers to the float32 table that
the small graphs of a bundle take. Everything is computed in float64 and rounded once.
"""
