//! Answers of each family, as published, in pieces of any size.

use super::super::tools::{GENERIC, detect};
use super::*;

const HERMES: &str = "{{ tools }}<tool_call>";
const LLAMA: &str = "{{ tools }}<|python_tag|>";
const MISTRAL: &str = "{{ tools }}[TOOL_CALLS]";
const MISTRAL_ARGS: &str = "{{ tools }}[TOOL_CALLS]x[ARGS]";
const GRANITE: &str = "{{ tools }}<|tool_call|>";
const CHANNELS: &str = "{{ tools }}<|channel|>";

fn parser(template: &str, thinking: Thinking) -> Parser {
    let format = if template.is_empty() { &GENERIC } else { detect(template).unwrap() };
    Parser::new(Some(format), HARMONY.is_of(template), thinking)
}

/// The answer, read in pieces of so many bytes.
fn said(mut parser: Parser, text: &str, size: usize) -> Said {
    let mut said = Said::default();
    let mut rest = text;
    while !rest.is_empty() {
        let end = (size..=rest.len()).find(|end| rest.is_char_boundary(*end)).unwrap_or(rest.len());
        parser.push(&rest[..end]).into_iter().for_each(|event| said.add(event));
        rest = &rest[end..];
    }
    parser.finish().into_iter().for_each(|event| said.add(event));
    assert_eq!(parser.calls(), said.calls.len());
    said
}

