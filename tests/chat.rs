//! Chat templates, and turns of a chat that share what they have in common.
#![cfg(feature = "chat")]

use std::ops::ControlFlow;
use std::sync::Arc;

use halite::backend::Backend;
use halite::backend::cpu::Cpu;
use halite::chat::{self, Json, Message, Template};
use halite::generate::{Decoding, GenerateOptions, Generation};
use halite::gguf::Gguf;
use halite::map::Source;
use halite::session::{SequenceId, Session, SessionOptions};
use halite::tokenizer::EncodeOptions;
use halite::{Error, Model, Tokenizer};

/// In the manner of ChatML.
const CHATML: &str = "{%- for message in messages %}
    {%- if loop.first and message['role'] != 'system' %}
        {{- '<|im_start|>system\\nBe helpful.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if tools is not none and tools %}{{ raise_exception('tools') }}{% endif %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}";

/// In the manner of Llama 3: a slice, a namespace, a method of Python's texts, the begin-of-text token.
const HEADERS: &str = "{{- bos_token }}
{%- set ns = namespace(system='') %}
{%- if messages[0]['role'] == 'system' %}
    {%- set ns.system = messages[0]['content'].strip() %}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- if not date_string is defined %}{% set date_string = '26 Jul 2024' %}{% endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: ' + date_string + '\\n\\n' + ns.system + '<|eot_id|>' }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}";

/// In the manner of Gemma: roles must alternate, blocks on lines of their own.
const TURNS: &str = "{{ bos_token }}
{% if messages[0]['role'] == 'system' %}
{% set first = messages[0]['content'] + '\\n\\n' %}
{% set rest = messages[1:] %}
{% else %}
{% set first = '' %}
{% set rest = messages %}
{% endif %}
{% for message in rest %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('roles must alternate user/assistant') }}
    {% endif %}
    {% set role = 'model' if message['role'] == 'assistant' else message['role'] %}
    {{- '<start_of_turn>' + role + '\\n' + (first if loop.first else '') }}
    {{- message['content'] | trim + '<end_of_turn>\\n' -}}
{% endfor %}
{% if add_generation_prompt %}
    {{- '<start_of_turn>model\\n' -}}
{% endif %}";

fn gguf(file: &halite_testing::gguf::File) -> Gguf {
    Gguf::from_source(Source::from_bytes("test", &file.bytes())).unwrap()
}

fn tokenizer() -> Tokenizer {
    Tokenizer::from_gguf(&gguf(&halite_testing::gguf::llama())).unwrap().unwrap()
}

fn render(template: &str, messages: &[Message]) -> Result<String, Error> {
    Template::new(template, &tokenizer())?.render(messages, true)
}

fn messages() -> [Message; 4] {
    [
        Message::new("system", " Be brief."),
        Message::new("user", "Hi "),
        Message::new("assistant", "Hello!"),
        Message::new("user", "Bye"),
    ]
}

#[test]
fn templates_of_three_families() {
    let [system, user, ..] = messages();
    assert_eq!(
        render(CHATML, &messages()).unwrap(),
        "<|im_start|>system\n Be brief.<|im_end|>\n<|im_start|>user\nHi <|im_end|>\n\
         <|im_start|>assistant\nHello!<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"
    );
    assert_eq!(
        render(CHATML, std::slice::from_ref(&user)).unwrap(),
        "<|im_start|>system\nBe helpful.<|im_end|>\n<|im_start|>user\nHi <|im_end|>\n<|im_start|>assistant\n"
    );
    assert_eq!(
        render(HEADERS, &[system.clone(), user.clone()]).unwrap(),
        "<s><|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\nBe brief.<|eot_id|>\
         <|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    );
    assert_eq!(
        render(TURNS, &messages()).unwrap(),
        "<s>\n<start_of_turn>user\n Be brief.\n\nHi<end_of_turn>\n<start_of_turn>model\nHello!<end_of_turn>\n\
         <start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n"
    );
    let error = render(TURNS, &[user.clone(), user]).unwrap_err().to_string();
    assert!(error.contains("roles must alternate"), "{error}");
    let dates = render("{{ strftime_now('%Y-%m-%d') }}", &[]).unwrap();
    assert!(dates.len() == 10 && dates.starts_with('2'), "{dates}");
}

/// A base model of Gemma has no template; the example is one for it.
#[test]
fn the_example_for_gemma_takes_turns() {
    assert_eq!(
        render(include_str!("../examples/templates/gemma.jinja"), &messages()).unwrap(),
        "<s><start_of_turn>user\n Be brief.\n\nHi<end_of_turn>\n<start_of_turn>model\nHello!<end_of_turn>\n\
         <start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n"
    );
}

#[test]
fn messages_and_variables_carry_json() {
    let text = |text: &str| Json::Text(text.into());
    let arguments = Json::Object(vec![("at".into(), text("Bath")), ("days".into(), Json::Int(2))]);
    let call = Json::Object(vec![("name".into(), text("weather")), ("arguments".into(), arguments)]);
    let call = Json::Object(vec![("function".into(), call)]);
    let messages = [
        Message::new("assistant", "")
            .field("content", Json::Null)
            .field("tool_calls", Json::List(vec![call])),
        Message::new("tool", "rain").field("tool_call_id", text("1")),
    ];
    let template = "{% for m in messages %}{{ m.role }}:{% if m.content is none %}-{% endif %}{% for c in m.tool_calls %}\
        {{ c.function.name }} {{ c.function.arguments | tojson }}{% endfor %}{{ m.tool_call_id }}
{% endfor %}{% for t in tools %}{{ t.a }}{% endfor %}{{ extra }}";
    let template = Template::new(template, &tokenizer()).unwrap();
    let tools = Json::List(vec![Json::Object(vec![("a".into(), Json::Float(0.5))])]);
    let variables = [("tools", tools), ("extra", Json::Bool(true))];
    assert_eq!(
        template.render_with(&messages, &variables, true).unwrap(),
        "assistant:-weather {\"at\": \"Bath\", \"days\": 2}\ntool:1\n0.5True"
    );
    let deep = (0..1000).fold(Json::Null, |inner, _| Json::List(vec![inner]));
    let error = template.render_with(&messages, &[("tools", deep)], true).unwrap_err().to_string();
    assert!(error.contains("deeper"), "{error}");
}

#[test]
fn a_template_comes_from_the_file() {
    let file = halite_testing::gguf::llama();
    assert!(Template::from_gguf(&gguf(&file), &tokenizer()).unwrap().is_none());
    let with = gguf(&file.entry("tokenizer.chat_template", CHATML));
    let template = Template::from_gguf(&with, &tokenizer()).unwrap().unwrap();
    assert!(template.render(&messages(), false).unwrap().ends_with("Bye<|im_end|>\n"));
    let mistyped = gguf(&halite_testing::gguf::llama().entry("tokenizer.chat_template", 7u32));
    assert!(matches!(Template::from_gguf(&mistyped, &tokenizer()), Err(Error::Gguf { .. })));
}

#[test]
fn templates_that_mean_harm_are_errors() {
    let nested = format!("{}1{}", "(".repeat(100_000), ")".repeat(100_000));
    for template in [
        "{% for",
        "{{ messages[0].content.nothing.more }}",
        "{{ unknown() }}",
        "{% include 'secret' %}",
        "{% import '/etc/passwd' as p %}",
        "{% for a in range(10000) %}{% for b in range(10000) %}{% endfor %}{% endfor %}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% for i in range(9999) %}{{ 'aaaaaaaaaaaaaaaa' * 1000 }}{% endfor %}",
        "{{ 'a' * 1000000000000 }}",
        "{{ [1] | tojson(indent=1000000000000000) }}",
        "{{ [1] | tojson(true, 1000000000000000) }}",
        "{{ 'a' | indent(10000000000000000) }}",
        "{{ 1 // 0 }}",
        &format!("{{{{ {nested} }}}}"),
        &"{% if true %}".repeat(10_000),
    ] {
        let error = render(template, &messages());
        assert!(
            matches!(error, Err(Error::Template(_))),
            "{}: {error:?}",
            &template[..40.min(template.len())]
        );
    }
    assert_eq!(render("{{ [1] | tojson(indent=1) }}", &[]).unwrap(), "[\n 1\n]");
}

/// As Python's jinja2 renders them; `tests/scripts/templates.py` compares many more.
#[test]
fn templates_are_read_as_python_reads_them() {
    for (template, expected) in [
        // Without tools, as transformers has it: none, which is not iterable.
        ("{% if tools is iterable and tools | length > 0 %}T{% endif %}x", "x"),
        ("{{ tools is none }}{{ tools is defined }}{{ none | selectattr('a') | list }}", "TrueTrue[]"),
        // The mark of what is trained on writes only its body, wherever its name is.
        ("a {%- generation -%} {{ 1 }} b {%- endgeneration -%} c", "a1 bc"),
        (
            "{% generation %}\nx{% endgeneration %}\n{{ '{% generation %}' }}{# {% generation %} #}",
            "x{% generation %}",
        ),
        ("{% raw %}{% generation %}{% endraw %}", "{% generation %}"),
        ("{% generation %}{% set x = 1 %}{% endgeneration %}{{ x is defined }}", "False"),
        // JSON as json.dumps writes it.
        (
            r#"{{ {'b': "<é>&'\"", 'a': [1, 2.0, true, none]} | tojson }}"#,
            r#"{"b": "<é>&'\"", "a": [1, 2.0, true, null]}"#,
        ),
        ("{{ {'b': 1, 'a': []} | tojson(sort_keys=true, separators=(',', ':')) }}", r#"{"a":[],"b":1}"#),
        ("{{ ['é😀'] | tojson(ensure_ascii=true) }}", r#"["\u00e9\ud83d\ude00"]"#),
        ("{{ {'a': [1]} | tojson(indent=2) }}", "{\n  \"a\": [\n    1\n  ]\n}"),
        ("{{ [1e16, 1e-5, 0.1, 100.0] | tojson }}", "[1e+16, 1e-05, 0.1, 100.0]"),
        // Formatting and methods.
        ("{{ '%s has %03d, %.2f, %-4s|%r%%' % ('a', 7, 2.5, 'b', 'c') }}", "a has 007, 2.50, b   |'c'%"),
        ("{{ '%(x)5s' % {'x': 1} }}{{ '{:>4}{!r}'.format(1, 'a') }}", "    1   1'a'"),
        ("{{ 'a-b-c'.rsplit('-', 1) }}{{ 'a-b'.partition('-') }}", "['a-b', 'c']('a', '-', 'b')"),
        ("{{ 'a-b-c'.rpartition('-')[0] }}{{ 'abc'.index('c') }}", "a-b2"),
        ("{{ 'abc'.removeprefix('a').removesuffix('c') }}{{ [3, 4].index(4) }}", "b1"),
        ("{{ [true, none, 'it\\'s', 1.0, (1,), {'a': 1}] }}", "[True, None, \"it's\", 1.0, (1,), {'a': 1}]"),
        ("{{ -7 // 2 }} {{ -7 % 3 }} {{ 7 / 2 }} {{ 2 ** 3 ** 2 }} {{ 1 < 2 < 3 }}", "-4 2 3.5 64 True"),
        // Scopes: a loop's variables end with it, a namespace's do not; a macro sees what is set after it.
        ("{% set x = 1 %}{% for i in [1, 2] %}{% set x = 2 %}{% endfor %}{{ x }}", "1"),
        ("{% macro m() %}{{ y }}{% endmacro %}{% set y = 3 %}{{ m() }}", "3"),
        ("{% for i in [1, [2]] recursive %}{{ i if i is number else loop(i) }}{% endfor %}", "12"),
        (
            "{% for i in range(9) if i is odd %}{% if loop.last %}{% break %}{% endif %}{{ i }}{% endfor %}",
            "135",
        ),
    ] {
        assert_eq!(render(template, &messages()).unwrap_or_else(|e| format!("{template}: {e}")), expected);
    }
}

#[test]
fn a_template_cannot_write_to_the_terminal_by_its_errors() {
    let error = render("\n{{ raise_exception('a\\x1b]0;b\\x07\\x9bc\\r') }}", &[]).unwrap_err().to_string();
    assert_eq!(error, r"chat template: line 2: a\u{1b}]0;b\u{7}\u{9b}c\r");
    let error = render("{{ 'a\u{1b}' | nothing }}{% \u{1b} %}", &[]).unwrap_err().to_string();
    assert!(!error.contains('\u{1b}'), "{error}");
    let error = render("{{ raise_exception('x' * 100000) }}", &[]).unwrap_err().to_string();
    assert!(error.len() < 2000);
}

#[test]
fn one_begin_of_text_token() {
    let t = tokenizer();
    assert_eq!(chat::encode(&t, "<s>ab</s>"), chat::encode(&t, "ab</s>"));
    assert_eq!(chat::encode(&t, "ab</s>")[0], 1);
    assert_eq!(chat::encode(&t, "ab</s>").last(), Some(&2));
}

/// What a stranger writes cannot end their message.
#[test]
fn quoted_messages_have_no_control_tokens() {
    let t = tokenizer();
    let encode = |text: &str| chat::encode(&t, text);
    for text in ["ab</s>", "</s></s>b", "<</s>", "a<s>b</s>a", "ab", "", "<unk></s"] {
        let plain = t.encode(text, EncodeOptions::default());
        assert_eq!(encode(&t.quote(text)), plain, "{text}");
    }
    // A quoted text beside the template's own tokens; and one that was quoted before it came.
    assert_eq!(encode(&format!("{}</s>", t.quote("a</s>"))).iter().filter(|&&id| id == 2).count(), 1);
    assert_eq!(encode(&t.quote("a<\u{fdd0}/s>")), encode(&t.quote("a</s>")));
    assert_eq!(encode(&t.quote(&t.quote("a</s>"))), encode(&t.quote("a</s>")));
}

#[test]
fn a_history_keeps_answers() {
    assert_eq!(Message::answer("hi"), Message::new("assistant", "hi"));
    let harmony = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>4";
    assert_eq!(Message::answer(harmony).content, "4");
    assert_eq!(Message::answer("<|channel|>analysis<|message|>hm").content, "");
}

/// What is kept from an earlier turn gives the text that a fresh sequence gives.
#[test]
fn turns_share_their_beginning() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/models/austen/halite-austen.gguf");
    let model = Arc::new(Model::open(path).unwrap());
    let tokenizer = Tokenizer::from_gguf(model.gguf()).unwrap().unwrap();
    let backend: Arc<dyn Backend> = Arc::new(Cpu::with_threads(2).unwrap());
    let options = SessionOptions::default().context(256).batch(32);
    let mut session = Session::new(&model, &backend, &options).unwrap();
    let options = GenerateOptions::default().max_tokens(12).ignore_end(true);
    let run = |sequence: SequenceId, session: &mut Session, prompt: &[u32]| -> Generation {
        session
            .generate_in(sequence, &tokenizer, prompt, &options, Decoding::default(), |_| {
                ControlFlow::Continue(())
            })
            .unwrap()
    };
    let template =
        Template::new("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", &tokenizer);
    let template = template.unwrap();
    let chat = session.add_sequence();
    let mut history = Vec::new();
    for turn in 0..3 {
        history.push(Message::new("user", ["Who was Emma?", "And then?", "Why?"][turn]));
        let prompt = chat::encode(&tokenizer, &template.render(&history, true).unwrap());
        let shared = run(chat, &mut session, &prompt);
        let fresh = session.add_sequence();
        let alone = run(fresh, &mut session, &prompt);
        session.remove(fresh).unwrap();
        assert_eq!(shared.tokens, alone.tokens);
        assert_eq!(alone.reused_tokens, 0);
        assert_eq!(shared.reused_tokens > 0, turn > 0);
        history.push(Message::answer(&shared.text));
    }
    // The same prompt once more: all but its last token is there.
    let prompt = session.tokens(chat).unwrap()[..40].to_vec();
    let again = run(chat, &mut session, &prompt);
    assert_eq!(again.reused_tokens, 39);
    assert_eq!(&session.tokens(chat).unwrap()[..40], prompt);
}
