"""Weights of other frameworks in, and out again.

Lies beside the package and installs inside it, as `mbv2_jax.convert`: `python -m convert` works in
the clone, `python -m mbv2_jax.convert` everywhere, and site-packages gets no package of so common a
name. The modules import each other relatively, because either name may be the one in use.
"""
