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
const session = model.session({ context: 512 });
assert.equal(model.info().architecture, 'llama');
assert.equal(model.info().file_bytes, file.length);
const want = process.argv[2];
const prompt = 'Once upon a time';
assert.equal(prompt + [...session.generate(prompt, { max_tokens: 32 })].join(''), want);
assert.equal(session.lastGeneration.tokens, 32);

// The same in parts, after another text; a prompt that is held already; a stop text; more text than the first buffer holds.
const long = 'It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a wife. '.repeat(3);
session.clear();
const read = [];
let text = '';
for await (const piece of session.stream(long, { max_tokens: 8, progress: (n, of) => read.push(`${n}/${of}`) })) text += piece;
assert.ok(read.length > 1 && text.length > 0, read.join());
session.clear();
assert.equal([...session.generate(long, { max_tokens: 8 })].join(''), text);
text = '';
for await (const piece of session.stream(prompt, { max_tokens: 32 })) text += piece;
assert.equal(prompt + text, want);
text = '';
for await (const piece of session.stream(prompt, { max_tokens: 32 })) text += piece;
assert.equal(prompt + text, want);
const stopped = [...session.generate(prompt, { max_tokens: 32, stop: ['give up'] })].join('');
assert.equal(prompt + stopped, want.slice(0, want.indexOf('give up')));
const sampled = (seed) => [...session.generate(prompt, { max_tokens: 16, temperature: 1, seed })].join('');
assert.equal(sampled(7), sampled(7));

// A signal ends a text, and a loop can be left; both leave the session usable.
const signal = AbortSignal.timeout(50);
for await (const piece of session.stream(prompt, { max_tokens: 400, signal })) text += piece;
assert.ok(session.lastGeneration.tokens < 400);
for (const piece of session.generate(prompt)) {
  text += piece;
  break;
}
assert.equal(prompt + [...session.generate(prompt, { max_tokens: 32 })].join(''), want);

// What is wrong is said.
assert.throws(() => model.chatPrompt([{ role: 'user', content: 'x' }]), fails('HALITE_NOT_FOUND', 'template'));
assert.throws(() => model.session({ kv_format: 'q9' }), fails('HALITE_ARGUMENT', 'q9'));
assert.throws(() => session.logits([1_000_000]), HaliteError);
assert.throws(() => [...session.generate(prompt, { temperature: Number.NaN })], HaliteError);
await assert.rejects(open(file.subarray(0, 1000)), fails('HALITE_MALFORMED', 'tensor count'));
await assert.rejects(halite.openModel(10, [file]), fails('HALITE_ARGUMENT', 'expected 10 bytes'));
await assert.rejects(halite.openModel(file.length + 1, [file]), fails('HALITE_ARGUMENT', 'got'));
await assert.rejects(halite.openModel(2 ** 32 - 16, []), fails('HALITE_OUT_OF_MEMORY', '4294967280'));

// Opened and closed again and again, it needs no more memory.
session.close();
model.close();
assert.throws(() => session.logits([1]), HaliteError);
const cycle = async () => {
  const model = await open();
  const session = model.session({ context: 512 });
  session.logits([1, 2, 3]);
  session.close();
  model.close();
  return halite.memoryBytes;
};
const bytes = await cycle();
for (let i = 0; i < 10; i += 1) {
  assert.ok((await cycle()) <= bytes, 'memory is not freed');
}
console.log(`${halite.version}: ok, ${(bytes / 2 ** 20).toFixed(1)} MiB`);
