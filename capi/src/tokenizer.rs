//! Tokenizers: text to tokens and back, as a whole and as a stream.

use std::ffi::c_char;
use std::sync::{Arc, Mutex};

use halite::Tokenizer;
use halite::tokenizer::{Detokenizer, EncodeOptions, TokenKind};

use crate::border::{Caller, Failure, Fallible, HALITE_NO_TOKEN, HALITE_NOT_FOUND, HaliteResult, call};
use crate::handle::{self, Object};
use crate::log;
use crate::model::{self, HaliteModel};

/// The vocabulary of a model, and its algorithm.
pub struct HaliteTokenizer;

/// Turns a stream of tokens into text, in whole characters.
pub struct HaliteDecoder;

/// Options of encoding and decoding, which add up.
pub type HaliteTextFlags = u32;
/// Of encoding: leave out the begin- and end-of-text tokens.
pub const HALITE_NO_SPECIAL: HaliteTextFlags = 1;
/// Of encoding: read control tokens in the text, except in text from halite_tokenizer_quote. Not for
/// untrusted text.
pub const HALITE_PARSE_SPECIAL: HaliteTextFlags = 2;
/// Of decoding: show control tokens.
pub const HALITE_SHOW_SPECIAL: HaliteTextFlags = 4;

/// The type of a token: the numbers of GGUF's tokenizer.ggml.token_type.
pub type HaliteTokenKind = u32;
pub const HALITE_TOKEN_NORMAL: HaliteTokenKind = 1;
pub const HALITE_TOKEN_UNKNOWN: HaliteTokenKind = 2;
pub const HALITE_TOKEN_CONTROL: HaliteTokenKind = 3;
pub const HALITE_TOKEN_USER_DEFINED: HaliteTokenKind = 4;
pub const HALITE_TOKEN_UNUSED: HaliteTokenKind = 5;
pub const HALITE_TOKEN_BYTE: HaliteTokenKind = 6;

/// Facts about a tokenizer.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct HaliteTokenizerInfo {
    pub struct_bytes: u32,
    pub token_count: u32,
    /// The token that begins a text, or HALITE_NO_TOKEN.
    pub bos: u32,
    /// The token that ends a text, or HALITE_NO_TOKEN.
    pub eos: u32,
    /// Whether encoding begins with `bos`: 0 or 1.
    pub adds_bos: u32,
    /// Whether encoding puts a space before a text, which decoding leaves there: 0 or 1.
    pub adds_space_prefix: u32,
}

sized! {
    HaliteTokenizerInfo {
        struct_bytes: u32, token_count: u32, bos: u32, eos: u32, adds_bos: u32, adds_space_prefix: u32,
    }
}

impl Object for Tokenizer {
    type Handle = HaliteTokenizer;
    const KIND: &'static str = "tokenizer";
}

struct DecoderObject {
    tokenizer: Arc<Tokenizer>,
    special: bool,
    state: Mutex<(Detokenizer, String)>,
}

impl Object for DecoderObject {
    type Handle = HaliteDecoder;
    const KIND: &'static str = "decoder";
}

/// Reads flags, of which the others must not be set.
fn flags<const N: usize>(given: HaliteTextFlags, known: [HaliteTextFlags; N]) -> Fallible<[bool; N]> {
    let all = known.iter().fold(0, |all, flag| all | flag);
    if given & !all != 0 {
        return Err(Failure::argument("flags", &format!("some of {all:#x}"), format!("{given:#x}")));
    }
    Ok(known.map(|flag| given & flag != 0))
}

/// Reads the tokenizer of a model file; HALITE_NOT_FOUND if it has none. Threads: any.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn halite_tokenizer_open(
    model: *const HaliteModel,
    tokenizer: *mut *mut HaliteTokenizer,
) -> HaliteResult {
    let make = || {
        let model = model::of(model)?;
        let missing = || Failure::new(HALITE_NOT_FOUND, "the model file has no vocabulary");
        let tokenizer = Tokenizer::from_gguf(model.gguf())?.ok_or_else(missing)?;
        tokenizer.warnings().iter().for_each(|warning| log::say(log::HALITE_LOG_WARNING, warning));
        Ok(tokenizer)
    };
    // SAFETY: the caller's pointers are as the header says.
    unsafe { call(|c| handle::open(c, tokenizer, make)) }
}

/// Closes a tokenizer. What was made from it keeps what it needs. Threads: any.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn halite_tokenizer_close(tokenizer: *mut HaliteTokenizer) -> HaliteResult {
    // SAFETY: the caller's pointers are as the header says.
    unsafe { call(|_| handle::close::<Tokenizer>(tokenizer)) }
}

