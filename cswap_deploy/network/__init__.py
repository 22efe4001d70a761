"""The network as a thing to cut: traced graph, units, coupled groups, sizes, deletion."""
