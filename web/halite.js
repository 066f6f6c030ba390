// Halite in a browser, a worker or Node: the C library (include/halite.h) compiled to WebAssembly, and this file, which calls it.
// The CPU backend runs on the thread that calls; a page gives it a worker (see examples/web). While the GPU works, the thread is free.

import makeGlue from './glue.js';

const END = 29;
const KINDS = { u32: [4, 'Uint32'], i32: [4, 'Int32'], f32: [4, 'Float32'], u64: [8, 'BigUint64'], f64: [8, 'Float64'] };

/** The layout of a struct of the header: each field at a multiple of its size, as C has it. Pointers are u32. */
function layout(fields) {
  const places = {};
  let end = 0;
  for (const [name, kind] of Object.entries(fields)) {
    const [size] = KINDS[kind];
    end = Math.ceil(end / size) * size;
    places[name] = [end, kind];
    end += size;
  }
  const align = Math.max(...Object.values(fields).map((kind) => KINDS[kind][0]));
  return { places, bytes: Math.ceil(end / align) * align };
}

const MODEL_INFO = layout({
  struct_bytes: 'u32', context_length: 'u32', embedding_length: 'u32', block_count: 'u32', vocab_size: 'u32', expert_count: 'u32',
  expert_used_count: 'u32', tensor_count: 'u32', adapter_count: 'u32', reserved: 'u32', file_bytes: 'u64',
});
const SESSION_OPTIONS = layout({
  struct_bytes: 'u32', context: 'u32', batch: 'u32', outputs: 'u32', sequences: 'u32', rewind: 'u32', memory_bytes: 'u64', kv_format: 'u32',
  spill_folder: 'u32',
});
const SESSION_INFO = layout({ struct_bytes: 'u32', context: 'u32', batch: 'u32', outputs: 'u32', vocab_size: 'u32', top_k: 'u32' });
const GENERATE_OPTIONS = layout({
  struct_bytes: 'u32', max_tokens: 'u32', temperature: 'f32', top_k: 'i32', top_p: 'f32', min_p: 'f32', repeat_penalty: 'f32',
  frequency_penalty: 'f32', presence_penalty: 'f32', penalty_window: 'u32', seed: 'u64', stop: 'u32', grammar: 'u32', stop_count: 'u32',
  ignore_end: 'u32', show_special: 'u32', deadline_ms: 'u32', lookup: 'u32', reserved: 'u32',
});
const GENERATION_INFO = layout({
  struct_bytes: 'u32', finish: 'u32', prompt_tokens: 'u32', reused_tokens: 'u32', tokens: 'u32', decode_steps: 'u32', drafted_tokens: 'u32',
  accepted_tokens: 'u32', prefill_seconds: 'f64', first_token_seconds: 'f64', decode_seconds: 'f64',
});
const ARG_MAX = 1;
const LOGITS = 0;
/** Tokens of a prompt that are read without a pause on the CPU. */
const PROMPT_PART = 32;
/** Functions of C in which a GPU is waited for. */
const WAITING = ['halite_backend_open', 'halite_session_open', 'halite_session_prefill', 'halite_session_logits',
  'halite_generation_open', 'halite_generation_next'];

/** Lets messages and timers of this thread run. */
function pause() {
  return new Promise((resolve) => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = () => {
      port1.close();
      resolve();
    };
    port2.postMessage(0);
  });
}

const canSuspend = 'Suspending' in WebAssembly && 'promising' in WebAssembly;

/** A call that failed: `code` is the name of its result, such as HALITE_ARGUMENT. */
export class HaliteError extends Error {
  constructor(code, message) {
    super(message);
    this.name = 'HaliteError';
    this.code = code;
  }
}

/** Loads the library from the bytes of halite.wasm, a `Response`, or a promise of one. */
export async function load(wasm) {
  const source = await wasm;
  const glue = makeGlue();
  const imports = { halite: { now_ms: () => performance.now(), unix_ms: () => Date.now(), ...suspension() }, './glue_bg.js': glue };
  const isResponse = typeof Response !== 'undefined' && source instanceof Response;
  const bytes = isResponse ? await source.arrayBuffer() : source;
  const { instance } = await WebAssembly.instantiate(bytes, imports);
  glue.__wbg_set_wasm(instance.exports);
  instance.exports.__wbindgen_start();
  return new Library(instance.exports);
}

