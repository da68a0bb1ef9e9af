"""An experiment: what is run, how it is written down, how it is resumed."""
