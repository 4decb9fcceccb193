"""The cache: blobs by digest, results by action key, on this machine and behind it on a shared one.

A part of the engine's column, in this order, each file importing only what stands before it: index disk lock usage
store pins cleanup audit archive (this machine), objects remote lease uploads signing promises tier (shared).
"""