/** How the module waits for promises: `suspend` returns once `wake` was called since it returned last. */
function suspension() {
  if (!canSuspend) {
    return { can_suspend: () => 0, suspend() {}, wake() {} };
  }
  let isAwake = false;
  let resume = () => {};
  const suspend = async () => {
    if (!isAwake) {
      await new Promise((resolve) => {
        resume = resolve;
      });
    }
    isAwake = false;
  };
  const wake = () => {
    isAwake = true;
    resume();
  };
  return { can_suspend: () => 1, suspend: new WebAssembly.Suspending(suspend), wake };
}

/**
 * The bytes of a file on a server, part after part, and their number: `{ byteCount, chunks }`. A part that fails is asked for again. A
 * server without ranges sends all at once.
 */
export async function download(url, { partBytes = 8 << 20, tries = 4 } = {}) {
  const get = async (first) => {
    const response = await fetch(url, { headers: { Range: `bytes=${first}-${first + partBytes - 1}` } });
    if (!response.ok) {
      throw new HaliteError('HALITE_IO', `${url}: ${response.status} ${response.statusText}`);
    }
    return response;
  };
  const first = await get(0);
  if (first.status !== 206) {
    return { byteCount: Number(first.headers.get('Content-Length')), chunks: parts(first.body) };
  }
  const byteCount = Number(first.headers.get('Content-Range').split('/')[1]);
  async function* chunks() {
    yield new Uint8Array(await first.arrayBuffer());
    for (let at = partBytes; at < byteCount; at += partBytes) {
      for (let attempt = 1; ; attempt += 1) {
        try {
          yield new Uint8Array(await (await get(at)).arrayBuffer());
          break;
        } catch (error) {
          if (attempt === tries) {
            throw error;
          }
        }
      }
    }
  }
  return { byteCount, chunks: chunks() };
}

/** The parts of a stream, also where streams are no iterables. */
export async function* parts(stream) {
  const reader = stream.getReader();
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    yield part.value;
  }
}

class Library {
  constructor(exports) {
    this.c = exports;
    /** The functions of `WAITING`, as promises. */
    this.waiting = canSuspend ? Object.fromEntries(WAITING.map((name) => [name, this.inTurn(exports[name])])) : {};
    this.turn = Promise.resolve();
    this.encoder = new TextEncoder();
    this.decoder = new TextDecoder();
  }

  /** The version of the library. */
  get version() {
    return this.text(this.c.halite_version());
  }

  /** Bytes of the module's memory, which never shrinks. */
  get memoryBytes() {
    return this.c.memory.buffer.byteLength;
  }

  /**
   * Opens a GGUF file of so many bytes. `chunks` is its bytes in order: an iterable, or an asynchronous one such as the stream of a
   * `Response` or a `File`. `progress(bytes)` is told how many have come.
   */
  async openModel(byteCount, chunks, { name = 'model', progress = () => {} } = {}) {
    const start = this.alloc(byteCount);
    let done = 0;
    try {
      for await (const chunk of chunks) {
        if (chunk.byteLength > byteCount - done) {
          throw new HaliteError('HALITE_ARGUMENT', `${name}: expected ${byteCount} bytes, got more`);
        }
        new Uint8Array(this.c.memory.buffer, start + done, chunk.byteLength).set(chunk);
        done += chunk.byteLength;
        progress(done);
      }
      if (done < byteCount) {
        throw new HaliteError('HALITE_ARGUMENT', `${name}: expected ${byteCount} bytes, got ${done}`);
      }
    } catch (error) {
      this.c.halite_wasm_free(start, byteCount);
      throw error;
    }
    return this.scope((scope) => {
      const handle = scope.out((out) => this.c.halite_wasm_model_open(scope.string(name), start, byteCount, out));
      return new Model(this, handle);
    });
  }

  // The rest is for the classes below.

  alloc(bytes) {
    const start = this.c.halite_wasm_alloc(bytes) >>> 0;
    if (start === 0) {
      throw new HaliteError('HALITE_OUT_OF_MEMORY', `no memory for ${bytes} bytes`);
    }
    return start;
  }

