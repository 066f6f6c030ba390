"""Compares texts: embed.py MODEL, an encoder such as a BERT."""

import sys

import halite

texts = ["a cat sat on the mat", "the dog sat on the cat", "the mat"]

vectors = halite.Embedder(halite.Model(sys.argv[1])).embed(texts)
print((vectors @ vectors.T).round(3))
