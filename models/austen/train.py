#!/usr/bin/env python3
"""Trains Halite's built-in language model on Jane Austen's six novels and writes it as a GGUF.

    python3 train.py --minutes 60          # text, vocabulary, training, halite-austen.gguf

The text is the data file of the R package janeaustenr (Debian: r-cran-janeaustenr).
Everything else that is needed is in requirements.txt. Ctrl-C, or SIGTERM, ends the training early
and still writes the model; `--export CHECKPOINT` writes a GGUF from a checkpoint alone.
"""
import argparse, json, math, multiprocessing, os, re, signal, struct, time, zlib

import gguf
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn

EOT = "<|endoftext|>"
HELD_OUT = 0.05  # the last part of every novel, cut at a paragraph
CFG = dict(vocab=2048, ctx=512, dim=256, layers=5, heads=8, kv_heads=4, ffn=512, eps=1e-5, rope_base=10000.0)

# ---------------------------------------------------------------- text


def read_novels(rdb):
    """The R data file holds one zlib stream per novel: a serialised character vector of lines."""
    data, at, novels = open(rdb, "rb").read(), 0, []
    while at < len(data):
        unzip = zlib.decompressobj()
        raw = unzip.decompress(data[at + 4:])
        at = len(data) - len(unzip.unused_data)
        p = 14 + 4 + struct.unpack(">i", raw[14:18])[0]  # header, then the name of the encoding
        _, count = struct.unpack(">ii", raw[p:p + 8])
        p, lines = p + 8, []
        for _ in range(count):
            size = struct.unpack(">i", raw[p + 4:p + 8])[0]
            lines.append(raw[p + 8:p + 8 + size].decode("utf-8"))
            p += 8 + size
        novels.append(lines)
    return novels


def paragraphs(lines):
    """Joins the lines of a paragraph by a space; verse and letterheads lose their indentation."""
    text = "\n".join(line.strip() for line in lines)
    text = re.sub(r"_([^_]*)_", r"\1", text)  # _emphasis_
    return [re.sub(r"\s+", " ", p).strip() for p in re.split(r"\n\s*\n", text) if p.strip()]


def load_text(rdb):
    """The training text and the held-out text of each novel."""
    train, held = [], []
    for lines in read_novels(rdb):
        paras = paragraphs(lines)
        total, seen, cut = sum(map(len, paras)), 0, 0
        while seen < (1 - HELD_OUT) * total:
            seen, cut = seen + len(paras[cut]), cut + 1
        train.append("\n\n".join(paras[:cut]))
        held.append("\n\n".join(paras[cut:]))
    return train, held