  text(at) {
    const bytes = new Uint8Array(this.c.memory.buffer, at);
    return this.decoder.decode(bytes.subarray(0, bytes.indexOf(0)));
  }

  check(result) {
    if (result !== 0) {
      throw new HaliteError(this.text(this.c.halite_result_name(result)), this.text(this.c.halite_last_error()));
    }
  }

  /** A function of C whose calls may suspend the module. All calls share one stack in its memory, so each waits for those before it. */
  inTurn(function_) {
    const call = WebAssembly.promising(function_);
    return (...args) => {
      const result = this.turn.then(() => call(...args));
      this.turn = result.catch(() => {});
      return result;
    };
  }

  /** Calls `work` with memory that is freed afterwards. */
  scope(work) {
    const scope = new Scope(this);
    try {
      return work(scope);
    } finally {
      scope.free();
    }
  }

  /** The same for work that waits. */
  async scopeOf(work) {
    const scope = new Scope(this);
    try {
      return await work(scope);
    } finally {
      scope.free();
    }
  }
}

class Scope {
  constructor(library) {
    this.library = library;
    this.owned = [];
  }

  alloc(bytes) {
    const start = this.library.alloc(bytes);
    this.owned.push([start, bytes]);
    return start;
  }

  free() {
    for (const [start, bytes] of this.owned) {
      this.library.c.halite_wasm_free(start, bytes);
    }
  }

  view(at, bytes) {
    return new DataView(this.library.c.memory.buffer, at, bytes);
  }

  string(text) {
    const bytes = this.library.encoder.encode(text);
    const start = this.alloc(bytes.length + 1);
    new Uint8Array(this.library.c.memory.buffer, start, bytes.length).set(bytes);
    return start;
  }

  tokens(tokens) {
    const start = this.alloc(4 * tokens.length);
    new Uint32Array(this.library.c.memory.buffer, start, tokens.length).set(tokens);
    return start;
  }

  /** A struct with these fields; the others are 0, which is their default. */
  struct({ places, bytes }, fields) {
    const start = this.alloc(bytes);
    const view = this.view(start, bytes);
    for (const [name, value] of Object.entries({ struct_bytes: bytes, ...fields })) {
      if (value !== undefined) {
        const [at, kind] = places[name];
        view[`set${KINDS[kind][1]}`](at, kind === 'u64' ? BigInt(value) : value, true);
      }
    }
    return start;
  }

  /** The fields of a struct that `call` fills. */
  info(struct, call) {
    const start = this.struct(struct, {});
    this.library.check(call(start));
    const view = this.view(start, struct.bytes);
    const value = ([at, kind]) => {
      const value = view[`get${KINDS[kind][1]}`](at, true);
      return kind === 'u64' ? Number(value) : value;
    };
    return Object.fromEntries(Object.entries(struct.places).map(([name, place]) => [name, value(place)]));
  }

  /** The handle that `call` writes. */
  out(call) {
    const at = this.alloc(4);
    this.library.check(call(at));
    return this.view(at, 4).getUint32(0, true);
  }

  /** The handle that `call` writes, which may be a promise. */
  async outOf(call) {
    const at = this.alloc(4);
    this.library.check(await call(at));
    return this.view(at, 4).getUint32(0, true);
  }

  /** The number of 64 bits that `call` writes. */
  out64(call) {
    const at = this.alloc(8);
    this.library.check(call(at));
    return this.view(at, 8).getBigUint64(0, true);
  }

  /** The text that `call(out, capacity, length)` writes, with a zero after it. */
  text(call) {
    const length = this.alloc(4);
    call(0, 0, length);
    const capacity = this.view(length, 4).getUint32(0, true) + 1;
    const start = this.alloc(capacity);
    this.library.check(call(start, capacity, length));
    return this.library.text(start);
  }

  /** What `call(out, capacity, length)` writes: elements of `Type`, as many as there are. */
  array(Type, call) {
    const length = this.alloc(4);
    call(0, 0, length);
    const count = this.view(length, 4).getUint32(0, true);
    const start = this.alloc(Type.BYTES_PER_ELEMENT * count);
    this.library.check(call(start, count, length));
    return new Type(this.library.c.memory.buffer, start, count).slice();
  }
}

