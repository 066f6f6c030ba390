// page.mjs ADDRESS [SCREENSHOT]: the page of a server with the models `austen` and `chat`, in Chromium: chats with one model and with two
// side by side, by keyboard, in the dark, and asks nobody else.
import assert from 'node:assert/strict';
import { createRequire } from 'node:module';

const require = createRequire(`${process.env.NODE_PATH ?? process.cwd()}/`);
const { chromium } = require('playwright-core');
const [address, screenshot] = process.argv.slice(2);

const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM ?? '/usr/bin/chromium',
  args: ['--no-sandbox', '--disable-background-networking', '--disable-component-update', '--no-first-run'],
});
try {
  const page = await browser.newPage({ viewport: { width: 1100, height: 800 }, colorScheme: 'dark' });
  const faults = [];
  page.on('pageerror', (error) => faults.push(String(error)));
  page.on('console', (message) => message.type() === 'error' && faults.push(message.text()));
  page.on('request', (request) => {
    if (!request.url().startsWith(address) && !request.url().startsWith('data:')) faults.push(request.url());
  });
  await page.goto(address);
  await page.waitForSelector('.model option', { state: 'attached' });
  const dark = await page.evaluate(() => getComputedStyle(document.body).backgroundColor + getComputedStyle(document.documentElement).colorScheme);
  assert.match(dark, /dark/);
  const done = () => page.waitForFunction(() => document.getElementById('stop').disabled);
  const answers = () => page.locator('.talk .assistant').allInnerTexts();

  // The whole way by keyboard: the message has the focus.
  await page.fill('#count', '12');
  await page.focus('#prompt');
  await page.keyboard.type('She was');
  await page.keyboard.press('Enter');
  await page.waitForFunction(() => document.querySelector('.facts').textContent.includes('tokens after'));
  await done();
  assert.match((await page.locator('.facts').first().innerText()), /tokens\/s · first token \d+ ms · 12 tokens after \d+, \d+ of them cached · on cpu/);
  const [alone] = await answers();
  assert.ok(alone.length > 5, alone);

  // Two models beside each other.
  await page.click('#beside');
  await page.click('#clear');
  assert.deepEqual(await page.locator('.model').evaluateAll((all) => all.map((select) => select.value)), ['austen', 'chat']);
  await page.fill('#prompt', 'She was');
  await page.click('#send');
  await page.waitForFunction(() => [...document.querySelectorAll('.facts')].every((facts) => facts.textContent.includes('tokens after')));
  await done();
  const both = await answers();
  assert.equal(both[0], alone);
  assert.ok(both[1].length > 5, both[1]);
  if (screenshot) await page.screenshot({ path: screenshot });

  // What is under way is stopped; the server here answers too soon to be stopped, so the answer is held back.
  await page.click('#beside');
  await page.click('#clear');
  await page.route('**/v1/chat/completions', () => {});
  await page.fill('#prompt', 'On and on');
  await page.keyboard.press('Enter');
  await page.waitForFunction(() => !document.getElementById('stop').disabled);
  await page.keyboard.press('Escape');
  await done();
  await page.unroute('**/v1/chat/completions');

  // What is wrong is said, once the page allows it.
  await page.fill('#count', '0');
  await page.fill('#temperature', '9');
  await page.fill('#prompt', 'x');
  await page.keyboard.press('Enter');
  await page.waitForFunction(() => document.getElementById('error').textContent.includes('temperature'));
  assert.deepEqual(faults.filter((fault) => !fault.includes('400')), []);
} finally {
  await browser.close();
}
console.log('page ok');
