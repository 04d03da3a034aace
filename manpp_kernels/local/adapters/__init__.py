"""How the models of a library come apart into stem, units and head; a module a library.

Each is imported once a model of its library comes along (:mod:`manpp_kernels.local.parts`).
"""
