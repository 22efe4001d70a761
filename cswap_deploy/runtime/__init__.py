"""What runs on the device: NumPy, Pillow and the engine's runtime; never torch."""
