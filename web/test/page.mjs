// page.mjs TEXT [SCREENSHOT]: the example page in Chromium: opens a model by its address and by a drop, writes a text, can be stopped,
// shows what is wrong, and asks nobody else.
import assert from 'node:assert/strict';
import { createRequire } from 'node:module';
import { serve } from './serve.mjs';

const require = createRequire(`${process.env.NODE_PATH ?? process.cwd()}/`);
const { chromium } = require('playwright-core');

const asked = [];
let failures = 1;
// One part fails in the middle: it is asked for again.
const fail = (first, response) => {
  asked.push(first);
  if (first > 0 && failures-- > 0) {
    response.destroy();
    return true;
  }
  return false;
};
const { address, close } = await serve({ '/whole.gguf': 'models/austen/halite-austen.gguf' }, fail);

const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM ?? '/usr/bin/chromium',
  // WebGPU on a processor.
  ignoreDefaultArgs: ['--disable-gpu'],
  args: ['--no-sandbox', '--enable-unsafe-webgpu', '--disable-background-networking', '--disable-component-update', '--no-first-run'],
});
try {
  const page = await browser.newPage({ viewport: { width: 900, height: 800 } });
  const faults = [];
  page.on('pageerror', (error) => faults.push(String(error)));
  page.on('console', (message) => message.type() === 'error' && faults.push(message.text()));
  page.on('request', (request) => {
    if (!request.url().startsWith(address) && !request.url().startsWith('data:')) faults.push(request.url());
  });
  const text = (id) => page.locator(`#${id}`).innerText();
  // Compiling shaders for a processor takes long.
  const opened = () => page.waitForFunction(() => !document.getElementById('go').disabled, undefined, { timeout: 180_000 });
  const done = () => page.waitForFunction(() => document.getElementById('stop').disabled, undefined, { timeout: 60_000 });
  await page.goto(address);

  // By its address, with the same text as the command's.
  await page.click('#builtin');
  await opened();
  assert.match(await text('model'), /Halite Austen, llama, 3\.6 MiB/);
  await page.fill('#count', '32');
  await page.click('#go');
  await done();
  assert.equal(await text('out'), process.argv[2]);
  assert.match(await text('speed'), /^\d+\.\d tokens\/s, 32 tokens$/);
  assert.match(await text('memory'), /MiB$/);
  if (process.argv[3]) await page.screenshot({ path: process.argv[3] });

  // The same text by the GPU, and by the CPU again.
  for (const backend of ['gpu', 'cpu']) {
    await page.selectOption('#backend', backend);
    await opened();
    assert.match(await text('device'), backend === 'gpu' ? /WebGpu/ : /simd128/);
    await page.click('#go');
    await done();
    assert.equal(await text('out'), process.argv[2]);
    assert.equal(await text('error'), '');
  }

  // By a drop.
  await page.evaluate(async () => {
    const file = new File([await (await fetch('model.gguf')).arrayBuffer()], 'dropped.gguf');
    const data = new DataTransfer();
    data.items.add(file);
    document.dispatchEvent(new DragEvent('drop', { dataTransfer: data }));
  });
  await page.waitForFunction(() => document.getElementById('loading').hidden === false);
  await opened();
  // A long text can be stopped, and the next one is whole.
  await page.fill('#count', '4000');
  await page.click('#go');
  await page.waitForFunction(() => document.getElementById('out').innerText.length > 40);
  await page.click('#stop');
  await done();
  assert.match(await text('speed'), /stopped$/);
  await page.fill('#count', '32');
  await page.click('#go');
  await done();
  assert.equal(await text('out'), process.argv[2]);

  // What is wrong is shown: a chat without a template, a file that is none, an address that is none.
  await page.check('#chat');
  await page.click('#go');
  await done();
  assert.match(await text('error'), /template/);
  await page.uncheck('#chat');
  await page.setInputFiles('#file', { name: 'x.gguf', mimeType: 'application/octet-stream', buffer: Buffer.from('no model at all') });
  await page.waitForFunction(() => document.getElementById('error').innerText !== '');
  assert.match(await text('error'), /x\.gguf|magic|GGUF/i);
  assert.equal(await text('model'), 'none');
  await page.fill('#url', `${address}whole.gguf`);
  await page.press('#url', 'Enter');
  await opened();
  assert.equal(await text('error'), '');
  await page.click('#go');
  await done();
  assert.equal(await text('out'), process.argv[2]);
  assert.deepEqual(faults, []);
  await page.fill('#url', `${address}none.gguf`);
  await page.press('#url', 'Enter');
  await page.waitForFunction(() => document.getElementById('error').innerText.includes('404'));
  assert.ok(asked.length > 0, 'no ranges were asked for');
  console.log('page: ok');
} finally {
  await browser.close();
  close();
}
