//! A decode step allocates nothing: memory is reserved when a session is made.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use halite::Model;
use halite::backend::Backend;
use halite::backend::cpu::Cpu;
use halite::map::Source;
use halite::sampler::{Sampler, SamplerOptions};
use halite::session::{OutputKind, Run, Session, SessionOptions};

struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is the system allocator's; only a counter is added.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: as the caller promised.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: as the caller promised.
        unsafe { System.dealloc(ptr, layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: as the caller promised.
        unsafe { System.realloc(ptr, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn count(f: impl FnOnce()) -> usize {
    let before = ALLOCATIONS.load(Ordering::Relaxed);
    f();
    ALLOCATIONS.load(Ordering::Relaxed) - before
}

#[test]
fn a_decode_step_allocates_nothing() {
    let files = ["models/austen/halite-austen.gguf", "tests/data/golden/llama-Q4_K_M.gguf"];
    let path = |file: &str| std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(file);
    let mut models: Vec<Model> = files.iter().map(|file| Model::open(path(file)).unwrap()).collect();
    // Its window is passed, so that giving a page back is counted too.
    let windowed = Source::from_bytes("windowed", &halite_testing::gguf::windowed().bytes());
    models.push(Model::from_source(windowed).unwrap());
    for model in models {
        let model = Arc::new(model);
        let backend: Arc<dyn Backend> = Arc::new(Cpu::with_threads(2).unwrap());
        let options = SessionOptions::default().context(256).batch(32);
        let mut session = Session::new(&model, &backend, &options).unwrap();
        let sequence = session.add_sequence();
        let hot = SamplerOptions::default().temperature(0.8).repeat_penalty(1.1);
        let mut sampler = Sampler::new(hot, model.hparams().vocab_size as usize).unwrap();
        assert!(count(|| drop(vec![1u8; 100])) > 0, "the counter counts");

        // The pool's threads allocate while they start, which is over when they have done some work.
        for _ in 0..20 {
            session.prefill(sequence, &[1, 2, 3, 4, 5], OutputKind::Logits).unwrap();
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        let steps = count(|| {
            session.prefill(sequence, &[1, 2, 3, 4, 5], OutputKind::Logits).unwrap();
            // Past a page's end, so that taking a page is counted too.
            for _ in 0..80 {
                let token = sampler.sample(session.logits()).unwrap();
                sampler.accept(token);
                session.step(&[Run::new(sequence, &[token])], OutputKind::Logits).unwrap();
            }
            for _ in 0..20 {
                session.step(&[Run::new(sequence, &[7])], OutputKind::ArgMax).unwrap();
            }
        });
        assert_eq!(steps, 0, "{}", model.name());
    }
}
