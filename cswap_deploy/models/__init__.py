"""Names, checkpoints and factories: from what the user typed to a network."""
