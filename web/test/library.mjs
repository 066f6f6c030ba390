// What the JavaScript does by itself: texts, options, errors, pauses, and memory that is free again.
import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import { HaliteError, load } from '../halite.js';

const here = (path) => readFileSync(fileURLToPath(new URL(path, import.meta.url)));
const halite = await load(here('../halite.wasm'));
const file = here('../../models/austen/halite-austen.gguf');
const open = (bytes = file) => halite.openModel(bytes.length, [bytes]);
const fails = (code, text) => (error) => error instanceof HaliteError && error.code === code && error.message.includes(text);

const model = await open();
const session = await model.session({ context: 512 });
assert.equal(model.info().architecture, 'llama');
assert.equal(model.info().file_bytes, file.length);
const want = process.argv[2];
const prompt = 'Once upon a time';
const write = async (prompt, options, after = session) => {
  let text = '';
  for await (const piece of after.stream(prompt, options)) text += piece;
  return text;
};
assert.equal(prompt + (await write(prompt, { max_tokens: 32 })), want);
assert.equal(session.lastGeneration.tokens, 32);

// The same in parts, after another text; a prompt that is held already; a stop text; more text than the first buffer holds.
const long = 'It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a wife. '.repeat(3);
session.clear();
const read = [];
const progress = (n, of) => read.push(`${n}/${of}`);
const text = await write(long, { max_tokens: 8, progress });
assert.ok(read.length > 1 && text.length > 0, read.join());
session.clear();
assert.equal(await write(session.model.encode(long), { max_tokens: 8 }), text);
assert.equal(prompt + (await write(prompt, { max_tokens: 32 })), want);
assert.equal(prompt + (await write(prompt, { max_tokens: 32 })), want);
const stopped = await write(prompt, { max_tokens: 32, stop: ['give up'] });
assert.equal(prompt + stopped, want.slice(0, want.indexOf('give up')));
const sampled = (seed) => write(prompt, { max_tokens: 16, temperature: 1, seed });
assert.equal(await sampled(7), await sampled(7));

// A signal ends a text, and a loop can be left; both leave the session usable.
await write(prompt, { max_tokens: 400, signal: AbortSignal.timeout(50) });
assert.ok(session.lastGeneration.tokens < 400);
for await (const piece of session.stream(prompt)) {
  assert.ok(piece);
  break;
}
assert.equal(prompt + (await write(prompt, { max_tokens: 32 })), want);

// What is wrong is said.
assert.throws(() => model.chatPrompt([{ role: 'user', content: 'x' }]), fails('HALITE_NOT_FOUND', 'template'));
await assert.rejects(model.session({ kv_format: 'q9' }), fails('HALITE_ARGUMENT', 'q9'));
await assert.rejects(model.session({ backend: 'abacus' }), fails('HALITE_ERROR', 'abacus'));
await assert.rejects(model.session({ backend: 'gpu' }), fails('HALITE_ERROR', 'cannot wait for a device'));
await assert.rejects(session.logits([1_000_000]), HaliteError);
await assert.rejects(write(prompt, { temperature: Number.NaN }), HaliteError);
await assert.rejects(open(file.subarray(0, 1000)), fails('HALITE_MALFORMED', 'tensor count'));
await assert.rejects(halite.openModel(10, [file]), fails('HALITE_ARGUMENT', 'expected 10 bytes'));
await assert.rejects(halite.openModel(file.length + 1, [file]), fails('HALITE_ARGUMENT', 'got'));
await assert.rejects(halite.openModel(2 ** 32 - 16, []), fails('HALITE_OUT_OF_MEMORY', '4294967280'));

// Opened and closed again and again, it needs no more memory.
session.close();
model.close();
await assert.rejects(session.logits([1]), HaliteError);
const cycle = async () => {
  const model = await open();
  const session = await model.session({ context: 512 });
  await session.logits([1, 2, 3]);
  session.close();
  model.close();
  return halite.memoryBytes;
};
const bytes = await cycle();
for (let i = 0; i < 10; i += 1) {
  assert.ok((await cycle()) <= bytes, 'memory is not freed');
}
console.log(`${halite.version}: ok, ${(bytes / 2 ** 20).toFixed(1)} MiB`);
