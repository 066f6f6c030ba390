//! Misuse of every function: null, closed, wrong and made-up handles, wrong sizes, wrong texts, wrong order,
//! two threads, and panics. Each call returns a result that says so.

use std::collections::HashSet;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::Path;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use halite::kernels::formats::Format;
use halite_capi::backend::*;
use halite_capi::border::*;
use halite_capi::chat::*;
use halite_capi::embed::*;
use halite_capi::generate::*;
use halite_capi::grammar::*;
use halite_capi::log::*;
use halite_capi::memory::*;
use halite_capi::model::*;
use halite_capi::save::*;
use halite_capi::session::*;
use halite_capi::tokenizer::*;
use halite_testing::gguf::llama;
use halite_testing::lora;

/// A call with arguments as numbers.
type Call = fn(&[usize]) -> HaliteResult;

/// Casts each argument to its parameter's type.
macro_rules! function {
    ($name:ident $($n:literal)*) => {
        // SAFETY: each test passes pointers that the header allows, or that the function must reject.
        (stringify!($name), |_v: &[usize]| unsafe { $name($(_v[$n] as _),*) })
    };
}

/// An argument: one that is right, and wrong ones with the result of each.
#[derive(Clone, Default)]
struct Arg {
    good: usize,
    bad: Vec<(&'static str, usize, HaliteResult)>,
}

struct Row {
    name: &'static str,
    call: Call,
    args: Vec<Arg>,
}

fn leak<T>(value: T) -> usize {
    (&raw mut *Box::leak(Box::new(value))).addr()
}

fn text_at(text: &str) -> usize {
    CString::new(text).unwrap().into_raw().addr()
}

/// Room that all places for results share, larger than any result.
fn room() -> usize {
    vec![0u64; 1 << 16].leak().as_ptr().addr()
}

fn is(good: usize) -> Arg {
    Arg { good, bad: Vec::new() }
}

/// A number, and one that is out of range.
fn number(good: usize, bad: usize) -> Arg {
    Arg { good, bad: vec![("number", bad, HALITE_ARGUMENT)] }
}

fn text(good: &str) -> Arg {
    let bad = vec![("null", 0, HALITE_ARGUMENT), ("not UTF-8", leak(*b"\xff\xfe\0"), HALITE_UTF8)];
    Arg { good: text_at(good), bad }
}

fn path(good: &Path) -> Arg {
    let missing = text_at("/nowhere/at/all");
    Arg {
        good: text_at(good.to_str().unwrap()),
        bad: vec![("null", 0, HALITE_ARGUMENT), ("missing", missing, HALITE_IO)],
    }
}

/// A place for a result.
fn place() -> Arg {
    let room = room();
    Arg { good: room, bad: vec![("null", 0, HALITE_ARGUMENT), ("odd address", room + 1, HALITE_ARGUMENT)] }
}

/// An array in, whose length is the next argument.
fn array<T>(values: Vec<T>) -> [Arg; 2] {
    let n = values.len();
    let at = Box::leak(values.into_boxed_slice()).as_ptr().addr();
    [
        Arg { good: at, bad: vec![("null", 0, HALITE_ARGUMENT)] },
        Arg { good: n, bad: vec![("huge", usize::MAX / 2 + 1, HALITE_ARGUMENT)] },
    ]
}

/// A buffer for a result, its capacity, and the place for the length.
fn buffer() -> [Arg; 3] {
    let bad = vec![("null with a capacity", 0, HALITE_ARGUMENT)];
    [
        Arg { good: room(), bad },
        Arg { good: 1 << 16, bad: vec![("none", 0, HALITE_TOO_SMALL)] },
        Arg { good: room(), bad: vec![("odd address", room() + 1, HALITE_ARGUMENT)] },
    ]
}

/// A struct that begins with its size, of `bytes` bytes.
fn structure(bytes: usize, is_input: bool, is_optional: bool, good: &[u8]) -> Arg {
    let with = |size: usize, beyond: u8| {
        let mut words = [0u64; 1 << 14];
        let all: &mut [u8] = as_bytes(&mut words);
        all[..good.len()].copy_from_slice(good);
        all[..4].copy_from_slice(&(size as u32).to_ne_bytes());
        all[bytes] = beyond;
        leak(words)
    };
    let mut bad: Vec<_> = [
        ("no size", 0),
        ("size of a byte", 1),
        ("size within a field", 6),
        ("size of a page too many", 1 << 17),
    ]
    .map(|(label, size)| (label, with(size, 0), HALITE_ARGUMENT))
    .into();
    bad.push(("odd address", with(bytes, 0) + 1, HALITE_ARGUMENT));
    if is_input {
        bad.push(("fields of a later version", with(bytes + 8, 1), HALITE_ARGUMENT));
    }
    if !is_optional {
        bad.push(("null", 0, HALITE_ARGUMENT));
    }
    Arg { good: with(bytes, 0), bad }
}

fn as_bytes(words: &mut [u64; 1 << 14]) -> &mut [u8] {
    // SAFETY: any bytes are valid in numbers, and the array has so many.
    unsafe { std::slice::from_raw_parts_mut(words.as_mut_ptr().cast(), size_of_val(words)) }
}

fn bytes_of<T>(value: &T) -> &[u8] {
    // SAFETY: structs of this interface have no padding.
    unsafe { std::slice::from_raw_parts((&raw const *value).cast(), size_of::<T>()) }
}

fn output<T>() -> Arg {
    structure(size_of::<T>(), false, false, &[])
}

fn input<T>() -> Arg {
    structure(size_of::<T>(), true, true, &[])
}

fn ok(result: HaliteResult) {
    // SAFETY: both are texts that end with a zero.
    let text = |at| unsafe { CStr::from_ptr(at) }.to_string_lossy().into_owned();
    assert_eq!(result, HALITE_OK, "{}: {}", text(halite_result_name(result)), text(halite_last_error()));
}

/// Opens one thing.
fn opened(open: impl FnOnce(*mut *mut c_void) -> HaliteResult) -> usize {
    let mut handle = ptr::null_mut();
    ok(open(&mut handle));
    handle.addr()
}

/// One open handle of each kind.
#[derive(Clone, Copy)]
struct World {
    model: usize,
    /// Without a session, for adapters.
    free_model: usize,
    encoder: usize,
    tokenizer: usize,
    backend: usize,
    session: usize,
    sequence: usize,
    decoder: usize,
    grammar: usize,
    chat: usize,
    generation: usize,
    embedder: usize,
    embed_tokenizer: usize,
    reranker: usize,
    rank_tokenizer: usize,
}

const TEMPLATE: &str = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:";

impl World {
    fn new() -> World {
        let name = text_at("test");
        let mut bert = Vec::new();
        halite::convert::convert(&halite_testing::bert::folder(), Format::F32, &mut bert, &mut |_| {})
            .unwrap();
        let llama = lora::randomised(llama()).bytes();
        // SAFETY: all pointers are valid.
        unsafe {
            let model = opened(|out| halite_model_open_builtin(out.cast()));
            let free_model = opened(|out| {
                halite_model_open_memory(name as _, llama.as_ptr().cast(), llama.len(), out.cast())
            });
            let bert = opened(|out| {
                halite_model_open_memory(name as _, bert.as_ptr().cast(), bert.len(), out.cast())
            });
            let tokenizer = opened(|out| halite_tokenizer_open(model as _, out.cast()));
            let embed_tokenizer = opened(|out| halite_tokenizer_open(bert as _, out.cast()));
            let backend =
                opened(|out| halite_backend_open(c"cpu:threads=1".as_ptr(), ptr::null(), out.cast()));
            let options = HaliteSessionOptions {
                context: 256,
                batch: 32,
                outputs: 2,
                ..zero(size_of::<HaliteSessionOptions>())
            };
            let session = opened(|out| halite_session_open(model as _, backend as _, &options, out.cast()));
            let mut sequence = 0;
            ok(halite_session_add(session as _, &mut sequence));
            let mut other = 0;
            ok(halite_session_add(session as _, &mut other));
            let prompt = [3u32, 4, 5];
            ok(halite_session_prefill(session as _, sequence, prompt.as_ptr(), 3, HALITE_OUTPUT_LOGITS, 0));
            let decoder = opened(|out| halite_decoder_open(tokenizer as _, 0, out.cast()));
            let grammar = opened(|out| {
                halite_grammar_open(tokenizer as _, HALITE_GRAMMAR_REGEX, c"[a-z]+".as_ptr(), out.cast())
            });
            let template = text_at(TEMPLATE);
            let chat = opened(|out| halite_chat_open(model as _, tokenizer as _, template as _, out.cast()));
            let generation = opened(|out| {
                let options = HaliteGenerateOptions {
                    max_tokens: 1000,
                    ignore_end: 1,
                    ..zero(size_of::<HaliteGenerateOptions>())
                };
                halite_generation_open(
                    session as _,
                    other,
                    tokenizer as _,
                    prompt.as_ptr(),
                    3,
                    &options,
                    out.cast(),
                )
            });
            let embedder =
                opened(|out| halite_embedder_open(bert as _, backend as _, ptr::null(), out.cast()));
            let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/data/rank/encoder.gguf");
            let rank = opened(|out| halite_model_open(text_at(path) as _, out.cast()));
            let rank_tokenizer = opened(|out| halite_tokenizer_open(rank as _, out.cast()));
            let reranker =
                opened(|out| halite_embedder_open(rank as _, backend as _, ptr::null(), out.cast()));
            ok(halite_model_close(rank as _));
            World {
                model,
                free_model,
                encoder: bert,
                tokenizer,
                backend,
                session,
                sequence: sequence as usize,
                decoder,
                grammar,
                chat,
                generation,
                embedder,
                embed_tokenizer,
                reranker,
                rank_tokenizer,
            }
        }
    }

