// golden.mjs MODEL LOGITS TOKENS...: logits have the bits of those that the command wrote for each position. A part of the tokens
// runs as a prompt, the others one by one.
import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import { load } from '../halite.js';

const halite = await load(readFileSync(fileURLToPath(new URL('../halite.wasm', import.meta.url))));
const [path, wanted, ...rest] = process.argv.slice(2);
const tokens = rest.map(Number);
const want = readFileSync(wanted);
const bytes = readFileSync(path);

// The file comes in parts.
function* parts() {
  for (let at = 0; at < bytes.length; at += 100_000) {
    yield bytes.subarray(at, at + 100_000);
  }
}
const model = await halite.openModel(bytes.length, parts(), { name: path });
const session = await model.session({ context: 256 });
const { vocab_size: vocab } = session.info();
const row = (position) => want.subarray(4 * vocab * position, 4 * vocab * (position + 1));
const first = 40;
for (let at = first; at <= tokens.length; at += 1) {
  const logits = await session.logits(at === first ? tokens.slice(0, first) : tokens.slice(at - 1, at));
  assert.equal(logits.length, vocab);
  assert.ok(row(at - 1).equals(Buffer.from(logits.buffer)), `${path}: other bits at position ${at - 1}`);
}
assert.deepEqual([...session.tokens()], tokens);
session.close();
model.close();