/// Writes facts about a tokenizer. Threads: any.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn halite_tokenizer_info(
    tokenizer: *const HaliteTokenizer,
    info: *mut HaliteTokenizerInfo,
) -> HaliteResult {
    let work = |c: &Caller| {
        let tokenizer = handle::get::<Tokenizer>(tokenizer)?;
        let value = HaliteTokenizerInfo {
            struct_bytes: 0,
            token_count: tokenizer.len() as u32,
            bos: tokenizer.bos().unwrap_or(HALITE_NO_TOKEN),
            eos: tokenizer.eos().unwrap_or(HALITE_NO_TOKEN),
            adds_bos: tokenizer.adds_bos().into(),
            adds_space_prefix: tokenizer.adds_space_prefix().into(),
        };
        c.put_sized("info", info, value)
    };
    // SAFETY: the caller's pointers are as the header says.
    unsafe { call(work) }
}

/// Encodes `text_bytes` bytes of text, or HALITE_ZERO_TERMINATED. Flags: HALITE_NO_SPECIAL,
/// HALITE_PARSE_SPECIAL. Threads: any.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn halite_tokenizer_encode(
    tokenizer: *const HaliteTokenizer,
    text: *const c_char,
    text_bytes: usize,
    flags: HaliteTextFlags,
    out: *mut u32,
    capacity: usize,
    length: *mut usize,
) -> HaliteResult {
    let work = |c: &Caller| {
        let tokenizer = handle::get::<Tokenizer>(tokenizer)?;
        let [no_special, parse_special] = self::flags(flags, [HALITE_NO_SPECIAL, HALITE_PARSE_SPECIAL])?;
        let options = EncodeOptions::default().add_special(!no_special).parse_special(parse_special);
        let tokens = tokenizer.encode(c.sized_text("text", text, text_bytes)?, options);
        c.put_array(&tokens, out, capacity, length).map(drop)
    };
    // SAFETY: the caller's pointers are as the header says.
    unsafe { call(work) }
}

/// Decodes tokens. Bytes that are not UTF-8 become replacement characters. Flags: HALITE_SHOW_SPECIAL.
/// Threads: any.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn halite_tokenizer_decode(
    tokenizer: *const HaliteTokenizer,
    tokens: *const u32,
    token_count: usize,
    flags: HaliteTextFlags,
    out: *mut c_char,
    capacity: usize,
    length: *mut usize,
) -> HaliteResult {
    let work = |c: &Caller| {
        let tokenizer = handle::get::<Tokenizer>(tokenizer)?;
        let [special] = self::flags(flags, [HALITE_SHOW_SPECIAL])?;
        let tokens = c.array("tokens", tokens, token_count)?;
        tokenizer.check(tokens)?;
        c.put_text(&tokenizer.decode(tokens, special), out, capacity, length).map(drop)
    };
    // SAFETY: the caller's pointers are as the header says.
    unsafe { call(work) }
}

/// Writes the bytes of a token in the vocabulary, which need not be UTF-8 and do not end with a zero.
/// Threads: any.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn halite_tokenizer_piece(
    tokenizer: *const HaliteTokenizer,
    token: u32,
    out: *mut u8,
    capacity: usize,
    length: *mut usize,
) -> HaliteResult {
    let work = |c: &Caller| {
        let tokenizer = handle::get::<Tokenizer>(tokenizer)?;
        tokenizer.check(&[token])?;
        c.put_array(tokenizer.text(token).unwrap_or_default(), out, capacity, length).map(drop)
    };
    // SAFETY: the caller's pointers are as the header says.
    unsafe { call(work) }
}

/// Finds the token of `piece_bytes` bytes in the vocabulary; HALITE_NOT_FOUND if there is none. Threads: any.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn halite_tokenizer_find(
    tokenizer: *const HaliteTokenizer,
    piece: *const u8,
    piece_bytes: usize,
    token: *mut u32,
) -> HaliteResult {
    let work = |c: &Caller| {
        let tokenizer = handle::get::<Tokenizer>(tokenizer)?;
        let found = tokenizer.token(c.array("piece", piece, piece_bytes)?);
        let missing = || Failure::new(HALITE_NOT_FOUND, "the vocabulary has no such token");
        c.put("token", token, found.ok_or_else(missing)?)
    };
    // SAFETY: the caller's pointers are as the header says.
    unsafe { call(work) }
}