    fn close(&self) {
        // SAFETY: handles are numbers.
        unsafe {
            ok(halite_model_close(self.model as _));
            ok(halite_model_close(self.free_model as _));
            ok(halite_model_close(self.encoder as _));
            ok(halite_tokenizer_close(self.tokenizer as _));
            ok(halite_tokenizer_close(self.embed_tokenizer as _));
            ok(halite_backend_close(self.backend as _));
            ok(halite_session_close(self.session as _));
            ok(halite_decoder_close(self.decoder as _));
            ok(halite_grammar_close(self.grammar as _));
            ok(halite_chat_close(self.chat as _));
            ok(halite_generation_close(self.generation as _));
            ok(halite_embedder_close(self.embedder as _));
            ok(halite_embedder_close(self.reranker as _));
            ok(halite_tokenizer_close(self.rank_tokenizer as _));
        }
    }
}

/// A struct of zeros with its size.
fn zero<T: Copy>(bytes: usize) -> T {
    let mut words = [0u64; 64];
    words[0] =
        u64::from_ne_bytes(std::array::from_fn(|i| if i < 4 { (bytes as u32).to_ne_bytes()[i] } else { 0 }));
    // SAFETY: structs of this interface may be zeros but for their size, and are smaller than this.
    unsafe { words.as_ptr().cast::<T>().read() }
}

/// Every function, with arguments that are right.
fn rows(open: &World, closed: &World, folder: &Path) -> Vec<Row> {
    // A handle of each other kind is wrong, and so is any other number.
    let handle = |of: fn(&World) -> usize| {
        let models = [open.model, open.free_model, open.encoder];
        let other = if models.contains(&of(open)) { open.tokenizer } else { open.model };
        let bad = vec![
            ("null", 0, HALITE_HANDLE),
            ("closed", of(closed), HALITE_HANDLE),
            ("another kind", other, HALITE_HANDLE),
            ("made up", leak(0u64), HALITE_HANDLE),
            ("made up, odd", usize::MAX, HALITE_HANDLE),
        ];
        Arg { good: of(open), bad }
    };
    let model = || handle(|w| w.model);
    let tokenizer = || handle(|w| w.tokenizer);
    let backend = || handle(|w| w.backend);
    let session = || handle(|w| w.session);
    let decoder = || handle(|w| w.decoder);
    let chat = || handle(|w| w.chat);
    let generation = || handle(|w| w.generation);
    let embedder = || handle(|w| w.embedder);
    let sequence = || Arg {
        good: open.sequence,
        bad: vec![("none", 0, HALITE_HANDLE), ("another session's", closed.sequence, HALITE_HANDLE)],
    };
    let token = || number(5, usize::MAX);
    let kind = || number(HALITE_OUTPUT_LOGITS as usize, 3);
    let key = |good: &str| {
        let mut key = text(good);
        key.bad.push(("missing", text_at("no.such.key"), HALITE_NOT_FOUND));
        key
    };
    let typed = |good: &str, other: &str| {
        let mut key = key(good);
        key.bad.push(("another type", text_at(other), HALITE_MALFORMED));
        key
    };
    let adapter = {
        let base = lora::randomised(llama());
        let file = folder.join("adapter.gguf");
        std::fs::write(&file, lora::adapter(&base, "llama", 2, 11).bytes()).unwrap();
        file
    };
    let saved = folder.join("saved");
    let model_file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/austen/halite-austen.gguf");
    let model_bytes = std::fs::read(&model_file).unwrap();
    let prompt = || array(vec![3u32, 4, 5]);
    let texts = || array(vec![text_at("one"), text_at("two")]);
    let flags = || number(0, 8);
    let name = {
        let mut name = text("cpu");
        name.bad.push(("unknown", text_at("abacus"), HALITE_ERROR));
        name.bad.push(("with an unknown option", text_at("cpu:speed=11"), HALITE_ERROR));
        name.bad.push(("with a wrong option", text_at("cpu:threads=many"), HALITE_ARGUMENT));
        name
    };
    let run = HaliteRun {
        sequence: open.sequence as u64,
        tokens: leak([7u32; 4]) as _,
        token_count: 1,
        ..zero(size_of::<HaliteRun>())
    };
    let run_with = |change: fn(&mut HaliteRun)| {
        let mut run = run;
        change(&mut run);
        leak(run)
    };
    let mut runs = structure(size_of::<HaliteRun>(), true, false, bytes_of(&run));
    runs.bad.extend([
        ("no sequence", run_with(|run| run.sequence = 0), HALITE_HANDLE),
        ("no tokens", run_with(|run| run.token_count = 0), HALITE_ARGUMENT),
        ("null tokens", run_with(|run| run.tokens = ptr::null()), HALITE_ARGUMENT),
        ("too many tokens", run_with(|run| run.token_count = usize::MAX / 2 + 1), HALITE_ARGUMENT),
        ("wrong outputs", run_with(|run| run.outputs = 9), HALITE_ARGUMENT),
    ]);
    let generate = |change: fn(&mut HaliteGenerateOptions)| {
        let mut options: HaliteGenerateOptions = zero(size_of::<HaliteGenerateOptions>());
        options.max_tokens = 2;
        change(&mut options);
        options
    };
    let mut options = structure(size_of::<HaliteGenerateOptions>(), true, true, bytes_of(&generate(|_| {})));
    options.bad.extend([
        ("temperature", leak(generate(|it| it.temperature = -1.0)), HALITE_ARGUMENT),
        ("temperature NaN", leak(generate(|it| it.temperature = f32::NAN)), HALITE_ARGUMENT),
        ("top_p", leak(generate(|it| it.top_p = 2.0)), HALITE_ARGUMENT),
        ("min_p", leak(generate(|it| it.min_p = 2.0)), HALITE_ARGUMENT),
        ("repeat_penalty", leak(generate(|it| it.repeat_penalty = -1.0)), HALITE_ARGUMENT),
        ("stop", leak(generate(|it| it.stop_count = 1)), HALITE_ARGUMENT),
        ("lookup", leak(generate(|it| it.lookup = 2)), HALITE_ARGUMENT),
        ("reserved", leak(generate(|it| it.reserved = 1)), HALITE_ARGUMENT),
        ("grammar", leak(generate(|it| it.grammar = ptr::without_provenance(usize::MAX))), HALITE_HANDLE),
    ]);
    let session_with = |change: fn(&mut HaliteSessionOptions)| {
        let mut options: HaliteSessionOptions = zero(size_of::<HaliteSessionOptions>());
        options.context = 64;
        change(&mut options);
        options
    };
    let mut sizes = structure(size_of::<HaliteSessionOptions>(), true, true, bytes_of(&session_with(|_| {})));
    sizes.bad.extend([
        ("kv_format", leak(session_with(|it| it.kv_format = c"q99".as_ptr())), HALITE_ARGUMENT),
        ("kv_format not UTF-8", leak(session_with(|it| it.kv_format = c"\xff".as_ptr())), HALITE_UTF8),
    ]);
    let embed_with = |change: fn(&mut HaliteEmbedOptions)| {
        let mut options: HaliteEmbedOptions = zero(size_of::<HaliteEmbedOptions>());
        change(&mut options);
        leak(options)
    };
    let mut embed = input::<HaliteEmbedOptions>();
    embed.bad.extend([
        ("pooling", embed_with(|it| it.pooling = 4), HALITE_ARGUMENT),
        ("reserved", embed_with(|it| it.reserved = 4), HALITE_ARGUMENT),
    ]);
    let callback = is(on_text as *const () as usize);
    let mut info = output::<HaliteGenerationInfo>();
    info.bad.retain(|(label, ..)| *label != "null");
    // The start of a text, and its bytes.
    let sized = || {
        let mut text = text("Once upon a time");
        text.bad.truncate(1);
        [text, number(4, usize::MAX / 2 + 1)]
    };
    let [b, n] = array(model_bytes);
    let [t0, t1] = texts();
    let [d0, d1] = texts();
    let [p0, p1] = prompt();
    let [p2, p3] = prompt();
    let [p4, p5] = prompt();
    let [k0, k1] = array(vec![5u32, 6]);
    let [q0, q1] = array(b"a".to_vec());
    let [e0, e1] = sized();
    let [u0, u1] = sized();
    let out = buffer;
    let mut maybe_empty = buffer();
    maybe_empty[1].bad.clear();
    let with = |mut args: Vec<Arg>, more: [Arg; 3]| {
        args.extend(more);
        args
    };
    let row = |(name, call): (&'static str, Call), args: Vec<Arg>| Row { name, call, args };
    vec![
        row(
            // SAFETY: no function at all.
            ("halite_set_log", |v| unsafe { halite_set_log(None, v[0] as _, v[1] as _) }),
            vec![is(0), is(0)],
        ),
        row(function!(halite_backend_count 0), vec![place()]),
        row(function!(halite_backend_spelling 0 1 2 3), with(vec![number(0, 99)], out())),
        row(function!(halite_backend_open 0 1 2), vec![name, is(0), place()]),
        row(
            function!(halite_backend_open_cpu 0 1 2),
            vec![
                is(1),
                {
                    let memory = |change: fn(&mut HaliteMemory)| {
                        let mut memory: HaliteMemory = zero(size_of::<HaliteMemory>());
                        memory.allocate = Some(allocate);
                        memory.free = Some(free);
                        change(&mut memory);
                        memory
                    };
                    let mut arg =
                        structure(size_of::<HaliteMemory>(), true, false, bytes_of(&memory(|_| {})));
                    arg.bad.extend([
                        ("no allocate", leak(memory(|it| it.allocate = None)), HALITE_ARGUMENT),
                        ("no free", leak(memory(|it| it.free = None)), HALITE_ARGUMENT),
                        ("reserved", leak(memory(|it| it.reserved = 1)), HALITE_ARGUMENT),
                    ]);
                    arg
                },
                place(),
            ],
        ),
        row(function!(halite_backend_join 0 1 2), vec![backend(), backend(), place()]),
        row(function!(halite_backend_info 0 1), vec![backend(), output::<HaliteBackendInfo>()]),
        row(function!(halite_backend_device 0 1 2 3), with(vec![backend()], out())),
        row(function!(halite_model_open 0 1), vec![path(&model_file), place()]),
        row(function!(halite_model_open_unmapped 0 1), vec![path(&model_file), place()]),
        row(function!(halite_model_open_memory 0 1 2 3), vec![text("bytes"), b, n, place()]),
        row(function!(halite_model_open_builtin 0), vec![place()]),
        row(function!(halite_model_info 0 1), vec![model(), output::<HaliteModelInfo>()]),
        row(function!(halite_model_name 0 1 2 3), with(vec![model()], out())),
        row(function!(halite_model_architecture 0 1 2 3), with(vec![model()], out())),
        row(function!(halite_model_metadata_count 0 1), vec![model(), place()]),
        row(function!(halite_model_metadata_key 0 1 2 3 4), with(vec![model(), number(0, 9999)], out())),
        row(
            function!(halite_model_metadata_describe 0 1 2 3 4),
            with(vec![model(), key("general.architecture")], out()),
        ),
        row(
            function!(halite_model_metadata_text 0 1 2 3 4),
            with(vec![model(), typed("general.architecture", "llama.block_count")], out()),
        ),
        row(
            function!(halite_model_metadata_integer 0 1 2),
            vec![model(), typed("llama.block_count", "general.architecture"), place()],
        ),
        row(
            function!(halite_model_metadata_float 0 1 2),
            vec![model(), typed("llama.attention.layer_norm_rms_epsilon", "general.architecture"), place()],
        ),
        row(function!(halite_model_add_adapter 0 1 2), vec![handle(|w| w.free_model), path(&adapter), is(1)]),
        row(function!(halite_tokenizer_open 0 1), vec![model(), place()]),
        row(function!(halite_tokenizer_info 0 1), vec![tokenizer(), output::<HaliteTokenizerInfo>()]),
        row(
            function!(halite_tokenizer_encode 0 1 2 3 4 5 6),
            with(vec![tokenizer(), e0, e1, flags()], out()),
        ),
        row(
            function!(halite_tokenizer_decode 0 1 2 3 4 5 6),
            with(vec![tokenizer(), k0, k1, flags()], out()),
        ),
        row(function!(halite_tokenizer_piece 0 1 2 3 4), with(vec![tokenizer(), token()], out())),
        row(function!(halite_tokenizer_find 0 1 2 3), vec![tokenizer(), q0, q1, place()]),
        row(function!(halite_tokenizer_kind 0 1 2 3), vec![tokenizer(), token(), is(0), is(0)]),
        row(function!(halite_tokenizer_quote 0 1 2 3 4 5), with(vec![tokenizer(), u0, u1], out())),
        row(function!(halite_decoder_open 0 1 2), vec![tokenizer(), flags(), place()]),
        row(function!(halite_decoder_push 0 1), vec![decoder(), token()]),
        row(function!(halite_decoder_finish 0), vec![decoder()]),
        row(function!(halite_decoder_take 0 1 2 3), with(vec![decoder()], maybe_empty.clone())),
        row(function!(halite_grammar_open 0 1 2 3), vec![tokenizer(), number(1, 4), text("[a-z]+"), place()]),
        row(function!(halite_chat_open 0 1 2 3), {
            let mut template = text(TEMPLATE);
            template.bad[0] = ("malformed", text_at("{% for %}"), HALITE_MALFORMED);
            vec![model(), tokenizer(), template, place()]
        }),
        row(function!(halite_chat_add 0 1 2 3), vec![chat(), text("user"), text("Hello"), is(0)]),
        row(function!(halite_chat_add_answer 0 1), vec![chat(), text("Hello")]),
        row(function!(halite_chat_count 0 1), vec![chat(), place()]),
        row(function!(halite_chat_prompt 0 1 2 3), with(vec![chat()], out())),
        row(function!(halite_chat_truncate 0 1), vec![chat(), is(1)]),
        row(
            function!(halite_session_plan 0 1 2 3),
            vec![model(), backend(), sizes.clone(), output::<HaliteMemoryPlan>()],
        ),
        row(function!(halite_session_open 0 1 2 3), vec![model(), backend(), sizes, place()]),
        row(function!(halite_session_info 0 1), vec![session(), output::<HaliteSessionInfo>()]),
        row(function!(halite_session_add 0 1), vec![session(), place()]),
        row(function!(halite_session_fork 0 1 2), vec![session(), sequence(), place()]),
        row(function!(halite_session_tokens 0 1 2 3 4), with(vec![session(), sequence()], out())),
        row(function!(halite_session_truncate 0 1 2), vec![session(), sequence(), is(3)]),
        row(
            function!(halite_session_save 0 1 2 3 4),
            with(vec![session(), sequence()], {
                let mut out = out();
                out[1].good *= 8;
                out
            }),
        ),
        row(function!(halite_session_save_file 0 1 2), vec![session(), sequence(), path(&saved)]),
        row(function!(halite_session_restore_file 0 1 2), vec![session(), path(&saved), place()]),
        row(function!(halite_session_restore 0 1 2 3), {
            let [bytes, count] = array(b"HALITEKV and more that is wrong".to_vec());
            let count = Arg {
                good: count.good,
                bad: vec![("none", 0, HALITE_MALFORMED), ("huge", usize::MAX / 2 + 1, HALITE_ARGUMENT)],
            };
            vec![session(), bytes, count, place()]
        }),
        row(
            function!(halite_session_prefill 0 1 2 3 4 5),
            vec![
                session(),
                sequence(),
                p0,
                {
                    let mut count = p1;
                    count.bad.push(("none", 0, HALITE_ARGUMENT));
                    count
                },
                kind(),
                is(0),
            ],
        ),
        row(function!(halite_session_logits 0 1 2 3), with(vec![session()], out())),
        row(
            function!(halite_session_step 0 1 2 3 4),
            vec![session(), runs.clone(), number(1, 0), number(HALITE_OUTPUT_ARG_MAX as usize, 3), is(0)],
        ),
        row(function!(halite_session_arg_max 0 1 2 3), with(vec![session()], out())),
        row(
            function!(halite_session_step 0 1 2 3 4),
            vec![session(), runs, is(1), is(HALITE_OUTPUT_TOP_K as usize), is(0)],
        ),
        row(function!(halite_session_top_k 0 1 2 3 4), {
            let [tokens, capacity, length] = out();
            vec![session(), tokens.clone(), Arg { good: room(), ..tokens }, capacity, length]
        }),
        row(
            ("halite_generate", |v| {
                // SAFETY: as in `function!`; the number is that of a function, or 0.
                unsafe {
                    let on_text = std::mem::transmute::<usize, HaliteOnText>(v[6]);
                    halite_generate(
                        v[0] as _, v[1] as _, v[2] as _, v[3] as _, v[4], v[5] as _, on_text, v[7] as _,
                        v[8] as _,
                    )
                }
            }),
            vec![
                session(),
                sequence(),
                tokenizer(),
                p2,
                {
                    let mut count = p3;
                    count.bad.push(("none", 0, HALITE_ARGUMENT));
                    count
                },
                options.clone(),
                callback,
                is(0),
                info,
            ],
        ),
        row(
            function!(halite_generation_open 0 1 2 3 4 5 6),
            vec![session(), sequence(), tokenizer(), p4, p5, options, place()],
        ),
        row(function!(halite_generation_next 0 1 2 3), with(vec![generation()], out())),
        row(function!(halite_generation_info 0 1), vec![generation(), output::<HaliteGenerationInfo>()]),
        row(function!(halite_generation_tokens 0 1 2 3), with(vec![generation()], out())),
        row(function!(halite_embedder_open 0 1 2 3), {
            let mut encoder = handle(|w| w.encoder);
            encoder.bad.push(("no encoder", open.model, HALITE_MALFORMED));
            vec![encoder, backend(), embed, place()]
        }),
        row(function!(halite_embedder_info 0 1), vec![embedder(), output::<HaliteEmbedderInfo>()]),
        row(
            function!(halite_embedder_embed 0 1 2 3 4 5 6 7),
            with(vec![embedder(), handle(|w| w.embed_tokenizer), t0, t1, is(0)], out()),
        ),
        row(function!(halite_embedder_rank 0 1 2 3 4 5 6 7 8), {
            let mut reranker = handle(|w| w.reranker);
            reranker.bad.push(("no reranker", open.embedder, HALITE_MALFORMED));
            with(vec![reranker, handle(|w| w.rank_tokenizer), text("Who?"), d0, d1, is(0)], out())
        }),
        row(function!(halite_embedder_cancel 0), vec![embedder()]),
        row(function!(halite_embedder_reset 0), vec![embedder()]),
        row(function!(halite_session_cancel 0), vec![session()]),
        row(function!(halite_session_reset 0), vec![session()]),
        row(function!(halite_session_remove 0 1), vec![session(), sequence()]),
        row(function!(halite_model_close 0), vec![model()]),
        row(function!(halite_tokenizer_close 0), vec![tokenizer()]),
        row(function!(halite_backend_close 0), vec![backend()]),
        row(function!(halite_decoder_close 0), vec![decoder()]),
        row(function!(halite_grammar_close 0), vec![handle(|w| w.grammar)]),
        row(function!(halite_chat_close 0), vec![chat()]),
        row(function!(halite_generation_close 0), vec![generation()]),
        row(function!(halite_embedder_close 0), vec![embedder()]),
        row(function!(halite_session_close 0), vec![session()]),
    ]
}

unsafe extern "C" fn allocate(_: usize, _: usize, _: *mut c_void) -> *mut c_void {
    ptr::null_mut()
}

unsafe extern "C" fn free(_: *mut c_void, _: usize, _: *mut c_void) {}

unsafe extern "C" fn on_text(_: *const c_char, _: usize, _: *mut c_void) -> c_int {
    0
}

/// Calls that change what other rows use, or that end it: not in parallel, and not as they are.
fn is_final(name: &str) -> bool {
    name.ends_with("_close") || name == "halite_session_remove"
}

#[test]
fn every_misuse_of_every_function_returns_what_is_wrong() {
    let folder = tempfile::tempdir().unwrap();
    let (open, closed) = (World::new(), World::new());
    closed.close();
    let rows = rows(&open, &closed, folder.path());
    let listed =
        std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../include/halite.symbols"))
            .unwrap();
    let in_rows: HashSet<&str> = rows.iter().map(|row| row.name).collect();
    // They take no arguments, or any number.
    let others = ["halite_version", "halite_last_error", "halite_result_name"];
    let missing: Vec<&str> =
        listed.lines().filter(|name| !in_rows.contains(name) && !others.contains(name)).collect();
    assert!(missing.is_empty(), "functions without a row: {missing:?}");

    let mut cases = 0;
    let mut wrong = Vec::new();
    for row in &rows {
        let good: Vec<usize> = row.args.iter().map(|arg| arg.good).collect();
        for (n, arg) in row.args.iter().enumerate() {
            for &(label, bad, expected) in &arg.bad {
                let mut args = good.clone();
                args[n] = bad;
                let got = (row.call)(&args);
                cases += 1;
                if got != expected {
                    wrong.push(format!("{} argument {n} {label}: {expected} expected, {got} got", row.name));
                }
            }
        }
        // The same without the fault, so that it is the fault that was seen.
        let got = if is_final(row.name) { HALITE_OK } else { (row.call)(&good) };
        if got != HALITE_OK && row.name != "halite_session_restore" {
            // SAFETY: a text that ends with a zero.
            let message = unsafe { CStr::from_ptr(halite_last_error()) }.to_string_lossy().into_owned();
            wrong.push(format!("{}: {got}: {message}", row.name));
        }
    }
    open.close();
    println!("{cases} cases of misuse");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(cases >= 200, "{cases}");
}

/// What a callback and another thread use.
struct Shared {
    session: usize,
    entered: AtomicBool,
    leave: AtomicBool,
    from_within: AtomicUsize,
}

unsafe extern "C" fn wait(_: *const c_char, _: usize, user: *mut c_void) -> c_int {
    // SAFETY: the test passed it.
    let shared = unsafe { &*user.cast::<Shared>() };
    let mut sequence = 0;
    // SAFETY: the place is valid.
    let result = unsafe { halite_session_add(shared.session as _, &mut sequence) };
    shared.from_within.store(result as usize, Ordering::SeqCst);
    shared.entered.store(true, Ordering::SeqCst);
    while !shared.leave.load(Ordering::SeqCst) {
        std::thread::yield_now();
    }
    0
}

#[test]
fn a_session_in_use_is_busy_and_can_be_cancelled() {
    let folder = tempfile::tempdir().unwrap();
    let (open, closed) = (World::new(), World::new());
    closed.close();
    let shared = Shared {
        session: open.session,
        entered: AtomicBool::new(false),
        leave: AtomicBool::new(false),
        from_within: AtomicUsize::new(0),
    };
    let rows = rows(&open, &closed, folder.path());
    let of_session =
        |row: &&Row| row.args.iter().any(|arg| arg.good == open.session || arg.good == open.generation);
    let works = [
        "halite_session_cancel",
        "halite_session_reset",
        "halite_generation_info",
        "halite_generation_tokens",
    ];
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let prompt = [3u32, 4];
            let mut info: HaliteGenerationInfo = zero(size_of::<HaliteGenerationInfo>());
            let options = HaliteGenerateOptions {
                max_tokens: 100,
                ignore_end: 1,
                ..zero(size_of::<HaliteGenerateOptions>())
            };
            // SAFETY: all pointers are valid.
            let result = unsafe {
                let user = (&raw const shared).cast_mut().cast();
                halite_generate(
                    open.session as _,
                    open.sequence as u64,
                    open.tokenizer as _,
                    prompt.as_ptr(),
                    2,
                    &options,
                    Some(wait),
                    user,
                    &mut info,
                )
            };
            ok(result);
            assert_eq!(info.finish, HALITE_FINISH_CANCELLED);
        });
        while !shared.entered.load(Ordering::SeqCst) {
            std::thread::yield_now();
        }
        for row in rows.iter().filter(of_session).filter(|row| !is_final(row.name)) {
            let good: Vec<usize> = row.args.iter().map(|arg| arg.good).collect();
            let expected = if works.contains(&row.name) { HALITE_OK } else { HALITE_BUSY };
            assert_eq!((row.call)(&good), expected, "{}", row.name);
        }
        // SAFETY: a handle is a number.
        ok(unsafe { halite_session_cancel(open.session as _) });
        shared.leave.store(true, Ordering::SeqCst);
    });
    assert_eq!(shared.from_within.load(Ordering::SeqCst), HALITE_BUSY as usize);
    open.close();
}