/** A model with its vocabulary. */
class Model {
  constructor(library, handle) {
    this.library = library;
    this.handle = handle;
    try {
      this.tokenizer = library.scope((scope) => scope.out((out) => library.c.halite_tokenizer_open(handle, out)));
    } catch (error) {
      if (error.code !== 'HALITE_NOT_FOUND') {
        library.c.halite_model_close(handle);
        throw error;
      }
    }
  }

  /** Sizes of the model, as `HaliteModelInfo` has them, with its name and architecture. */
  info() {
    const { c } = this.library;
    return this.library.scope((scope) => {
      const text = (call) => scope.text((...out) => call(this.handle, ...out));
      const info = scope.info(MODEL_INFO, (out) => c.halite_model_info(this.handle, out));
      return { ...info, name: text(c.halite_model_name), architecture: text(c.halite_model_architecture) };
    });
  }

  /** The tokens of a text; control tokens in it are plain text. */
  encode(text) {
    const { c } = this.library;
    return this.library.scope((scope) => {
      const [start, bytes] = [scope.string(text), this.library.encoder.encode(text).length];
      return scope.array(Uint32Array, (...out) => c.halite_tokenizer_encode(this.tokenizer, start, bytes, 0, ...out));
    });
  }

  /** The tokens of a chat's prompt, by the template in the model file. `messages` are `{ role, content }`. */
  chatPrompt(messages) {
    const { c } = this.library;
    return this.library.scope((scope) => {
      const chat = scope.out((out) => c.halite_chat_open(this.handle, this.tokenizer, 0, out));
      try {
        for (const { role, content } of messages) {
          this.library.check(c.halite_chat_add(chat, scope.string(role), scope.string(content), 0));
        }
        return scope.array(Uint32Array, (...out) => c.halite_chat_prompt(chat, ...out));
      } finally {
        c.halite_chat_close(chat);
      }
    });
  }

  /**
   * Reserves all memory for a sequence of tokens, on `cpu` or `gpu`. Other options are those of `HaliteSessionOptions`, such as `context`.
   */
  async session({ backend: name = 'cpu', kv_format, ...options } = {}) {
    const { library } = this;
    // On the CPU nothing waits, and the stack of the thread is larger.
    const c = name === 'cpu' ? library.c : { ...library.c, ...library.waiting };
    return library.scopeOf(async (scope) => {
      const backend = await scope.outOf((out) => c.halite_backend_open(scope.string(name), 0, out));
      try {
        const device = scope.text((...out) => c.halite_backend_device(backend, ...out));
        const fields = kv_format === undefined ? options : { ...options, kv_format: scope.string(kv_format) };
        const handle = await scope.outOf((out) =>
          c.halite_session_open(this.handle, backend, scope.struct(SESSION_OPTIONS, fields), out));
        return new Session(this, handle, { c, backend: name, device });
      } finally {
        c.halite_backend_close(backend);
      }
    });
  }

  /** Frees the model, once its sessions are closed too. */
  close() {
    this.library.c.halite_tokenizer_close(this.tokenizer ?? 0);
    this.library.c.halite_model_close(this.handle);
  }
}

/** One sequence of tokens on a backend, with its KV cache. */
class Session {
  constructor(model, handle, { c, backend, device }) {
    this.model = model;
    this.library = model.library;
    this.handle = handle;
    /** The functions of C, as the backend needs them. */
    this.c = c;
    this.backend = backend;
    /** The device, for people. */
    this.device = device;
    this.sequence = this.library.scope((scope) => scope.out64((out) => c.halite_session_add(handle, out)));
  }

  /** Sizes of the session, as `HaliteSessionInfo` has them. */
  info() {
    const { c } = this.library;
    return this.library.scope((scope) => scope.info(SESSION_INFO, (out) => c.halite_session_info(this.handle, out)));
  }

  /** Makes the sequence empty. */
  clear() {
    this.library.check(this.library.c.halite_session_truncate(this.handle, this.sequence, 0));
  }

