"""One small program for each framework of `bench.peers`; each runs in a virtual environment of its own and prints one JSON line.

They are scripts beside each other (`python NAME_run.py DATA.npz WORKLOAD ROUNDS SEED`), not modules of a package: the peers'
environments have neither taciturn nor this repository installed.
"""
