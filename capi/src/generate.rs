//! Generation: text in tokens, text out, by a callback or by pulling.

use std::ffi::{c_char, c_int, c_void};
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use halite::generate::{Constraint, Decoding, Finish, Stream};
use halite::session::SequenceId;
use halite::speculate::PromptLookup;
use halite::{GenerateOptions, SamplerOptions, Tokenizer};

use crate::border::{Caller, Failure, Fallible, HALITE_END, HaliteResult, call, reserved};
use crate::grammar::{self, HaliteGrammar};
use crate::handle::{self, Object};
use crate::session::{HaliteSequence, HaliteSession, SessionObject, State};
use crate::stop::{self, Deadline};
use crate::tokenizer::HaliteTokenizer;

/// A generation under way, whose text the caller pulls.
pub struct HaliteGeneration;

/// Receives text as it appears, in whole characters: UTF-8 with a zero at the end, valid during the call.
/// Returns 0 to go on, and any other number to stop. The session is in use meanwhile, so calls with it return
/// HALITE_BUSY, except for halite_session_cancel and halite_session_reset. It must return, neither by an
/// exception nor by longjmp.
pub type HaliteOnText =
    Option<unsafe extern "C" fn(text: *const c_char, bytes: usize, user: *mut c_void) -> c_int>;

/// Options of a generation. A field that is 0 has its default, which is greedy.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct HaliteGenerateOptions {
    pub struct_bytes: u32,
    /// Most tokens to generate. Default: 128.
    pub max_tokens: u32,
    /// Divides the logits. Default: 0, which takes the most likely token.
    pub temperature: f32,
    /// Keeps so many of the most likely tokens. Default: 40; below 0: all.
    pub top_k: i32,
    /// Keeps the most likely tokens whose probabilities add up to this. Default: 0.95; 1: all.
    pub top_p: f32,
    /// Drops tokens less likely than this times the most likely one. Default: 0.05; below 0: none.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of recent tokens. Default: 1, which is off.
    pub repeat_penalty: f32,
    /// Subtracted for each time that a token is recent. Default: 0.
    pub frequency_penalty: f32,
    /// Subtracted if a token is recent. Default: 0.
    pub presence_penalty: f32,
    /// Tokens that are recent. Default: 64.
    pub penalty_window: u32,
    /// Seed of the random draws.
    pub seed: u64,
    /// Texts that end the generation, which leaves them out.
    pub stop: *const *const c_char,
    /// Holds the text to a grammar. Default: none.
    pub grammar: *const HaliteGrammar,
    pub stop_count: u32,
    /// Go on after end-of-text tokens: 0 or 1.
    pub ignore_end: u32,
    /// Show control tokens in the text: 0 or 1.
    pub show_special: u32,
    /// Milliseconds after which the generation ends, within one op. Default: none.
    pub deadline_ms: u32,
    /// Drafts up to so many tokens by looking them up in the text, which a step verifies; the session must
    /// have more outputs than that. Default: none.
    pub lookup: u32,
    pub reserved: u32,
}

/// Why a generation ended.
pub type HaliteFinish = u32;
/// It goes on.
pub const HALITE_FINISH_NONE: HaliteFinish = 0;
/// The model ended the text.
pub const HALITE_FINISH_END: HaliteFinish = 1;
/// max_tokens were generated.
pub const HALITE_FINISH_LENGTH: HaliteFinish = 2;
/// A stop text appeared.
pub const HALITE_FINISH_STOP: HaliteFinish = 3;
/// The session's memory is full.
pub const HALITE_FINISH_CONTEXT_FULL: HaliteFinish = 4;
/// The callback said so.
pub const HALITE_FINISH_CALLBACK: HaliteFinish = 5;
/// Another thread said so.
pub const HALITE_FINISH_CANCELLED: HaliteFinish = 6;
/// The deadline passed.
pub const HALITE_FINISH_DEADLINE: HaliteFinish = 7;
/// A step failed; its call returned why.
pub const HALITE_FINISH_ERROR: HaliteFinish = 8;

/// What a generation did.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct HaliteGenerationInfo {
    pub struct_bytes: u32,
    pub finish: HaliteFinish,
    pub prompt_tokens: u32,
    /// Tokens of the prompt that the sequence had already.
    pub reused_tokens: u32,
    /// Generated tokens.
    pub tokens: u32,
    /// Steps after the prompt.
    pub decode_steps: u32,
    pub drafted_tokens: u32,
    /// Drafted tokens that were right.
    pub accepted_tokens: u32,
    pub prefill_seconds: f64,
    pub first_token_seconds: f64,
    pub decode_seconds: f64,
}

