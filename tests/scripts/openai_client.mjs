// What programs do with OpenAI's own client for JavaScript, against a server whose address is the first argument: the same as
// openai_client.py, and retries. The second argument is the name of an encoder. Prints rows of the table in docs/clients.md.
// Needs `openai` in NODE_PATH.
import assert from 'node:assert/strict';
import http from 'node:http';
import { createRequire } from 'node:module';

const require = createRequire(`${process.env.NODE_PATH ?? process.cwd()}/`);
const OpenAI = require('openai');
const { VERSION } = require('openai/version');
const [address, encoder] = process.argv.slice(2);
const client = new OpenAI({ baseURL: address, apiKey: 'none', maxRetries: 0 });
const row = (call, result) => console.log(`| openai ${VERSION}, JavaScript | ${call} | ${result} |`);
const gather = async (stream) => {
  const pieces = [];
  for await (const piece of stream) pieces.push(piece);
  return pieces;
};

const models = (await gather(await client.models.list())).map((model) => model.id);
assert.deepEqual(models, ['austen', 'chat', encoder]);
assert.equal((await client.models.retrieve('chat')).id, 'chat');
row('models', models.join(', '));

const prompt = { model: 'austen', prompt: 'Once upon a time', max_tokens: 16, temperature: 0 };
const whole = await client.completions.create(prompt);
assert.equal(whole.usage.completion_tokens, 16);
const pieces = await gather(await client.completions.create({ ...prompt, stream: true, stream_options: { include_usage: true } }));
assert.equal(pieces.map((piece) => piece.choices[0]?.text ?? '').join(''), whole.choices[0].text);
assert.equal(pieces.at(-1).usage.completion_tokens, 16);
row('completion, and as a stream with usage', 'the same text, 16 tokens');

const chat = { model: 'chat', messages: [{ role: 'user', content: 'Who are you?' }], max_tokens: 16, temperature: 0 };
const { message } = (await client.chat.completions.create(chat)).choices[0];
assert.ok(message.role === 'assistant' && message.content);
const streamed = client.chat.completions.stream({ ...chat, stream_options: { include_usage: true } });
assert.equal(await streamed.finalContent(), message.content);
assert.equal((await streamed.totalUsage()).completion_tokens, 16);
row('chat, and as a stream with usage', 'the same text, 16 tokens');

const city = {
  type: 'object', properties: { city: { type: 'string', maxLength: 8 } }, required: ['city'], additionalProperties: false,
};
const response_format = { type: 'json_schema', json_schema: { name: 'city', schema: city, strict: true } };
const parsed = await client.chat.completions.parse({ ...chat, max_tokens: 100, response_format });
assert.deepEqual(Object.keys(parsed.choices[0].message.parsed), ['city']);
row('chat with a JSON schema', 'parses');

const tools = [{ type: 'function', function: { name: 'weather', parameters: city } }];
const asked = { ...chat, max_tokens: 100, tools, tool_choice: 'required' };
const answer = (await client.chat.completions.create(asked)).choices[0];
const [call] = answer.message.tool_calls;
assert.ok(answer.finish_reason === 'tool_calls' && call.function.name === 'weather' && 'city' in JSON.parse(call.function.arguments));
const named = { ...asked, tool_choice: { type: 'function', function: { name: 'weather' } } };
const calls = (await client.chat.completions.stream(named).finalMessage()).tool_calls;
assert.deepEqual(calls.map((each) => each.function.name), ['weather']);
assert.equal(calls[0].function.arguments, call.function.arguments);
const told = [...chat.messages, answer.message, { role: 'tool', tool_call_id: call.id, content: 'rain' }];
assert.ok((await client.chat.completions.create({ ...asked, messages: told, tool_choice: 'none' })).choices[0].message.content);
row('tools: a call, the same as a stream, its result', 'parses');

const plain = { model: 'chat', input: 'Who are you?', max_output_tokens: 16, temperature: 0 };
const response = await client.responses.create(plain);
assert.ok(response.output_text && response.usage.output_tokens === 16);
const events = await gather(await client.responses.create({ ...plain, stream: true }));
const deltas = events.filter((event) => event.type === 'response.output_text.delta');
assert.equal(deltas.map((event) => event.delta).join(''), response.output_text);
const flat = [{ type: 'function', name: 'weather', parameters: city, strict: true }];
const called = await client.responses.create({ ...plain, max_output_tokens: 100, tools: flat, tool_choice: 'required' });
assert.ok(called.output[0].type === 'function_call' && 'city' in JSON.parse(called.output[0].arguments));
row('responses: text, stream, call', 'the same text; parses');

const input = ['a cat sat', 'mat'];
const vectors = (await client.embeddings.create({ model: encoder, input })).data;
const floats = (await client.embeddings.create({ model: encoder, input, encoding_format: 'float' })).data;
assert.ok(vectors.length === 2 && vectors[1].embedding.every((x, i) => Math.abs(x - floats[1].embedding[i]) < 1e-6));
row('embeddings, base64 and float', `2 vectors of ${vectors[0].embedding.length}`);

const wrong = await client.completions.create({ ...prompt, temperature: 9 }).catch((error) => error);
assert.ok(wrong instanceof OpenAI.BadRequestError && wrong.param === 'temperature' && wrong.requestID.startsWith('req-'));
assert.equal(wrong.type, 'invalid_request_error');
const missing = await client.completions.create({ ...prompt, model: 'x' }).catch((error) => error);
assert.ok(missing instanceof OpenAI.NotFoundError && missing.code === 'model_not_found');
row('errors', 'BadRequestError with param, type and id; NotFoundError with code');

// A full server is hard to have at will: this one stands before it, refuses twice as it would, and lets the third request through.
const refusals = [429, 503];
const before = http.createServer(async (request, reply) => {
  const status = refusals.shift();
  const body = (await gather(request)).join('');
  if (status) {
    reply.writeHead(status, { 'content-type': 'application/json', 'retry-after': '1' });
    reply.end(JSON.stringify({ error: { message: 'later', type: 'server_error', param: null, code: null } }));
    return;
  }
  const through = await fetch(address + request.url.replace('/v1', ''), {
    method: 'POST', headers: { 'content-type': 'application/json' }, body,
  });
  reply.writeHead(through.status, { 'content-type': 'application/json' });
  reply.end(await through.text());
}).listen(0, '127.0.0.1');
await new Promise((done) => before.once('listening', done));
const start = Date.now();
const patient = client.withOptions({ baseURL: `http://127.0.0.1:${before.address().port}/v1`, maxRetries: 2 });
assert.equal((await patient.completions.create(prompt)).choices[0].text, whole.choices[0].text);
assert.ok(refusals.length === 0 && Date.now() - start >= 2000);
before.closeAllConnections();
before.close();
row('a request that gets 429, then 503', 'is sent again after Retry-After, and answered');
