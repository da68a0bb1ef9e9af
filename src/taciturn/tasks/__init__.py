"""The border to the user's world: model, loss, metrics and data."""
