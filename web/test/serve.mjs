// What the tests of browsers share: a server of the package, the example page and model files.
import { createReadStream, statSync } from 'node:fs';
import { createServer } from 'node:http';
import { fileURLToPath } from 'node:url';

const root = fileURLToPath(new URL('../..', import.meta.url));
const TYPES = { html: 'text/html', js: 'text/javascript', wasm: 'application/wasm', gguf: 'application/octet-stream' };
const FILES = {
  '/': 'examples/web/index.html',
  '/worker.js': 'examples/web/worker.js',
  '/halite.js': 'web/halite.js',
  '/glue.js': 'web/glue.js',
  '/halite.wasm': 'web/halite.wasm',
  '/model.gguf': 'models/austen/halite-austen.gguf',
};

/**
 * Serves the files of the example, and `more` by their addresses. `asks(first, response, address)` is told of ranges, and may say that it
 * answered. Returns the address and a function that ends the server.
 */
export async function serve(more = {}, asks = () => false) {
  const files = { ...FILES, ...more };
  const server = createServer((request, response) => {
    const file = files[request.url];
    if (!file) {
      response.writeHead(404).end();
      return;
    }
    const path = file.startsWith('/') ? file : root + file;
    const size = statSync(path).size;
    const headers = { 'Content-Type': TYPES[path.split('.').at(-1)] };
    const range = /bytes=(\d+)-(\d+)/.exec(request.headers.range ?? '');
    const first = range ? Number(range[1]) : 0;
    if (range && asks(first, response, request.url)) {
      return;
    }
    // One file is sent as a whole, whatever is asked for.
    if (!range || request.url === '/whole.gguf') {
      response.writeHead(200, { ...headers, 'Content-Length': size });
      createReadStream(path).pipe(response);
      return;
    }
    const last = Math.min(Number(range[2]), size - 1);
    response.writeHead(206, { ...headers, 'Content-Length': last - first + 1, 'Content-Range': `bytes ${first}-${last}/${size}` });
    createReadStream(path, { start: first, end: last }).pipe(response);
  });
  await new Promise((resolve) => server.listen(0, '127.0.0.1', resolve));
  return { address: `http://127.0.0.1:${server.address().port}/`, close: () => server.close() };
}
