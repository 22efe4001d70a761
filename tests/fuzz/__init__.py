"""Fuzzing of every parser: files nearly right, and what is raised that is no error of ours.

`make fuzz` runs 100,000 cases for each parser; `python -m fuzz --parser npz --case 17` runs one.
"""
