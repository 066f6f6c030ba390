"""Generates JSON of a schema: json_object.py [MODEL]."""

import json
import sys

import halite

path = sys.argv[1] if len(sys.argv) > 1 else None
properties = {"name": {"enum": ["Jane", "Emma"]}, "age": {"type": "integer", "minimum": 1, "maximum": 99}}
schema = {"type": "object", "properties": properties, "required": ["name", "age"], "additionalProperties": False}

session = halite.Session(halite.Model(path))
text = session.generate("The heroine of the novel: ", json_schema=schema, max_tokens=60).text
print(json.loads(text))
