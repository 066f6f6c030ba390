//! Requests that run together: each text is the one that the request gets alone.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use halite::backend::Backend;
use halite::backend::cpu::Cpu;
use halite::batch::{Batch, Event, Request, RequestId};
use halite::generate::{Finish, GenerateOptions, Generation};
use halite::map::Source;
use halite::sampler::SamplerOptions;
use halite::session::{Session, SessionOptions};
use halite::tokenizer::EncodeOptions;
use halite::{Error, Model, Tokenizer};
use halite_testing::faulty::{Fault, Faulty};

fn open(file: &str) -> Arc<Model> {
    Arc::new(Model::open(Path::new(env!("CARGO_MANIFEST_DIR")).join(file)).unwrap())
}

fn austen() -> (Arc<Model>, Arc<Tokenizer>) {
    let model = open("models/austen/halite-austen.gguf");
    let tokenizer = Tokenizer::from_gguf(model.gguf()).unwrap().unwrap();
    (model, Arc::new(tokenizer))
}

fn batch(model: &Arc<Model>, tokenizer: &Arc<Tokenizer>, cache: u32, slots: u32) -> Batch {
    let backend: Arc<dyn Backend> = Arc::new(Cpu::with_threads(2).unwrap());
    let options = SessionOptions::default()
        .context(cache.min(512))
        .cache_positions(cache)
        .batch(48)
        .outputs(slots)
        .sequences(slots);
    Batch::new(Session::new(model, &backend, &options).unwrap(), tokenizer.clone())
}

/// Texts of different lengths, sampled in all ways.
fn requests(tokenizer: &Tokenizer, count: u32) -> Vec<Request> {
    let story = "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a wife. ";
    let request = |n: u32| {
        let prompt = format!("{}{n} ladies said that", story.repeat(n as usize % 4));
        let sampler = SamplerOptions::default().seed(u64::from(n));
        let sampler = match n % 4 {
            0 => sampler.temperature(0.0),
            1 => sampler.temperature(0.8).top_k(20),
            2 => sampler.temperature(1.0).top_k(0),
            _ => sampler.temperature(0.7).repeat_penalty(1.2),
        };
        let options = GenerateOptions::default()
            .max_tokens(5 + 3 * (n % 11))
            .sampler(sampler)
            .stop(vec![" the".into(), " not".into()]);
        Request::new(tokenizer.encode(&prompt, options.encode))
            .options(options)
            .tenant(u64::from(n % 2))
            .priority(n as i32 % 3)
    };
    (0..count).map(request).collect()
}

/// Runs until nothing is left, and at most so many steps. What each request got, and the text that came piece by piece.
fn finish(batch: &mut Batch, results: &mut HashMap<RequestId, (String, Result<Generation, Error>)>) {
    let mut texts: HashMap<RequestId, String> = HashMap::new();
    for _ in 0..10_000 {
        let goes_on = batch.step(&mut |id, event| match event {
            Event::Tokens { text, .. } => texts.entry(id).or_default().push_str(text),
            Event::Done(generation) => {
                _ = results.insert(id, (texts.remove(&id).unwrap_or_default(), Ok(generation)))
            }
            Event::Failed(error) => {
                _ = results.insert(id, (texts.remove(&id).unwrap_or_default(), Err(error)))
            }
            _ => {}
        });
        if !goes_on.unwrap() {
            return;
        }
    }
    panic!("requests do not end");
}

/// The texts of requests that run one after another, in a session of its own each.
fn alone(model: &Arc<Model>, tokenizer: &Arc<Tokenizer>, count: u32) -> Vec<(String, Finish)> {
    requests(tokenizer, count)
        .into_iter()
        .map(|request| {
            let mut batch = batch(model, tokenizer, 512, 1);
            let id = batch.add(request).unwrap();
            let mut results = HashMap::new();
            finish(&mut batch, &mut results);
            let (text, generation) = results.remove(&id).unwrap();
            let generation = generation.unwrap();
            assert_eq!(text, generation.text);
            (text, generation.finish)
        })
        .collect()
}