/// A template, an answer, its text, its reasoning, its calls.
type Row = (&'static str, &'static str, &'static str, &'static str, &'static [(&'static str, &'static str)]);

const ROWS: &[Row] = &[
    (HERMES, "Good day.", "Good day.", "", &[]),
    (
        HERMES,
        "<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"at\": \"Bath\", \"n\": {\"}\": \"\\\"{\"}}}\n</tool_call>",
        "",
        "",
        &[("weather", "{\"at\": \"Bath\", \"n\": {\"}\": \"\\\"{\"}}")],
    ),
    (
        HERMES,
        "Let me see.\n\n<tool_call>\n{\"arguments\": {\"a\":1}, \"name\": \"f\"}\n</tool_call>\n<tool_call>\n{\"name\": \"g\"}\n</tool_call>\nDone < é",
        "Let me see.Done < é",
        "",
        &[("f", "{\"a\":1}"), ("g", "{}")],
    ),
    (
        HERMES,
        "<think>\nWhat <tool_call> to do?\n</think>\n\nI call.\n<tool_call>{\"name\":\"f\",\"arguments\":{}}</tool_call>",
        "I call.",
        "What <tool_call> to do?",
        &[("f", "{}")],
    ),
    (HERMES, "<think>\n\n</think>\n\nYes. <thin", "Yes. <thin", "", &[]),
    (LLAMA, "{\"name\": \"f\", \"parameters\": {\"x\": [1, 2]}}", "", "", &[("f", "{\"x\": [1, 2]}")]),
    (
        LLAMA,
        "<|python_tag|>{\"type\": \"function\", \"name\": \"f\", \"parameters\": {\"x\": \"1\"}}; {\"name\": \"g\", \"parameters\": {}}",
        "",
        "",
        &[("f", "{\"x\": \"1\"}"), ("g", "{}")],
    ),
    (LLAMA, " It is {\"name\": \"f\"}.", " It is {\"name\": \"f\"}.", "", &[]),
    (LLAMA, "{\"names\": [1]} x", "{\"names\": [1]} x", "", &[]),
    (
        MISTRAL,
        "[TOOL_CALLS] [{\"name\": \"f\", \"arguments\": {\"a\": 1}, \"id\": \"123456789\"}, {\"name\": \"g\", \"arguments\": {}}]",
        "",
        "",
        &[("f", "{\"a\": 1}"), ("g", "{}")],
    ),
    (MISTRAL, "See [TOOL] and [1].", "See [TOOL] and [1].", "", &[]),
    (
        MISTRAL_ARGS,
        "Ha [TOOL_CALLS]f[ARGS]{\"a\": \"[ARGS]\"}[TOOL_CALLS]g[CALL_ID]123456789[ARGS]{}",
        "Ha",
        "",
        &[("f", "{\"a\": \"[ARGS]\"}"), ("g", "{}")],
    ),
    (
        GRANITE,
        "<|tool_call|>[{\"name\": \"f\", \"arguments\": {\"a\": null}}]",
        "",
        "",
        &[("f", "{\"a\": null}")],
    ),
    (
        CHANNELS,
        "<|channel|>analysis<|message|>Need it.<|end|><|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{\"a\": 1}<|call|>",
        "",
        "Need it.",
        &[("f", "{\"a\": 1}")],
    ),
    (
        CHANNELS,
        " to=functions.f<|channel|>commentary json<|message|>{\"a\":2}",
        "",
        "",
        &[("f", "{\"a\":2}")],
    ),
    (
        CHANNELS,
        "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>",
        "I look.",
        "",
        &[("f", "{}")],
    ),
    (
        CHANNELS,
        "<|channel|>analysis<|message|>2 + 2\n<|end|><|start|>assistant<|channel|>final<|message|>Four <b>.",
        "Four <b>.",
        "2 + 2",
        &[],
    ),
    (CHANNELS, "{\"plain\": 1}", "{\"plain\": 1}", "", &[]),
    ("", "{\"name\": \"f\", \"parameters\": {\"x\": true}}", "", "", &[("f", "{\"x\": true}")]),
    ("", "Plain text\n", "Plain text\n", "", &[]),
    // Answers that end too early.
    (HERMES, "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": \"b", "", "", &[("f", "{\"a\": \"b")]),
    (HERMES, "<tool_call>\n{\"name\": \"f", "{\"name\": \"f", "", &[]),
    (HERMES, "<think>\nHm", "", "Hm", &[]),
    (MISTRAL_ARGS, "[TOOL_CALLS]f[AR", "", "", &[]),
];

#[test]
fn answers_of_each_family_are_read_in_pieces_of_any_size() {
    for (template, text, content, reasoning, calls) in ROWS {
        let calls: Vec<(String, String)> =
            calls.iter().map(|(name, arguments)| ((*name).into(), (*arguments).into())).collect();
        let want = Said { content: (*content).into(), reasoning: (*reasoning).into(), calls };
        for size in [1, 2, 3, 7, 1000] {
            let thinking = if *template == HERMES { Thinking::Maybe } else { Thinking::Never };
            assert_eq!(said(parser(template, thinking), text, size), want, "{size}: {text}");
        }
    }
}

#[test]
fn reasoning_that_the_prompt_began_ends_at_its_tag() {
    for size in [1, 4, 1000] {
        let begun = || Parser::new(None, false, Thinking::Begun);
        let got = said(begun(), "Hm,\nwell.\n</think>\n\n Yes.\n", size);
        let want = Said { content: "Yes.\n".into(), reasoning: "Hm,\nwell.".into(), ..Said::default() };
        assert_eq!(got, want, "{size}");
    }
    let plain = Parser::new(None, false, Thinking::Never);
    assert_eq!(said(plain, " a <think> {\n", 1).content, " a <think> {\n");
}

#[test]
fn arguments_come_as_they_are_written() {
    let mut parser = parser(HERMES, Thinking::Never);
    let events = parser.push("<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": 1");
    let piece = |text: &str| Event::Arguments { call: 0, text: text.into() };
    let call = Event::Call { index: 0, name: "f".into() };
    assert_eq!(events, [call, piece("{\"a\": 1")]);
    assert_eq!(parser.push("2"), [piece("2")]);
    assert_eq!(parser.push("}}\n</tool"), [piece("}")]);
    assert!(parser.push("_call>").is_empty() && parser.finish().is_empty());
}