/// Writes the type of a token, and whether it ends a generation (0 or 1); either may be null. Threads: any.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn halite_tokenizer_kind(
    tokenizer: *const HaliteTokenizer,
    token: u32,
    kind: *mut HaliteTokenKind,
    is_end: *mut u32,
) -> HaliteResult {
    let work = |c: &Caller| {
        let tokenizer = handle::get::<Tokenizer>(tokenizer)?;
        tokenizer.check(&[token])?;
        let number = match tokenizer.kind(token) {
            Some(TokenKind::Normal) => HALITE_TOKEN_NORMAL,
            Some(TokenKind::Control) => HALITE_TOKEN_CONTROL,
            Some(TokenKind::UserDefined) => HALITE_TOKEN_USER_DEFINED,
            Some(TokenKind::Unused) => HALITE_TOKEN_UNUSED,
            Some(TokenKind::Byte) => HALITE_TOKEN_BYTE,
            _ => HALITE_TOKEN_UNKNOWN,
        };
        c.put_optional("kind", kind, number)?;
        c.put_optional("is_end", is_end, tokenizer.is_end(token).into())
    };
    // SAFETY: the caller's pointers are as the header says.
    unsafe { call(work) }
}

/// Quotes untrusted text, so that control tokens in it encode as plain text under HALITE_PARSE_SPECIAL and in
/// chats. Threads: any.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn halite_tokenizer_quote(
    tokenizer: *const HaliteTokenizer,
    text: *const c_char,
    text_bytes: usize,
    out: *mut c_char,
    capacity: usize,
    length: *mut usize,
) -> HaliteResult {
    let work = |c: &Caller| {
        let tokenizer = handle::get::<Tokenizer>(tokenizer)?;
        let quoted = tokenizer.quote(c.sized_text("text", text, text_bytes)?);
        c.put_text(&quoted, out, capacity, length).map(drop)
    };
    // SAFETY: the caller's pointers are as the header says.
    unsafe { call(work) }
}

/// Opens a decoder of a stream of tokens. Flags: HALITE_SHOW_SPECIAL. Threads: any.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn halite_decoder_open(
    tokenizer: *const HaliteTokenizer,
    flags: HaliteTextFlags,
    decoder: *mut *mut HaliteDecoder,
) -> HaliteResult {
    let make = || {
        let tokenizer = handle::get::<Tokenizer>(tokenizer)?;
        let [special] = self::flags(flags, [HALITE_SHOW_SPECIAL])?;
        Ok(DecoderObject { tokenizer, special, state: Mutex::default() })
    };
    // SAFETY: the caller's pointers are as the header says.
    unsafe { call(|c| handle::open(c, decoder, make)) }
}

/// Adds a token to a decoder. Threads: one at a time per decoder.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn halite_decoder_push(decoder: *mut HaliteDecoder, token: u32) -> HaliteResult {
    let work = |_: &Caller| {
        let object = handle::get::<DecoderObject>(decoder)?;
        object.tokenizer.check(&[token])?;
        let (detokenizer, text) = &mut *handle::lock(DecoderObject::KIND, &object.state)?;
        detokenizer.push(&object.tokenizer, token, object.special, text);
        Ok(())
    };
    // SAFETY: the caller's pointers are as the header says.
    unsafe { call(work) }
}

/// Ends the stream: a character that is incomplete becomes a replacement character. Threads: one at a time
/// per decoder.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn halite_decoder_finish(decoder: *mut HaliteDecoder) -> HaliteResult {
    let work = |_: &Caller| {
        let object = handle::get::<DecoderObject>(decoder)?;
        let (detokenizer, text) = &mut *handle::lock(DecoderObject::KIND, &object.state)?;
        detokenizer.finish(text);
        Ok(())
    };
    // SAFETY: the caller's pointers are as the header says.
    unsafe { call(work) }
}

/// Takes the text that is complete so far, which may be empty. It stays if it is not written. Threads: one at
/// a time per decoder.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn halite_decoder_take(
    decoder: *mut HaliteDecoder,
    out: *mut c_char,
    capacity: usize,
    length: *mut usize,
) -> HaliteResult {
    let work = |c: &Caller| {
        let object = handle::get::<DecoderObject>(decoder)?;
        let (_, text) = &mut *handle::lock(DecoderObject::KIND, &object.state)?;
        if c.put_text(text, out, capacity, length)? {
            text.clear();
        }
        Ok(())
    };
    // SAFETY: the caller's pointers are as the header says.
    unsafe { call(work) }
}

/// Closes a decoder. Threads: any.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn halite_decoder_close(decoder: *mut HaliteDecoder) -> HaliteResult {
    // SAFETY: the caller's pointers are as the header says.
    unsafe { call(|_| handle::close::<DecoderObject>(decoder)) }
}