/// Calls from several threads at once, while handles are closed, end in some result.
#[test]
fn threads_that_use_and_close_the_same_handles_do_no_harm() {
    let folder = tempfile::tempdir().unwrap();
    let (open, closed) = (World::new(), World::new());
    closed.close();
    let rows = rows(&open, &closed, folder.path());
    let heavy = ["halite_session_open", "halite_embedder_open", "halite_model_open", "halite_grammar_open"];
    let light: Vec<&Row> =
        rows.iter().filter(|row| !heavy.iter().any(|name| row.name.starts_with(name))).collect();
    std::thread::scope(|scope| {
        for start in 0..4 {
            let light = &light;
            scope.spawn(move || {
                for n in 0..light.len() * 3 {
                    let row = light[(n * 7 + start * 13) % light.len()];
                    let last_round = n >= light.len() * 2;
                    if last_round || !is_final(row.name) {
                        let mut good: Vec<usize> = row.args.iter().map(|arg| arg.good).collect();
                        // Each thread has its own places; only the library's memory is shared.
                        for (arg, value) in row.args.iter().zip(&mut good) {
                            if arg.bad.iter().any(|(label, ..)| label.starts_with("odd address")) {
                                *value = room();
                            }
                        }
                        let result = (row.call)(&good);
                        assert_ne!(result, HALITE_INTERNAL, "{}", row.name);
                    }
                }
            });
        }
    });
}