  /** Appends tokens, and returns the logits after the last one. */
  async logits(tokens) {
    await this.prefill(tokens, LOGITS);
    return this.library.scopeOf(async (scope) => {
      const count = this.info().vocab_size;
      const [start, length] = [scope.alloc(4 * count), scope.alloc(4)];
      this.library.check(await this.c.halite_session_logits(this.handle, start, count, length));
      return new Float32Array(this.library.c.memory.buffer, start, count).slice();
    });
  }

  async prefill(tokens, output) {
    await this.library.scopeOf(async (scope) => {
      const start = scope.tokens(tokens);
      this.library.check(await this.c.halite_session_prefill(this.handle, this.sequence, start, tokens.length, output, 0));
    });
  }

  /**
   * Continues a text, or tokens of a chat's prompt: pieces of text. What the sequence holds of the prompt already is not computed again.
   * Options are those of `HaliteGenerateOptions`, such as `max_tokens`, and `stop`, an array of texts. `signal` is an `AbortSignal`, which
   * ends the text, as leaving the loop does; `progress(tokens, of)` is told how much of the prompt was read. Other work of the thread runs
   * between pieces, and between parts of a long prompt. Afterwards `lastGeneration` has what was done.
   */
  async *stream(prompt, { signal, progress = () => {}, ...options } = {}) {
    const tokens = typeof prompt === 'string' ? this.model.encode(prompt) : prompt;
    const held = this.tokens();
    let read = held.findIndex((token, i) => token !== tokens[i]);
    read = Math.min(read < 0 ? held.length : read, tokens.length - 1);
    if (this.c.halite_session_truncate(this.handle, this.sequence, Math.max(read, 0)) !== 0) {
      // Layers with a window no longer have what comes before it.
      read = 0;
      this.clear();
    }
    const part = this.backend === 'cpu' ? PROMPT_PART : this.info().batch;
    // The generation computes the last token.
    while (read < tokens.length - 1 && !signal?.aborted) {
      const next = tokens.slice(read, Math.min(read + part, tokens.length - 1));
      await this.prefill(next, ARG_MAX);
      read += next.length;
      progress(read, tokens.length);
      await pause();
    }
    if (signal?.aborted) {
      return;
    }
    for await (const piece of this.pieces(tokens, options)) {
      yield piece;
      await pause();
      if (signal?.aborted) {
        return;
      }
    }
  }

  /** The pieces of a text after tokens. */
  async *pieces(tokens, { stop = [], ...options }) {
    const { c } = this;
    // Freed when the generation ends: it may outlive this call.
    const scope = new Scope(this.library);
    let generation;
    try {
      const texts = scope.tokens(stop.map((text) => scope.string(text)));
      const fields = stop.length === 0 ? options : { ...options, stop: texts, stop_count: stop.length };
      generation = await scope.outOf((out) => c.halite_generation_open(this.handle, this.sequence, this.model.tokenizer,
        scope.tokens(tokens), tokens.length, scope.struct(GENERATE_OPTIONS, fields), out));
      const length = scope.alloc(4);
      let capacity = 256;
      let out = scope.alloc(capacity);
      for (;;) {
        const result = await c.halite_generation_next(generation, out, capacity, length);
        if (result === END) {
          break;
        }
        const bytes = scope.view(length, 4).getUint32(0, true);
        if (result !== 0 && bytes > capacity) {
          capacity = bytes;
          out = scope.alloc(capacity);
          continue;
        }
        this.library.check(result);
        yield this.library.decoder.decode(new Uint8Array(this.library.c.memory.buffer, out, bytes));
      }
    } finally {
      if (generation !== undefined) {
        this.lastGeneration = scope.info(GENERATION_INFO, (out) => c.halite_generation_info(generation, out));
        c.halite_generation_close(generation);
      }
      scope.free();
    }
  }

  /** The tokens of the sequence. */
  tokens() {
    const { c } = this.library;
    return this.library.scope((scope) =>
      scope.array(Uint32Array, (...out) => c.halite_session_tokens(this.handle, this.sequence, ...out)));
  }

  /** Frees the session. */
  close() {
    this.library.c.halite_session_close(this.handle);
  }
}
