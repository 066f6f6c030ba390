// gpu.mjs BOUND MODEL...: models on WebGPU in Firefox: the logits' normalised squared error against the CPU's is below the bound, for a
// prompt and token by token. Two sessions may wait at once, and one at work says so. NODE_PATH has puppeteer-core.
import assert from 'node:assert/strict';
import { createRequire } from 'node:module';
import { resolve } from 'node:path';
import { serve } from './serve.mjs';

const require = createRequire(`${process.env.NODE_PATH ?? process.cwd()}/`);
const puppeteer = require('puppeteer-core');

/** In the page: the largest normalised squared error of a model's logits on the GPU, and its device. */
async function compare(url) {
  const { load, download } = await import('/halite.js');
  const halite = await load(fetch('/halite.wasm'));
  const { byteCount, chunks } = await download(url);
  const model = await halite.openModel(byteCount, chunks);
  const cpu = await model.session({ context: 256 });
  const [gpu, other] = [await model.session({ context: 256, backend: 'gpu' }), await model.session({ context: 256, backend: 'gpu' })];
  // Enough tokens to pass a page's end.
  const tokens = Array.from({ length: 80 }, (_, i) => 2 + ((i * 7) % 150));
  let worst = 0;
  for (let at = 0; at < tokens.length; at += at === 0 ? 72 : 1) {
    const part = tokens.slice(at, at === 0 ? 72 : at + 1);
    // Both wait at the same time.
    const [want, got, again] = await Promise.all([cpu.logits(part), gpu.logits(part), other.logits(part)]);
    let [error, power, isSame] = [0, 0, true];
    for (let i = 0; i < want.length; i += 1) {
      error += (want[i] - got[i]) ** 2;
      power += want[i] ** 2;
      isSame &&= got[i] === again[i];
    }
    if (!isSame) throw new Error(`${url}: two sessions differ`);
    worst = Math.max(worst, error / power);
  }
  const work = gpu.logits([1]);
  // It starts after this.
  await new Promise((resolve) => setTimeout(resolve));
  let busy = '';
  try {
    gpu.clear();
  } catch (error) {
    busy = error.code;
  }
  await work;
  gpu.clear();
  gpu.close();
  other.close();
  cpu.close();
  model.close();
  return { worst, busy };
}

const [bound, ...models] = process.argv.slice(2);
const { address, close } = await serve(Object.fromEntries(models.map((path, i) => [`/${i}.gguf`, resolve(path)])));
const browser = await puppeteer.launch({
  browser: 'firefox',
  executablePath: process.env.FIREFOX ?? '/usr/bin/firefox-esr',
  protocolTimeout: 600_000,
  extraPrefsFirefox: { 'dom.webgpu.enabled': true, 'gfx.webgpu.ignore-blocklist': true },
});
try {
  const page = await browser.newPage();
  await page.goto(address);
  for (const [i, path] of models.entries()) {
    const { worst, busy } = await page.evaluate(compare, `/${i}.gguf`);
    console.log(`WebGPU in Firefox: ${path.split('/').at(-1)}: normalised squared error ${worst.toExponential(1)}`);
    assert.ok(worst < Number(bound), `${path}: ${worst}`);
    assert.equal(busy, 'HALITE_BUSY');
  }
} finally {
  await browser.close();
  close();
}
