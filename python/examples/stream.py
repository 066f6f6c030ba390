"""Prints a text as it appears: stream.py [MODEL]."""

import sys

import halite

path = sys.argv[1] if len(sys.argv) > 1 else None

with halite.Session(halite.Model(path), "cpu:threads=2", context=512) as session:
    for text in session.stream("Once upon a time", max_tokens=40, stop=["\n\n"]):
        print(text, end="", flush=True)
print()