#[test]
fn a_text_does_not_depend_on_its_neighbours() {
    let (model, tokenizer) = austen();
    const COUNT: u32 = 40;
    let want = alone(&model, &tokenizer, COUNT);
    assert!(want.iter().any(|(_, finish)| *finish == Finish::Stop), "no text was stopped");
    // Room for all; then so little that prompts wait, texts lose their room, and what is kept is evicted.
    for (context, slots) in [(4096, 16), (320, 8), (256, 3)] {
        let mut batch = batch(&model, &tokenizer, context, slots);
        let ids: Vec<_> =
            requests(&tokenizer, COUNT).into_iter().map(|request| batch.add(request).unwrap()).collect();
        let mut results = HashMap::new();
        finish(&mut batch, &mut results);
        for (id, want) in ids.iter().zip(&want) {
            let (text, generation) = results.remove(id).unwrap();
            assert_eq!(
                (text, generation.unwrap().finish),
                *want,
                "{id:?} with {context} positions for {slots}"
            );
        }
        assert_eq!(batch.counts(), (0, 0));
    }
}

/// A text goes on elsewhere from its tokens as it would have gone on, whatever samples or constrains it.
#[test]
fn a_text_goes_on_elsewhere() {
    let (model, tokenizer) = austen();
    const COUNT: u32 = 12;
    let want = alone(&model, &tokenizer, COUNT);
    for after in [0, 1, 4, 100] {
        // The first session tells tokens until it ends.
        let mut first = batch(&model, &tokenizer, 2048, 16);
        let ids: Vec<_> =
            requests(&tokenizer, COUNT).into_iter().map(|request| first.add(request).unwrap()).collect();
        let mut tokens: HashMap<RequestId, Vec<u32>> = HashMap::new();
        for _ in 0..after {
            let _ = first.step(&mut |id, event| {
                if let Event::Tokens { tokens: more, .. } = event {
                    tokens.entry(id).or_default().extend(more);
                }
            });
        }
        let mut second = batch(&model, &tokenizer, 2048, 4);
        let again: Vec<_> = (requests(&tokenizer, COUNT).into_iter().zip(&ids))
            .map(|(request, id)| second.add(request.resumed(tokens.remove(id).unwrap_or_default())).unwrap())
            .collect();
        let mut results = HashMap::new();
        finish(&mut second, &mut results);
        for (id, want) in again.iter().zip(&want) {
            let (text, generation) = results.remove(id).unwrap();
            assert_eq!((text, generation.unwrap().finish), *want, "after {after} steps");
        }
    }
}

#[test]
fn a_step_that_fails_ends_those_that_ran() {
    let (model, tokenizer) = austen();
    let want = alone(&model, &tokenizer, 8);
    let faulty = Arc::new(Faulty::with_threads(2));
    let backend: Arc<dyn Backend> = faulty.clone();
    let options = SessionOptions::default().context(512).batch(48).outputs(4).sequences(4);
    let mut batch = Batch::new(Session::new(&model, &backend, &options).unwrap(), tokenizer.clone());
    faulty.after(5, Fault::Fail);
    faulty.after(9, Fault::Poison);
    let ids: Vec<_> = requests(&tokenizer, 8).into_iter().map(|r| batch.add(r).unwrap()).collect();
    let (mut failed, mut done) = (Vec::new(), HashMap::new());
    let mut errors = 0;
    loop {
        let goes_on = batch.step(&mut |id, event| match event {
            Event::Failed(error) => failed.push((id, error)),
            Event::Done(generation) => _ = done.insert(id, generation.text),
            _ => {}
        });
        errors += u32::from(goes_on.is_err());
        if matches!(goes_on, Ok(false)) {
            break;
        }
    }
    // One step failed. The poisoned one was repeated for each request, and was right then.
    assert_eq!(errors, 1);
    assert!(!failed.is_empty() && !done.is_empty() && failed.len() + done.len() == 8, "{failed:?}");
    assert!(failed.iter().all(|(_, error)| matches!(error, Error::Backend { .. })), "{failed:?}");
    for (id, (text, _)) in ids.iter().zip(&want) {
        assert_eq!(done.get(id).unwrap_or(text), text);
    }
}