sized! {
    HaliteGenerateOptions {
        struct_bytes: u32, max_tokens: u32, temperature: f32, top_k: i32, top_p: f32, min_p: f32,
        repeat_penalty: f32, frequency_penalty: f32, presence_penalty: f32, penalty_window: u32, seed: u64,
        stop: *const *const c_char, grammar: *const HaliteGrammar, stop_count: u32, ignore_end: u32,
        show_special: u32, deadline_ms: u32, lookup: u32, reserved: u32,
    }
    HaliteGenerationInfo {
        struct_bytes: u32, finish: HaliteFinish, prompt_tokens: u32, reused_tokens: u32, tokens: u32,
        decode_steps: u32, drafted_tokens: u32, accepted_tokens: u32, prefill_seconds: f64,
        first_token_seconds: f64, decode_seconds: f64,
    }
}

/// A generation and all that it needs from step to step.
struct Generating {
    stream: Stream,
    sequence: HaliteSequence,
    id: SequenceId,
    /// Length of the sequence after the last step.
    length: u32,
    tokenizer: Arc<Tokenizer>,
    lookup: Option<PromptLookup>,
    constraint: Option<Box<dyn Constraint + Send>>,
    deadline: Deadline,
    finish: HaliteFinish,
    /// The text that was not passed on yet.
    text: String,
}

struct GenerationObject {
    session: Arc<SessionObject>,
    generating: Mutex<Generating>,
}

impl Object for GenerationObject {
    type Handle = HaliteGeneration;
    const KIND: &'static str = "generation";
}

fn options(c: &Caller, given: &HaliteGenerateOptions) -> Fallible<GenerateOptions> {
    let or = |value: f32, default: f32| if value == 0.0 { default } else { value };
    let default = SamplerOptions::default();
    let sampler = SamplerOptions::default()
        .temperature(given.temperature)
        .top_k(match given.top_k {
            0 => default.top_k,
            k => usize::try_from(k).unwrap_or(0),
        })
        .top_p(or(given.top_p, default.top_p))
        .min_p(if given.min_p < 0.0 { 0.0 } else { or(given.min_p, default.min_p) })
        .repeat_penalty(or(given.repeat_penalty, default.repeat_penalty))
        .frequency_penalty(given.frequency_penalty)
        .presence_penalty(given.presence_penalty)
        .penalty_window(match given.penalty_window {
            0 => default.penalty_window,
            n => n as usize,
        })
        .seed(given.seed);
    let stop = c.array("stop", given.stop, given.stop_count as usize)?;
    let stop = stop.iter().map(|&text| c.text("stop", text).map(String::from)).collect::<Fallible<_>>()?;
    let options = GenerateOptions::default().sampler(sampler).stop(stop);
    let max_tokens = if given.max_tokens == 0 { options.max_tokens } else { given.max_tokens };
    Ok(options.max_tokens(max_tokens).ignore_end(given.ignore_end != 0).special(given.show_special != 0))
}

impl Generating {
    fn new(
        c: &Caller,
        state: &mut State,
        sequence: HaliteSequence,
        tokenizer: *const HaliteTokenizer,
        prompt: &[u32],
        given: *const HaliteGenerateOptions,
    ) -> Fallible<Generating> {
        let tokenizer: Arc<Tokenizer> = handle::get(tokenizer)?;
        let given = c.options("options", given)?;
        let deadline = stop::deadline(given.deadline_ms);
        let options = options(c, &given)?;
        reserved(given.reserved)?;
        let id = state.sequence(sequence)?;
        if given.lookup >= state.session.outputs() {
            let expected = format!("less than the session's outputs, {}", state.session.outputs());
            return Err(Failure::argument("lookup", &expected, given.lookup));
        }
        let constraint = grammar::constraint(given.grammar, &tokenizer)?;
        state.outputs = None;
        let stream = Stream::new(&mut state.session, id, prompt, &options)?;
        let length = state.session.len(id)?;
        Ok(Generating {
            stream,
            sequence,
            id,
            length,
            tokenizer,
            lookup: (given.lookup > 0).then(|| PromptLookup::new(given.lookup as usize)),
            constraint,
            deadline,
            finish: HALITE_FINISH_NONE,
            text: String::new(),
        })
    }

