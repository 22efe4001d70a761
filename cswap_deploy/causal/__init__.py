"""The method: how much does removing each unit change the prediction, and what may go.

Source: C-SWAP (arXiv:2510.18636).
"""
