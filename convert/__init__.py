"""Conversion of weights from other frameworks and to them.

    readers/        a container (.pth, .safetensors, .keras, .pb, .tflite, ...) -> {name: array}
    layouts/        a framework's names for a network
    recognition.py  tells the layout, the prefix and the sizes of the network in a file
    matching.py     every array of the file -> an array of the network, or a fault
    classifier.py   the head: dense layers of any name
    hub.py          downloads a repository of the Hugging Face Hub
    importer.py     reads a file with all of these, and returns a model
    writer.py       writes a model to a file, or a folder, of another framework

The folder lies beside the package and is installed inside it, as `mbv2_jax.convert`: `python -m
convert` works in the clone, `python -m mbv2_jax.convert` everywhere, and site-packages gets no
package with so common a name. Its modules import each other relatively, because they may be
imported under either name.
"""
