"""Answers a message: chat.py [MODEL]. The built-in model has no chat template, so it gets one."""

import sys

import halite

path = sys.argv[1] if len(sys.argv) > 1 else None
template = None if path else "{% for m in messages %}“{{ m.content }}” {% endfor %}“"

session = halite.Session(halite.Model(path))
messages = [{"role": "user", "content": "What did you think of the ball, Mr. Darcy?"}]
answer = session.chat(messages, template=template, max_tokens=40)
messages.append({"role": "assistant", "content": answer.text})
print(answer.text)
