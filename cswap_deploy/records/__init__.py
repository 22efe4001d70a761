"""What is saved: plans, measurements, manifests; the bundle and the store that hold them."""
