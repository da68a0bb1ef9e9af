"""Digits, an MLP, FedAvg."""