/// Sequences that are kept, shared and evicted leave room in layers with a window.
#[test]
fn windows_have_room_for_all_that_run() {
    let model = Arc::new(
        Model::from_source(Source::from_bytes("windowed", &halite_testing::gguf::windowed().bytes()))
            .unwrap(),
    );
    // Only its bytes of tokens matter.
    let (_, tokenizer) = austen();
    let requests = || {
        let mut random = halite_testing::SplitMix(5);
        let start: Vec<u32> = (0..150).map(|_| random.below(12) as u32).collect();
        // Prompts of which only a token follows keep the pages of their last steps, if nobody takes them.
        let request = |n: usize| {
            let own: Vec<u32> = (0..20 * n).map(|_| random.below(12) as u32).collect();
            let options = GenerateOptions::default().max_tokens(1 + 40 * (n as u32 % 2)).ignore_end(true);
            let options = options.sampler(SamplerOptions::default().seed(n as u64));
            Request::new([&start[..10 * n], &own].concat()).options(options)
        };
        (1..13).map(request).collect::<Vec<_>>()
    };
    let run = |slots: u32, cache: u32, step: u32| -> Vec<Vec<u32>> {
        let backend: Arc<dyn Backend> = Arc::new(Cpu::with_threads(2).unwrap());
        let options = SessionOptions::default().context(512).cache_positions(cache).batch(step);
        let session = Session::new(&model, &backend, &options.outputs(slots).sequences(slots)).unwrap();
        let mut batch = Batch::new(session, tokenizer.clone());
        let ids: Vec<_> = requests().into_iter().map(|request| batch.add(request).unwrap()).collect();
        let mut results = HashMap::new();
        finish(&mut batch, &mut results);
        ids.iter().map(|id| results.remove(id).unwrap().1.unwrap().tokens).collect()
    };
    let want = run(1, 512, 40);
    assert_eq!(run(3, 8192, 512), want);
    assert_eq!(run(8, 512, 40), want);
}

#[test]
fn a_prompt_that_begins_like_another_is_not_computed_again() {
    let (model, tokenizer) = austen();
    let mut batch = batch(&model, &tokenizer, 1024, 4);
    let start = "She was of a cheerful temper, and fond of society; ".repeat(6);
    let request = |end: &str, tenant| {
        let options = GenerateOptions::default().max_tokens(4);
        Request::new(tokenizer.encode(&format!("{start}{end}"), options.encode))
            .options(options)
            .tenant(tenant)
    };
    let mut reused = |requests: Vec<Request>| -> Vec<u32> {
        let ids: Vec<_> = requests.into_iter().map(|request| batch.add(request).unwrap()).collect();
        let mut results = HashMap::new();
        finish(&mut batch, &mut results);
        ids.iter().map(|id| results.remove(id).unwrap().1.unwrap().reused_tokens).collect()
    };
    assert_eq!(reused(vec![request("and", 1)]), [0]);
    let first = reused(vec![request("but", 1), request("or", 1), request("but", 2)]);
    assert!(first[0] > 70 && first[1] > 70, "{first:?}");
    assert_eq!(first[2], 0, "tenants share");
    // The same again: all but the last token.
    let again = request("but", 1);
    let len = again.prompt.len() as u32;
    assert_eq!(reused(vec![again]), [len - 1]);
    // Those that arrive together wait for the first one's prompt.
    let together = reused((0..4).map(|_| request("so", 3)).collect());
    assert_eq!(together[0], 0);
    assert!(together[1..].iter().all(|reused| reused + 1 >= len - 2), "{together:?} of {len}");
}

#[test]
fn requests_can_be_cancelled_at_any_time() {
    let (model, tokenizer) = austen();
    let want = alone(&model, &tokenizer, 8);
    let mut batch = batch(&model, &tokenizer, 512, 3);
    let ids: Vec<_> =
        requests(&tokenizer, 8).into_iter().map(|request| batch.add(request).unwrap()).collect();
    let mut ended = Vec::new();
    for _ in 0..3 {
        batch
            .step(&mut |id, event| {
                if !matches!(event, Event::Tokens { .. } | Event::Began) {
                    ended.push(id);
                }
            })
            .unwrap();
    }
    // One that runs, and one that waits.
    for id in [ids[1], ids[6], ids[1]] {
        let running = batch.cancel(id).map(|generation| generation.finish);
        assert!(running.is_none_or(|finish| finish == Finish::Cancelled));
    }
    let mut results = HashMap::new();
    finish(&mut batch, &mut results);
    for (i, (id, want)) in ids.iter().zip(&want).enumerate() {
        match results.remove(id) {
            Some((_, generation)) => assert_eq!(generation.unwrap().text, want.0),
            None => assert!(i == 1 || i == 6 || ended.contains(id)),
        }
    }
}