def make_tokenizer(texts):
    """Byte-level BPE with GPT-2's pre-tokenisation."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=CFG["vocab"], special_tokens=[EOT], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    return tok


def encode(tok, novels):
    ids = []
    for text in novels:
        ids += [tok.token_to_id(EOT)] + tok.encode(text).ids
    return torch.tensor(ids + [tok.token_to_id(EOT)])


# ---------------------------------------------------------------- model


class Norm(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), CFG["eps"])


def rope(x, cos, sin):
    """Rotates the neighbours 2i and 2i+1 together. x: batch, heads, time, head_dim."""
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)


class Block(nn.Module):
    def __init__(self, c, drop):
        super().__init__()
        d, self.h, self.kv, self.hd = c["dim"], c["heads"], c["kv_heads"], c["dim"] // c["heads"]
        self.drop = drop
        self.attn_norm, self.ffn_norm = Norm(d), Norm(d)
        self.attn_q = nn.Linear(d, d, bias=False)
        self.attn_k = nn.Linear(d, self.kv * self.hd, bias=False)
        self.attn_v = nn.Linear(d, self.kv * self.hd, bias=False)
        self.attn_output = nn.Linear(d, d, bias=False)
        self.ffn_gate = nn.Linear(d, c["ffn"], bias=False)
        self.ffn_up = nn.Linear(d, c["ffn"], bias=False)
        self.ffn_down = nn.Linear(c["ffn"], d, bias=False)

    def forward(self, x, cos, sin):
        b, t, d = x.shape
        h = self.attn_norm(x)
        q = rope(self.attn_q(h).view(b, t, self.h, self.hd).transpose(1, 2), cos, sin)
        k = rope(self.attn_k(h).view(b, t, self.kv, self.hd).transpose(1, 2), cos, sin)
        v = self.attn_v(h).view(b, t, self.kv, self.hd).transpose(1, 2)
        k, v = (z.repeat_interleave(self.h // self.kv, 1) for z in (k, v))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + F.dropout(self.attn_output(a.transpose(1, 2).reshape(b, t, d)), self.drop, self.training)
        h = self.ffn_norm(x)
        h = self.ffn_down(F.silu(self.ffn_gate(h)) * self.ffn_up(h))
        return x + F.dropout(h, self.drop, self.training)


class Llama(nn.Module):
    def __init__(self, c, drop=0.0):
        super().__init__()
        self.drop = drop
        self.token_embd = nn.Embedding(c["vocab"], c["dim"])
        self.blk = nn.ModuleList(Block(c, drop) for _ in range(c["layers"]))
        self.output_norm = Norm(c["dim"])
        half = torch.arange(0, c["dim"] // c["heads"], 2) / (c["dim"] // c["heads"])
        angle = torch.outer(torch.arange(c["ctx"]), c["rope_base"] ** -half)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                wide = 1 / math.sqrt(2 * c["layers"]) if "output" in name or "down" in name else 1
                nn.init.normal_(p, std=0.02 if "embd" in name else wide / math.sqrt(p.shape[1]))

    def forward(self, ids):
        t = ids.shape[1]
        x = F.dropout(self.token_embd(ids), self.drop, self.training)
        cos, sin = self.cos[:t].to(x.dtype), self.sin[:t].to(x.dtype)
        for block in self.blk:
            x = block(x, cos, sin)
        return F.linear(self.output_norm(x), self.token_embd.weight)  # tied

    def loss(self, ids, reduction="mean"):
        logits = self(ids[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction=reduction)


class Muon(torch.optim.Optimizer):
    """Momentum whose step is made orthogonal by Newton-Schulz iterations; for 2-D weights."""

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for g in self.param_groups:
            by_shape = {}
            for p in g["params"]:
                by_shape.setdefault(tuple(p.shape), []).append(p)
            for (rows, cols), ps in by_shape.items():
                for p in ps:
                    if not self.state[p]:
                        self.state[p]["m"] = torch.zeros_like(p)
                    self.state[p]["m"].lerp_(p.grad, 1 - g["momentum"])
                x = torch.stack([p.grad.lerp(self.state[p]["m"], g["momentum"]) for p in ps])
                x = x.mT if rows > cols else x
                x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).bfloat16()
                for _ in range(5):
                    s = x @ x.mT
                    x = 3.4445 * x + (-4.7750 * s + 2.0315 * s @ s) @ x
                x = (x.mT if rows > cols else x).float()
                for p, step in zip(ps, x):
                    p.mul_(1 - g["lr"] * g["weight_decay"])
                    p.add_(step, alpha=-g["lr"] * max(1, rows / cols) ** 0.5)


# ---------------------------------------------------------------- measuring and writing


@torch.no_grad()
def bits_per_byte(model, novels, tok, stride=256):
    """Over the held-out ends, each alone; a token is told from at least ctx - stride tokens before it."""
    model.eval()
    ctx, nats, size = CFG["ctx"], 0.0, 0
    for text in novels:
        ids = encode(tok, [text])
        size += len(text.encode())
        windows, scored, at = [], [], 0
        while at + 1 < len(ids):
            start = max(0, min(at - (ctx - stride), len(ids) - 1 - ctx)) if at else 0
            end = min(start + ctx, len(ids) - 1)
            windows.append(ids[start:end + 1])
            scored.append(at - start)
            at = end
        for w, s in zip(windows, scored):
            nats += model.loss(w[None], "none")[s:].sum().item()
    model.train()
    return nats / math.log(2) / size


def gguf_type(name):
    """What each tensor is stored as: 8.5 bits for matrices, 32 for norms."""
    kind = gguf.GGMLQuantizationType
    return kind.F32 if "norm" in name else kind.Q8_0


def write_gguf(path, state, tok):
    w = gguf.GGUFWriter(path, "llama")
    w.add_type("model")
    w.add_name("Halite Austen")
    w.add_description("A 3.5M-parameter llama-type model of Jane Austen's six novels, trained from scratch for Halite")
    w.add_license("MIT OR Apache-2.0")
    w.add_languages(["en"])
    w.add_size_label("3.5M")
    w.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    w.add_quantization_version(gguf.GGML_QUANT_VERSION)
    w.add_vocab_size(CFG["vocab"])
    w.add_context_length(CFG["ctx"])
    w.add_embedding_length(CFG["dim"])
    w.add_block_count(CFG["layers"])
    w.add_feed_forward_length(CFG["ffn"])
    w.add_head_count(CFG["heads"])
    w.add_head_count_kv(CFG["kv_heads"])
    w.add_key_length(CFG["dim"] // CFG["heads"])
    w.add_value_length(CFG["dim"] // CFG["heads"])
    w.add_rope_dimension_count(CFG["dim"] // CFG["heads"])
    w.add_rope_freq_base(CFG["rope_base"])
    w.add_layer_norm_rms_eps(CFG["eps"])
    spec = json.loads(tok.to_str())["model"]
    tokens = sorted(spec["vocab"], key=spec["vocab"].get)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("gpt-2")
    w.add_token_list(tokens)
    w.add_token_types([gguf.TokenType.CONTROL if t == EOT else gguf.TokenType.NORMAL for t in tokens])
    w.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in spec["merges"]])
    w.add_bos_token_id(tok.token_to_id(EOT))
    w.add_eos_token_id(tok.token_to_id(EOT))
    w.add_add_bos_token(False)  # in the text a novel's title follows it, a prompt rarely is one
    w.add_add_eos_token(False)
    for name, value in state.items():
        full = name if name.endswith("weight") else name + ".weight"
        data = value.float().numpy()
        kind = gguf_type(full)
        if kind != gguf.GGMLQuantizationType.F32:
            data = gguf.quants.quantize(data, kind)
        w.add_tensor(full, data, raw_dtype=kind)
    part = path + ".part"
    w.write_header_to_file(part)
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    os.replace(part, path)


def read_gguf(path):
    """The weights of a written GGUF, dequantised."""
    return {t.name: torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).copy())
            for t in gguf.GGUFReader(path).tensors}


@torch.no_grad()
def continue_text(model, tok, prompt, count=64, temperature=0.0, seed=0):
    model.eval()
    ids, rng = tok.encode(prompt).ids, torch.Generator().manual_seed(seed)
    for _ in range(count):
        logits = model(torch.tensor([ids[-CFG["ctx"]:]]))[0, -1].float()
        if temperature:
            ids.append(torch.multinomial(F.softmax(logits / temperature, -1), 1, generator=rng).item())
        else:
            ids.append(logits.argmax().item())
    model.train()
    return tok.decode(ids)


def finish(checkpoint, tok, held, out):
    """Writes the GGUF and says what it and the f32 weights are worth."""
    state = torch.load(checkpoint)["model"]
    write_gguf(out, state, tok)
    model = Llama(CFG)
    for label, weights in (("f32", state), ("gguf", read_gguf(out))):
        model.load_state_dict(weights)
        print(f"held-out bits per byte, {label}: {bits_per_byte(model, held, tok):.4f}", flush=True)
    print(out, os.path.getsize(out), "bytes,", sum(p.numel() for p in model.parameters()), "parameters")
    for temperature in (0.0, 0.7):
        print(f"--- temperature {temperature}\n{continue_text(model, tok, 'Once upon a time', 120, temperature)}")


# ---------------------------------------------------------------- training


def train_rank(rank, a):
    """One of `a.procs` single-threaded processes: gradients are averaged, each keeps the whole model."""
    torch.manual_seed(1775)  # the same weights everywhere
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{os.path.abspath(a.work)}/meet", rank=rank, world_size=a.procs)
    train, held = load_text(a.data)
    tok = Tokenizer.from_file(os.path.join(a.work, "tokenizer.json"))
    ids = encode(tok, train)
    size = sum(len(t.encode()) for t in train)
    model, ema = Llama(CFG, a.dropout), Llama(CFG)
    ema.load_state_dict(model.state_dict())
    if rank == 0:
        print(f"{size} bytes of text, {len(ids)} tokens, {size / len(ids):.3f} bytes a token; held out "
              f"{sum(len(t.encode()) for t in held)} bytes; {sum(p.numel() for p in model.parameters())} parameters", flush=True)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embd" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim != 2 or "embd" in n]
    opts = [Muon(matrices, a.lr, weight_decay=a.decay),
            torch.optim.AdamW(rest, a.lr / 5, betas=(0.9, 0.95), weight_decay=0.01)]
    for o in opts:
        for g in o.param_groups:
            g["peak"] = g["lr"]
    stopped = []
    for s in (signal.SIGINT, signal.SIGTERM):
        signal.signal(s, lambda *_: stopped.append(1))

    torch.manual_seed(1775 + rank)  # other windows and dropout on each
    best = os.path.join(a.work, "best.pt")
    lowest, step, recent, tokens, begun, measured = math.inf, 0, [], 0, time.time(), time.time()
    while True:
        # The first process's clock sets the schedule, and its signals the end, for all.
        clock = torch.tensor([(time.time() - begun) / (60 * a.minutes), float(bool(stopped))], dtype=torch.float64)
        dist.broadcast(clock, 0)
        done, last = min(clock[0].item(), 1), clock[0].item() >= 1 or clock[1].item() > 0
        rate = min(1, (step + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
        for o in opts:
            for g in o.param_groups:
                g["lr"] = g["peak"] * rate
        ctx = CFG["ctx"] // 2 if done < a.short else CFG["ctx"]
        at = torch.randint(len(ids) - ctx, (a.tokens // ctx,))
        batch = torch.stack([ids[i:i + ctx + 1] for i in at])
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.loss(batch)
        loss.backward()
        grads = [p.grad for p in model.parameters()]
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)
        for g, part in zip(grads, (flat / a.procs).split([g.numel() for g in grads])):
            g.copy_(part.view_as(g))
        nn.utils.clip_grad_norm_(rest, 1.0)
        for o in opts:
            o.step()
            o.zero_grad(set_to_none=True)
        step, tokens = step + 1, tokens + batch[:, 1:].numel() * a.procs
        recent.append(loss.item())
        with torch.no_grad():
            for e, p in zip(ema.parameters(), model.parameters()):
                e.lerp_(p, 1 - min(0.995, step / (step + 10)))
        if rank == 0 and (last or time.time() - measured > 240 or step == 50):
            bpb = bits_per_byte(ema, held, tok, CFG["ctx"])  # quick, and so a little too high
            nats, recent = sum(recent) / len(recent), []
            print(f"{(time.time() - begun) / 60:6.1f} min  step {step:5d}  epochs {tokens / len(ids):5.2f}  rate {rate:.3f}"
                  f"  train {nats / math.log(2) * len(ids) / size:.4f} bpb  held-out {bpb:.4f} bpb", flush=True)
            if bpb < lowest:
                lowest = bpb
                torch.save(dict(model=ema.state_dict(), step=step, bpb=bpb), best + ".part")
                os.replace(best + ".part", best)
            measured = time.time()
        if last:
            break
    dist.destroy_process_group()
    if rank == 0:
        finish(best, tok, held, a.out)


def main():
    here = os.path.dirname(os.path.abspath(__file__))
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("--data", default="/usr/lib/R/site-library/janeaustenr/data/Rdata.rdb")
    a.add_argument("--out", default=os.path.join(here, "halite-austen.gguf"))
    a.add_argument("--work", default="austen-work", help="folder for the tokenizer and the best checkpoint")
    a.add_argument("--minutes", type=float, default=60)
    a.add_argument("--procs", type=int, default=2, help="processes, one for each core")
    a.add_argument("--tokens", type=int, default=3072, help="a process's tokens for each step")
    a.add_argument("--short", type=float, default=0.6, help="the part of the time that trains on half the context")
    a.add_argument("--dropout", type=float, default=0.1)
    a.add_argument("--lr", type=float, default=0.02, help="of Muon; AdamW's for embedding and norms is a fifth")
    a.add_argument("--decay", type=float, default=0.1, help="weight decay of the matrices")
    a.add_argument("--export", metavar="CHECKPOINT", help="only write the GGUF of this checkpoint")
    a = a.parse_args()
    os.makedirs(a.work, exist_ok=True)
    train, held = load_text(a.data)
    tok = make_tokenizer(train)
    if a.export:
        return finish(a.export, tok, held, a.out)
    tok.save(os.path.join(a.work, "tokenizer.json"))
    meet = os.path.join(a.work, "meet")
    if os.path.exists(meet):
        os.remove(meet)
    for s in (signal.SIGINT, signal.SIGTERM):  # the processes then end together, after their step
        signal.signal(s, lambda *_: [p.terminate() for p in multiprocessing.active_children()])
    torch.multiprocessing.spawn(train_rank, (a,), a.procs)


if __name__ == "__main__":
    main()