#[test]
fn calls_in_a_wrong_order_say_so() {
    let (a, b) = (World::new(), World::new());
    let mut length = 0;
    // SAFETY: all pointers are valid.
    unsafe {
        // Outputs of another kind than those of the last step, or of none.
        assert_eq!(halite_session_arg_max(a.session as _, ptr::null_mut(), 0, &mut length), HALITE_ARGUMENT);
        let one = [3u32];
        ok(halite_session_prefill(
            a.session as _,
            a.sequence as u64,
            one.as_ptr(),
            1,
            HALITE_OUTPUT_TOP_K,
            0,
        ));
        assert_eq!(halite_session_logits(a.session as _, ptr::null_mut(), 0, &mut length), HALITE_ARGUMENT);
        // A failed step has no outputs.
        let huge = [u32::MAX];
        let failed = halite_session_prefill(
            a.session as _,
            a.sequence as u64,
            huge.as_ptr(),
            1,
            HALITE_OUTPUT_TOP_K,
            0,
        );
        assert_eq!(failed, HALITE_ARGUMENT);
        let none = halite_session_top_k(a.session as _, ptr::null_mut(), ptr::null_mut(), 0, &mut length);
        assert_eq!(none, HALITE_ARGUMENT);
        // A removed sequence, also where another one took its place inside.
        let mut sequence = 0;
        ok(halite_session_add(a.session as _, &mut sequence));
        ok(halite_session_remove(a.session as _, sequence));
        assert_eq!(halite_session_remove(a.session as _, sequence), HALITE_HANDLE);
        let mut other = 0;
        ok(halite_session_add(a.session as _, &mut other));
        assert_eq!(
            halite_session_tokens(a.session as _, sequence, ptr::null_mut(), 0, &mut length),
            HALITE_HANDLE
        );
        // A tokenizer's grammar with another tokenizer.
        let options =
            HaliteGenerateOptions { grammar: b.grammar as _, ..zero(size_of::<HaliteGenerateOptions>()) };
        let generate = |options: &HaliteGenerateOptions| {
            halite_generate(
                a.session as _,
                other,
                a.tokenizer as _,
                one.as_ptr(),
                1,
                options,
                None,
                ptr::null_mut(),
                ptr::null_mut(),
            )
        };
        assert_eq!(generate(&options), HALITE_ARGUMENT);
        // A generation whose sequence was changed, and one whose sequence is gone.
        let mut text = [0; 256];
        let options = HaliteGenerateOptions { max_tokens: 8, ..zero(size_of::<HaliteGenerateOptions>()) };
        let start = || {
            opened(|out| {
                halite_generation_open(
                    a.session as _,
                    other,
                    a.tokenizer as _,
                    one.as_ptr(),
                    1,
                    &options,
                    out.cast(),
                )
            })
        };
        let generation = start();
        ok(halite_generation_next(generation as _, text.as_mut_ptr(), 256, &mut length));
        ok(halite_session_truncate(a.session as _, other, 0));
        assert_eq!(
            halite_generation_next(generation as _, text.as_mut_ptr(), 256, &mut length),
            HALITE_ARGUMENT
        );
        let generation = start();
        ok(halite_session_remove(a.session as _, other));
        assert_eq!(
            halite_generation_next(generation as _, text.as_mut_ptr(), 256, &mut length),
            HALITE_HANDLE
        );
        // An adapter while a session uses the model.
        let path = c"adapter";
        assert_eq!(halite_model_add_adapter(a.model as _, path.as_ptr(), 1.0), HALITE_IO);
        // Closed twice.
        ok(halite_session_close(a.session as _));
        assert_eq!(halite_session_close(a.session as _), HALITE_HANDLE);
        assert_eq!(halite_session_cancel(a.session as _), HALITE_HANDLE);
        // A made handle of a closed one goes on.
        ok(halite_generation_info(a.generation as _, &mut zero(size_of::<HaliteGenerationInfo>())));
        ok(halite_generation_next(a.generation as _, text.as_mut_ptr(), 256, &mut length));
    }
}