    /// Runs one step, and returns whether the generation goes on.
    fn advance(
        &mut self,
        object: &SessionObject,
        state: &mut State,
        on_text: &mut dyn FnMut(&str) -> ControlFlow<()>,
    ) -> Fallible<bool> {
        if self.finish != HALITE_FINISH_NONE {
            return Ok(false);
        }
        state.sequence(self.sequence)?;
        let length = state.session.len(self.id)?;
        if length != self.length {
            let expected = format!("the {} tokens that the last step left", self.length);
            return Err(Failure::argument("sequence", &expected, length));
        }
        state.outputs = None;
        let mut decoding = Decoding::default();
        if let Some(lookup) = &mut self.lookup {
            decoding = decoding.drafter(lookup);
        }
        if let Some(constraint) = &mut self.constraint {
            decoding = decoding.constraint(&mut **constraint);
        }
        let (stream, tokenizer) = (&mut self.stream, &self.tokenizer);
        let step = || stream.advance(&mut state.session, tokenizer, &mut decoding, on_text);
        let (goes_on, passed) = stop::within(&object.cancel, self.deadline, step)?;
        self.length = state.session.len(self.id)?;
        self.finish = match (goes_on, self.stream.generation().finish) {
            (Ok(true), _) => return Ok(true),
            (Err(error), _) => {
                self.finish = HALITE_FINISH_ERROR;
                return Err(error.into());
            }
            (Ok(false), Finish::Cancelled) if passed => HALITE_FINISH_DEADLINE,
            (Ok(false), Finish::End) => HALITE_FINISH_END,
            (Ok(false), Finish::Length) => HALITE_FINISH_LENGTH,
            (Ok(false), Finish::Stop) => HALITE_FINISH_STOP,
            (Ok(false), Finish::ContextFull) => HALITE_FINISH_CONTEXT_FULL,
            (Ok(false), Finish::Callback) => HALITE_FINISH_CALLBACK,
            (Ok(false), _) => HALITE_FINISH_CANCELLED,
        };
        Ok(false)
    }

    fn info(&self) -> HaliteGenerationInfo {
        let generation = self.stream.generation();
        HaliteGenerationInfo {
            struct_bytes: 0,
            finish: self.finish,
            prompt_tokens: generation.prompt_tokens.len() as u32,
            reused_tokens: generation.reused_tokens,
            tokens: generation.tokens.len() as u32,
            decode_steps: generation.decode_steps,
            drafted_tokens: generation.drafted.0,
            accepted_tokens: generation.drafted.1,
            prefill_seconds: Duration::as_secs_f64(&generation.prefill),
            first_token_seconds: Duration::as_secs_f64(&generation.first_token),
            decode_seconds: Duration::as_secs_f64(&generation.decode),
        }
    }
}

/// Generates text after a prompt in a sequence, and passes it to a callback, which may be null. The common
/// prefix of the sequence and the prompt is kept, the rest of the sequence is dropped. A generation that was
/// cancelled, or ended by its deadline, is no error: HaliteGenerationInfo::finish says so. The options and
/// the info may be null. Threads: one at a time per session.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn halite_generate(
    session: *mut HaliteSession,
    sequence: HaliteSequence,
    tokenizer: *const HaliteTokenizer,
    prompt: *const u32,
    prompt_count: usize,
    options: *const HaliteGenerateOptions,
    on_text: HaliteOnText,
    user: *mut c_void,
    info: *mut HaliteGenerationInfo,
) -> HaliteResult {
    let work = |c: &Caller| {
        crate::session::with(session, |object, state| {
            if !info.is_null() {
                c.put_sized("info", info, crate::border::Sized0::ZERO)?;
            }
            let prompt = c.array("prompt", prompt, prompt_count)?;
            let mut generating = Generating::new(c, state, sequence, tokenizer, prompt, options)?;
            let mut terminated = Vec::new();
            let mut on_text = |text: &str| {
                let Some(on_text) = on_text else { return ControlFlow::Continue(()) };
                terminated.clear();
                terminated.extend_from_slice(text.as_bytes());
                terminated.push(0);
                // SAFETY: the caller passed a function of this type, and the text ends with a zero.
                match unsafe { on_text(terminated.as_ptr().cast(), text.len(), user) } {
                    0 => ControlFlow::Continue(()),
                    _ => ControlFlow::Break(()),
                }
            };
            while generating.advance(object, state, &mut on_text)? {}
            if info.is_null() { Ok(()) } else { c.put_sized("info", info, generating.info()) }
        })
    };
    // SAFETY: the caller's pointers are as the header says.
    unsafe { call(work) }
}

