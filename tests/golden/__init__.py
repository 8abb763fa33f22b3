"""Results of the peers, stored so that `make test` compares with them without a peer.

`make golden` writes the files (make.py) from the inputs of inputs.py. test_golden.py compares ours
with them; tests/parity/test_golden_files.py compares them with the installed peers' results.
"""
