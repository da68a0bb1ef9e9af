"""One small program for each framework of `bench.peers`; it runs in an environment of its own and prints one JSON line.

They are scripts beside each other (`python NAME_run.py DATA.npz WORKLOAD ROUNDS SEED`), not modules of a package: in the
peers' environments neither taciturn nor this repository is installed.
"""
