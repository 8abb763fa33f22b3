"""Conversion of weights from other frameworks and to them.

    readers/     a container (.pth, .safetensors, .keras, .h5) -> {name: array}
    layouts/     a framework's names for a network
    importer.py  both together: a model of ours;  writer.py  the way back

The folder lies beside the package and installs inside it, as `mbv2_jax.convert`: `python -m
convert` works in the clone, `python -m mbv2_jax.convert` everywhere, and site-packages gets no
package of so common a name. Its modules import each other relatively, because either name may be in
use.
"""
