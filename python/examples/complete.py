"""Continues a text: complete.py [MODEL]."""

import sys

import halite

path = sys.argv[1] if len(sys.argv) > 1 else None

session = halite.Session(halite.Model(path))
generation = session.generate("Once upon a time", max_tokens=40, temperature=0.8, seed=1)
print(generation.text)
print(f"{len(generation.tokens)} tokens in {generation.decode_seconds:.3f} s, {generation.finish}")