/// Starts a generation as halite_generate does, whose text the caller pulls with halite_generation_next. It
/// runs no step yet. Leave its sequence alone until it is closed; other sequences of the session may run
/// between its steps. Threads: one at a time per session.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn halite_generation_open(
    session: *mut HaliteSession,
    sequence: HaliteSequence,
    tokenizer: *const HaliteTokenizer,
    prompt: *const u32,
    prompt_count: usize,
    options: *const HaliteGenerateOptions,
    generation: *mut *mut HaliteGeneration,
) -> HaliteResult {
    let make = |c: &Caller| {
        let session: Arc<SessionObject> = handle::get(session)?;
        let prompt = c.array("prompt", prompt, prompt_count)?;
        let mut state = handle::lock(SessionObject::KIND, &session.state)?;
        let generating = Generating::new(c, &mut state, sequence, tokenizer, prompt, options)?;
        drop(state);
        Ok(GenerationObject { session, generating: Mutex::new(generating) })
    };
    // SAFETY: the caller's pointers are as the header says.
    unsafe { call(|c| handle::open(c, generation, || make(c))) }
}

/// Runs steps until there is text, and takes it: whole characters, in UTF-8. Text that is not written,
/// because there is no buffer or it is too small, stays for the next call. HALITE_END if the generation is
/// complete; a text of length 0 never comes. Threads: one at a time per session.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn halite_generation_next(
    generation: *mut HaliteGeneration,
    out: *mut c_char,
    capacity: usize,
    length: *mut usize,
) -> HaliteResult {
    let work = |c: &Caller| {
        c.put_optional("length", length, 0)?;
        let object = handle::get::<GenerationObject>(generation)?;
        let generating = &mut *handle::lock(GenerationObject::KIND, &object.generating)?;
        if generating.text.is_empty() {
            let mut state = handle::lock(SessionObject::KIND, &object.session.state)?;
            let mut text = String::new();
            let mut goes_on = true;
            while goes_on && text.is_empty() {
                goes_on = generating.advance(&object.session, &mut state, &mut |piece| {
                    text.push_str(piece);
                    ControlFlow::Continue(())
                })?;
            }
            generating.text = text;
        }
        if generating.text.is_empty() {
            return Err(Failure::new(HALITE_END, "the generation is complete"));
        }
        if c.put_text(&generating.text, out, capacity, length)? {
            generating.text.clear();
        }
        Ok(())
    };
    // SAFETY: the caller's pointers are as the header says.
    unsafe { call(work) }
}

/// Writes what a generation did so far. Threads: one at a time per generation.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn halite_generation_info(
    generation: *const HaliteGeneration,
    info: *mut HaliteGenerationInfo,
) -> HaliteResult {
    let work = |c: &Caller| {
        let object = handle::get::<GenerationObject>(generation)?;
        let generating = handle::lock(GenerationObject::KIND, &object.generating)?;
        c.put_sized("info", info, generating.info())
    };
    // SAFETY: the caller's pointers are as the header says.
    unsafe { call(work) }
}

/// Writes the tokens that a generation generated so far. Threads: one at a time per generation.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn halite_generation_tokens(
    generation: *const HaliteGeneration,
    out: *mut u32,
    capacity: usize,
    length: *mut usize,
) -> HaliteResult {
    let work = |c: &Caller| {
        let object = handle::get::<GenerationObject>(generation)?;
        let generating = handle::lock(GenerationObject::KIND, &object.generating)?;
        c.put_array(&generating.stream.generation().tokens, out, capacity, length).map(drop)
    };
    // SAFETY: the caller's pointers are as the header says.
    unsafe { call(work) }
}

/// Closes a generation. Its sequence stays, with the text so far. Threads: any.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn halite_generation_close(generation: *mut HaliteGeneration) -> HaliteResult {
    // SAFETY: the caller's pointers are as the header says.
    unsafe { call(|_| handle::close::<GenerationObject>(generation)) }
}
