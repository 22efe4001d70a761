"""What runs on the device: NumPy, Pillow and the engine's runtime; never torch.

``pip install numpy pillow``, then the wheel with ``--no-deps``, bring all of it, and with
``--ignore-requires-python`` on Python 3.10 too, which JetPack 6 has.
"""
