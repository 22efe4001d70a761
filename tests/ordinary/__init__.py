"""Small networks with what people's own networks bring, by kind; see ``ordinary_networks``."""