#[test]
fn guesses_save_steps_and_change_no_text() {
    let (model, tokenizer) = austen();
    let run = |lookup: u32, count: u32| {
        let mut batch = batch(&model, &tokenizer, 1024, 4).lookup(lookup);
        // Likely texts of a small model repeat themselves; the others try what is wrong.
        let ids: Vec<_> = (0..count)
            .map(|n| {
                let prompt = tokenizer.encode(&format!("{} ladies said", n + 2), EncodeOptions::default());
                let temperature = if n % 3 == 2 { 0.6 } else { 0.0 };
                let sampler = SamplerOptions::default().temperature(temperature).seed(n.into());
                let options = GenerateOptions::default().max_tokens(120 + n).sampler(sampler);
                batch.add(Request::new(prompt).options(options)).unwrap()
            })
            .collect();
        let mut results = HashMap::new();
        finish(&mut batch, &mut results);
        ids.iter()
            .map(|id| {
                let (text, generation) = results.remove(id).unwrap();
                (text, generation.unwrap())
            })
            .collect::<Vec<_>>()
    };
    for count in [1, 3, 12] {
        let (plain, guessed) = (run(0, count), run(8, count));
        for ((text, plain), (guessed_text, guessed)) in plain.iter().zip(&guessed) {
            assert_eq!((text, &plain.tokens, plain.finish), (guessed_text, &guessed.tokens, guessed.finish));
            assert_eq!(plain.drafted, (0, 0));
        }
        let drafted: u32 = guessed.iter().map(|(_, generation)| generation.drafted.1).sum();
        let steps = |all: &[(String, Generation)]| all.iter().map(|(_, it)| it.decode_steps).sum::<u32>();
        assert_eq!(steps(&plain), steps(&guessed) + drafted, "{count} requests");
        assert!(drafted > 0, "{count} requests");
    }
}

#[test]
fn requests_begin_by_priority_then_by_tenant_then_by_deadline() {
    let (model, tokenizer) = austen();
    let mut batch = batch(&model, &tokenizer, 512, 1);
    let now = std::time::Instant::now();
    let soon = |s: u64| Some(now + std::time::Duration::from_secs(s));
    let waiting =
        [(0, 1, None), (0, 1, soon(900)), (0, 1, soon(600)), (-1, 2, soon(1)), (1, 3, None), (0, 2, None)];
    let request = |(priority, tenant, deadline): (i32, u64, Option<_>)| {
        let options = GenerateOptions::default().max_tokens(2);
        Request::new(vec![5, 6]).options(options).priority(priority).tenant(tenant).deadline(deadline)
    };
    let ids = waiting.map(|it| batch.add(request(it)).unwrap());
    let mut began = Vec::new();
    let place = |id| ids.iter().position(|known| *known == id).unwrap();
    while batch
        .step(&mut |id, event| {
            if matches!(event, Event::Began) {
                began.push(place(id));
            }
        })
        .unwrap()
    {}
    assert_eq!(began, [4, 2, 1, 0, 5, 3]);
}

#[test]
fn what_cannot_run_is_said() {
    let (model, tokenizer) = austen();
    let mut batch = batch(&model, &tokenizer, 128, 2);
    assert!(matches!(batch.add(Request::new(Vec::new())), Err(Error::Argument { .. })));
    assert!(matches!(
        batch.add(Request::new(vec![1; 128])),
        Err(Error::ContextFull { need: 129, have: 128 })
    ));
    assert!(matches!(batch.add(Request::new(vec![1, 1_000_000])), Err(Error::Argument { .. })));
    // Options out of range: that request fails, the other goes on until its context is full.
    let wrong = GenerateOptions::default().sampler(SamplerOptions::default().temperature(-1.0));
    let bad = batch.add(Request::new(vec![1, 2]).options(wrong)).unwrap();
    let options =
        GenerateOptions::default().max_tokens(1000).sampler(SamplerOptions::default().temperature(0.0));
    let good = batch.add(Request::new(vec![1, 2, 3]).options(options)).unwrap();
    let mut results = HashMap::new();
    finish(&mut batch, &mut results);
    assert!(results[&bad].1.is_err());
    let generation = results[&good].1.as_ref().unwrap();
    assert_eq!((generation.finish, generation.tokens.len()), (Finish::ContextFull, 126));
}
