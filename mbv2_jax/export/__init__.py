"""Export: a model as a file that runs without this package, and the proof that it agrees.

__main__.py    the command: python -m mbv2_jax.export MODEL --to=FORMAT --output=FILE
program.py     the function that is exported: pixels in, named arrays out
formats.py     the formats by name: the module that writes and opens each, and its extra
report.py      the comparison of a written file with JAX on photos
photos.py      the photos with which files are calibrated and checked
metadata.py    the facts that every file carries about itself
stablehlo.py, onnx/, litert/, web/, ...    one room for each format
"""
