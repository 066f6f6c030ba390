//! Chats: messages in, the tokens of a prompt out.

use std::ffi::c_char;
use std::sync::{Arc, Mutex};

use halite::Tokenizer;

#[cfg(not(feature = "chat"))]
use crate::border::Fallible;
use crate::border::{Caller, Failure, HALITE_NOT_FOUND, HaliteResult, call};
use crate::handle::{self, Object};
use crate::model::{self, HaliteModel};
use crate::tokenizer::HaliteTokenizer;

/// A chat template and the messages so far.
pub struct HaliteChat;

#[cfg(feature = "chat")]
use halite::chat::{Message, Template, encode};
#[cfg(not(feature = "chat"))]
use stand_in::{Message, Template, encode};

/// Without templates, no chat can be opened.
#[cfg(not(feature = "chat"))]
mod stand_in {
    use super::*;
    use halite::gguf::Gguf;

    pub struct Template;
    pub struct Message;

    impl Template {
        pub fn from_gguf(_: &Gguf, _: &Tokenizer) -> Fallible<Option<Template>> {
            Err(Failure::not_built("chat"))
        }

        pub fn new(_: &str, _: &Tokenizer) -> Fallible<Template> {
            Err(Failure::not_built("chat"))
        }

        pub fn render(&self, _: &[Message], _: bool) -> Fallible<String> {
            Err(Failure::not_built("chat"))
        }
    }

    impl Message {
        pub fn new(_: &str, _: &str) -> Message {
            Message
        }

        pub fn answer(_: &str) -> Message {
            Message
        }
    }

    pub fn encode(_: &Tokenizer, _: &str) -> Vec<u32> {
        Vec::new()
    }
}

struct ChatObject {
    template: Template,
    tokenizer: Arc<Tokenizer>,
    messages: Mutex<Vec<Message>>,
}

impl Object for ChatObject {
    type Handle = HaliteChat;
    const KIND: &'static str = "chat";
}

/// Opens a chat with a template in Jinja, or null for the one in the model file; HALITE_NOT_FOUND if it has
/// none. Threads: any.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn halite_chat_open(
    model: *const HaliteModel,
    tokenizer: *const HaliteTokenizer,
    chat_template: *const c_char,
    chat: *mut *mut HaliteChat,
) -> HaliteResult {
    let make = |c: &Caller| {
        let (model, tokenizer) = (model::of(model)?, handle::get::<Tokenizer>(tokenizer)?);
        let template = match c.optional_text("template", chat_template)? {
            Some(text) => Template::new(text, &tokenizer)?,
            None => Template::from_gguf(model.gguf(), &tokenizer)?.ok_or_else(|| {
                Failure::new(HALITE_NOT_FOUND, "the model file has no chat template; pass one")
            })?,
        };
        Ok(ChatObject { template, tokenizer, messages: Mutex::default() })
    };
    // SAFETY: the caller's pointers are as the header says.
    unsafe { call(|c| handle::open(c, chat, || make(c))) }
}

/// Adds a message: its role, such as "system" or "user", and its text. Unless `is_trusted` is set (not 0),
/// control tokens in the text are plain text. Threads: one at a time per chat.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn halite_chat_add(
    chat: *mut HaliteChat,
    role: *const c_char,
    text: *const c_char,
    is_trusted: u32,
) -> HaliteResult {
    let work = |c: &Caller| {
        let object = handle::get::<ChatObject>(chat)?;
        let (role, text) = (c.text("role", role)?, c.text("text", text)?);
        let message = match is_trusted {
            0 => Message::new(role, &object.tokenizer.quote(text)),
            _ => Message::new(role, text),
        };
        handle::lock(ChatObject::KIND, &object.messages)?.push(message);
        Ok(())
    };
    // SAFETY: the caller's pointers are as the header says.
    unsafe { call(work) }
}

/// Adds the assistant's answer: generated text, of which only the last channel counts in the harmony format.
/// Generate with HaliteGenerateOptions::show_special. Threads: one at a time per chat.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn halite_chat_add_answer(
    chat: *mut HaliteChat,
    generated: *const c_char,
) -> HaliteResult {
    let work = |c: &Caller| {
        let object = handle::get::<ChatObject>(chat)?;
        let message = Message::answer(c.text("generated", generated)?);
        handle::lock(ChatObject::KIND, &object.messages)?.push(message);
        Ok(())
    };
    // SAFETY: the caller's pointers are as the header says.
    unsafe { call(work) }
}

/// Keeps the first `count` messages; 0 starts anew. Threads: one at a time per chat.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn halite_chat_truncate(chat: *mut HaliteChat, count: usize) -> HaliteResult {
    let work = |_: &Caller| {
        let object = handle::get::<ChatObject>(chat)?;
        handle::lock(ChatObject::KIND, &object.messages)?.truncate(count);
        Ok(())
    };
    // SAFETY: the caller's pointers are as the header says.
    unsafe { call(work) }
}

/// Writes the number of messages. Threads: one at a time per chat.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn halite_chat_count(chat: *const HaliteChat, count: *mut usize) -> HaliteResult {
    let work = |c: &Caller| {
        let object = handle::get::<ChatObject>(chat)?;
        c.put("count", count, handle::lock(ChatObject::KIND, &object.messages)?.len())
    };
    // SAFETY: the caller's pointers are as the header says.
    unsafe { call(work) }
}

/// Writes the tokens of the prompt: all messages, up to the start of the answer. Threads: one at a time per
/// chat.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn halite_chat_prompt(
    chat: *const HaliteChat,
    out: *mut u32,
    capacity: usize,
    length: *mut usize,
) -> HaliteResult {
    let work = |c: &Caller| {
        let object = handle::get::<ChatObject>(chat)?;
        let text = object.template.render(&handle::lock(ChatObject::KIND, &object.messages)?, true)?;
        c.put_array(&encode(&object.tokenizer, &text), out, capacity, length).map(drop)
    };
    // SAFETY: the caller's pointers are as the header says.
    unsafe { call(work) }
}

/// Closes a chat. Threads: any.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn halite_chat_close(chat: *mut HaliteChat) -> HaliteResult {
    // SAFETY: the caller's pointers are as the header says.
    unsafe { call(|_| handle::close::<ChatObject>(chat)) }
}
