"""Runs a frozen graph in TensorFlow: python run_frozen_graph.py GRAPH INPUT.npy OUTPUTS.npz NODE...

The tests start it with the Python of .venv-tensorflow, where this project is not installed. OUTPUTS
has the results of the nodes as arr_0, arr_1, ...
"""

import pathlib
import sys

import numpy as np
import tensorflow as tf


def main(graph: str, images: str, outputs: str, *nodes: str) -> None:
    """Feeds the images to the graph's `image_tensor`, and saves the results of the nodes."""
    definition = tf.compat.v1.GraphDef.FromString(pathlib.Path(graph).read_bytes())
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        tf.import_graph_def(definition, name="")
        found = session.run([f"{node}:0" for node in nodes], {"image_tensor:0": np.load(images)})
    np.savez(outputs, *found)


if __name__ == "__main__":
    main(*sys.argv[1:])
