// The page for people: chats with one model, or with two side by side.
const $ = (id) => document.getElementById(id);
const columns = [];
let models = [];
/** What is under way, to stop it. */
let running = [];

const headers = () => {
  const key = $('key').value.trim();
  return { 'content-type': 'application/json', ...(key ? { authorization: `Bearer ${key}` } : {}) };
};
const wrong = (error) => {
  $('error').textContent = error ? String(error.message ?? error) : '';
};
/** Asks the server; an answer that is an error is thrown with its message. */
const ask = async (address, options = {}) => {
  const response = await fetch(address, { headers: headers(), ...options });
  if (response.ok) return response;
  const said = await response.json().catch(() => undefined);
  throw new Error(said?.error?.message ?? `${address}: status ${response.status}`);
};

class Column {
  constructor() {
    this.element = $('column').content.firstElementChild.cloneNode(true);
    const [select, talk, facts] = ['.model', '.talk', '.facts'].map((part) => this.element.querySelector(part));
    Object.assign(this, { select, talk, facts, messages: [] });
    this.offer();
    this.select.onchange = () => this.clear();
    $('columns').append(this.element);
  }

  offer() {
    const chosen = this.select.value;
    this.select.replaceChildren(...models.map((model) => new Option(model.id, model.id, false, model.id === chosen)));
  }

  clear() {
    this.messages = [];
    this.talk.replaceChildren();
    this.facts.textContent = '';
  }

  say(kind, text) {
    const line = document.createElement('div');
    line.className = kind;
    line.textContent = text;
    this.talk.append(line);
    this.talk.scrollTop = this.talk.scrollHeight;
    return line;
  }

  async send(text, signal) {
    const model = models.find((model) => model.id === this.select.value);
    const isChat = model?.meta?.chat ?? true;
    this.messages.push({ role: 'user', content: text });
    this.say('user', text);
    const line = this.say('assistant', '');
    const body = {
      model: this.select.value,
      max_tokens: Number($('count').value),
      temperature: Number($('temperature').value),
      stream: true,
      stream_options: { include_usage: true },
      ...(isChat ? { messages: this.messages } : { prompt: text }),
    };
    const began = performance.now();
    let first, pieces = 0, answer = '';
    const response = await ask(isChat ? '/v1/chat/completions' : '/v1/completions', { method: 'POST', body: JSON.stringify(body), signal });
    try {
      for await (const event of events(response.body)) {
        if (event.error) throw new Error(event.error.message);
        const choice = event.choices?.[0];
        const piece = choice?.delta?.content ?? choice?.text ?? '';
        if (piece) {
          first ??= performance.now();
          pieces += 1;
          answer += piece;
          line.textContent = answer;
          this.talk.scrollTop = this.talk.scrollHeight;
          this.tell(first - began, (pieces - 1) / (performance.now() - first) * 1000);
        }
        if (event.usage) {
          const { completion_tokens: tokens, prompt_tokens: prompt, prompt_tokens_details: details } = event.usage;
          const speed = (tokens - 1) / (performance.now() - (first ?? began)) * 1000;
          this.tell((first ?? performance.now()) - began, speed, { tokens, prompt, cached: details?.cached_tokens ?? 0, ...event.halite });
        }
      }
    } finally {
      if (answer) this.messages.push({ role: 'assistant', content: answer });
    }
  }

  tell(first, speed, all) {
    const facts = [`first token ${first.toFixed(0)} ms`];
    if (Number.isFinite(speed) && speed > 0) facts.unshift(`${speed.toFixed(1)} tokens/s`);
    if (all) {
      facts.push(`${all.tokens} tokens after ${all.prompt}, ${all.cached} of them cached`);
      const devices = (all.receipts ?? []).flatMap((receipt) => receipt.parts).map((part) => part.replica).join(', then ');
      if (devices) facts.push(`on ${devices}`);
      if (Number(all.cost)) facts.push(`${all.cost} ${all.currency ?? ''}`.trim());
    }
    this.facts.textContent = facts.join(' · ');
  }
}

/** The JSON of a stream's events. */
async function* events(stream) {
  let buffer = '';
  for await (const text of texts(stream)) {
    buffer += text;
    const lines = buffer.split('\n');
    buffer = lines.pop();
    for (const line of lines) {
      if (line.startsWith('data: ') && line !== 'data: [DONE]') yield JSON.parse(line.slice(6));
    }
  }
}

// Not every browser iterates over streams.
async function* texts(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    yield value;
  }
}

const busy = (on) => {
  $('send').disabled = on;
  $('stop').disabled = !on;
};

const stop = () => running.forEach((controller) => controller.abort());

$('ask').onsubmit = async (event) => {
  event.preventDefault();
  const text = $('prompt').value;
  if (!text.trim() || $('send').disabled) return;
  $('prompt').value = '';
  wrong();
  busy(true);
  running = columns.map(() => new AbortController());
  const sent = columns.map((column, i) => column.send(text, running[i].signal));
  for (const { reason } of await Promise.allSettled(sent)) {
    if (reason && reason.name !== 'AbortError') wrong(reason);
  }
  busy(false);
  $('prompt').focus();
};

$('prompt').onkeydown = (event) => {
  if (event.key === 'Enter' && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $('ask').requestSubmit();
  }
};
document.onkeydown = (event) => {
  if (event.key === 'Escape') stop();
};
$('stop').onclick = stop;
$('clear').onclick = () => columns.forEach((column) => column.clear());
$('beside').onclick = () => {
  const isOn = columns.length === 1;
  $('beside').setAttribute('aria-pressed', isOn);
  if (isOn) {
    const column = new Column();
    columns.push(column);
    // Another one, if there is one.
    column.select.selectedIndex = Math.min(columns[0].select.selectedIndex + 1, models.length - 1);
  } else {
    columns.pop().element.remove();
  }
};

const load = async () => {
  // Encoders do not chat.
  models = (await (await ask('/v1/models')).json()).data.filter((model) => !model.meta?.embedding_length);
  if (!columns.length) columns.push(new Column());
  columns.forEach((column) => column.offer());
};
$('key').onchange = () => load().then(() => wrong(), wrong);

/** What the server does now, while somebody looks. */
const look = async () => {
  if (!$('server').open) return;
  const status = await (await ask('/admin/status')).json();
  $('replicas').replaceChildren(...status.models.flatMap((model) => model.replicas.map((replica) => {
    const row = document.createElement('tr');
    const time = replica.token_us ? `${(replica.token_us / 1000).toFixed(1)} ms` : '';
    const state = replica.failure ? `${replica.state}: ${replica.failure}` : replica.state;
    row.append(...[model.name, replica.device, state, replica.running, replica.waiting, time].map((text) => {
      const cell = document.createElement('td');
      cell.textContent = text;
      return cell;
    }));
    return row;
  })));
  const mb = (bytes) => `${(bytes / 1e6).toFixed(0)} MB`;
  const { used_bytes: used, limit_bytes: limit } = status.memory;
  $('memory').textContent = limit ? `${mb(used)} of ${mb(limit)} planned` : `${mb(used)} planned`;
};
$('server').ontoggle = () => look().catch(wrong);
setInterval(() => look().catch(() => {}), 1000);

load().catch(wrong);
$('prompt').focus();
