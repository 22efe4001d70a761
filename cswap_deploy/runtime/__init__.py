"""What runs on the device: NumPy, Pillow and the engine's runtime; never torch.

``pip install --no-deps cswap-deploy`` and ``pip install numpy pillow`` bring all of it, and with
``--ignore-requires-python`` on Python 3.10 too, which JetPack 6 has.
"""