#[test]
fn a_panic_ends_at_the_border() {
    let open = World::new();
    let mut length = 0;
    // SAFETY: all pointers are valid.
    unsafe {
        panic_in_next_call();
        assert_eq!(halite_model_name(open.model as _, ptr::null_mut(), 0, &mut length), HALITE_INTERNAL);
        assert_eq!(CStr::from_ptr(halite_last_error()).to_str().unwrap(), "panic: a test asked for a panic");
        ok(halite_model_name(open.model as _, ptr::null_mut(), 0, &mut length));
    }
    open.close();
}

/// Structs of other versions: a shorter one has defaults, a longer one may be zero beyond.
#[test]
fn structs_of_other_versions_are_taken() {
    let open = World::new();
    let options = |bytes: usize| {
        let mut words = [0u64; 16];
        words[0] = u64::from(32u32) << 32 | bytes as u64;
        words
    };
    // SAFETY: the structs have as many bytes as they say.
    unsafe {
        for bytes in [4, 8, size_of::<HaliteSessionOptions>(), 64] {
            let options = options(bytes);
            let mut plan: HaliteMemoryPlan = zero(size_of::<HaliteMemoryPlan>());
            ok(halite_session_plan(open.model as _, open.backend as _, options.as_ptr().cast(), &mut plan));
            assert_eq!(plan.context == 32, bytes > 4, "{bytes}: {}", plan.context);
        }
        // What lies beyond a caller's struct is not written.
        let mut plan = [u64::MAX; 8];
        plan[0] = 16;
        ok(halite_session_plan(open.model as _, open.backend as _, ptr::null(), plan.as_mut_ptr().cast()));
        assert!(plan[1] > 0 && plan[1] < u64::MAX && plan[2..] == [u64::MAX; 6], "{plan:?}");
        // What this version does not know is 0.
        plan[0] = 64;
        ok(halite_session_plan(open.model as _, open.backend as _, ptr::null(), plan.as_mut_ptr().cast()));
        assert!(plan[4] < u64::MAX && plan[5..] == [0; 3], "{plan:?}");
    }
    open.close();
}
