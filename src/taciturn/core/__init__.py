"""What every room may import: vectors, keys, records, protocols, errors and the broadcast. Imports nothing of taciturn."""
