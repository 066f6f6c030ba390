// Owns the model. Messages in: { open: { file | url }, backend }, { backend }, { complete: { prompt, options } }, { stop }.
import { load, download, parts } from './halite.js';

const library = load(fetch('halite.wasm'));
let model;
let session;
let stop = new AbortController();

/** A session on this backend instead of the one before. */
async function use(backend) {
  session?.close();
  session = undefined;
  const info = model.info();
  session = await model.session({ backend, context: Math.min(info.context_length, 2048) });
  const halite = await library;
  postMessage({ opened: { ...info, device: session.device, memory: halite.memoryBytes, version: halite.version } });
}

async function open({ file, url }, backend) {
  session?.close();
  model?.close();
  session = model = undefined;
  const halite = await library;
  const { byteCount, chunks } = file ? { byteCount: file.size, chunks: parts(file.stream()) } : await download(url);
  const name = file ? file.name : url;
  let told = 0;
  const progress = (bytes) => {
    if (bytes - told > byteCount / 100 || bytes === byteCount) {
      told = bytes;
      postMessage({ loaded: bytes, of: byteCount });
    }
  };
  model = await halite.openModel(byteCount, chunks, { name, progress });
  await use(backend);
}

async function complete({ prompt, isChat, options }) {
  stop = new AbortController();
  const tokens = isChat ? model.chatPrompt([{ role: 'user', content: prompt }]) : prompt;
  const progress = (read, of) => postMessage({ read, of });
  const start = performance.now();
  let pieces = 0;
  let first;
  for await (const text of session.stream(tokens, { ...options, signal: stop.signal, progress })) {
    pieces += 1;
    first ??= performance.now();
    postMessage({ text, rate: pieces > 1 ? ((pieces - 1) * 1000) / (performance.now() - first) : undefined });
  }
  const info = session.lastGeneration;
  postMessage({
    done: {
      stopped: stop.signal.aborted,
      tokens: info?.tokens ?? 0,
      rate: info && info.decode_steps > 0 ? info.decode_steps / info.decode_seconds : undefined,
      firstMs: (first ?? performance.now()) - start,
      memory: (await library).memoryBytes,
    },
  });
}

onmessage = async ({ data }) => {
  try {
    if (data.open) {
      await open(data.open, data.backend);
    } else if (data.backend) {
      await use(data.backend);
    } else if (data.complete) {
      await complete(data.complete);
    } else {
      stop.abort();
    }
  } catch (error) {
    postMessage({ error: error.message });
  }
};
