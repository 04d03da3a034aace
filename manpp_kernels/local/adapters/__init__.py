"""How the models of a library come apart into stem, units and head.

They are imported once a model of their library comes along (:mod:`manpp_kernels.local.parts`).
"""
